"""Checkpoints that mlx-lm quantized (affine): their modules become tq's, which the CPU kernels run.

MLX's CPU backend multiplies with affine codes tens of times slower. Other modes (mxfp4, nvfp4 ...) stay as they are.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from tq.engine import ops
from tq.engine.model import layers
from tq.engine.model.roles import is_read_directly
from tq.engine.quantize import PackedTensor, QuantSpec
from tq.engine.quantize.spec import CODEC_BITS, GROUP_SIZES

AFFINE = "affine"


def adopt(model: nn.Module, dtype: mx.Dtype) -> int:
    """Replace the affine modules of ``model``, one by one, where the backend ``cpu`` runs them. Returns how many.

    Args:
        dtype: The type of the activations.

    Raises:
        TQError: TQ_BACKEND asks for a backend that declines.
    """
    kinds = _kinds()
    new: dict[int, layers.QuantModule] = {}  # by the module that it replaces, which may be in more than one place
    for path, module in model.named_modules():
        kind = kinds.get(type(module))
        if kind is None or is_read_directly(model, path):
            continue
        if id(module) not in new:
            packed = _packed(module)
            if packed is None or ops.select(kind.op, packed, dtype) is not ops.cpu:
                continue
            new[id(module)] = _new(kind, packed, module.get("bias"), dtype)
            del packed
            module.clear()  # the list of modules still holds it
            new[id(module)].prepare()
        model.update_modules(tree_unflatten([(path, new[id(module)])]))
    return len(new)


def _new(
    kind: type[layers.QuantModule], packed: PackedTensor, bias: mx.array | None, dtype: mx.Dtype
) -> layers.QuantModule:
    if kind is layers.QuantEmbedding:
        return layers.QuantEmbedding(packed, None, dtype)
    return kind(packed, None, None if bias is None else bias.astype(dtype))


def _kinds() -> dict[type, type[layers.QuantModule]]:
    """The exact types: a subclass may compute something else."""
    from mlx_lm.models.mla import QuantizedMultiLinear
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear

    return {
        nn.QuantizedLinear: layers.QuantLinear,
        nn.QuantizedEmbedding: layers.QuantEmbedding,
        QuantizedSwitchLinear: layers.QuantSwitchLinear,
        QuantizedMultiLinear: layers.QuantMultiLinear,
    }


def _packed(module: nn.Module) -> PackedTensor | None:
    """The matrix of an affine module, or None if its codes are none of tq's."""
    if module.mode != AFFINE or module.bits not in CODEC_BITS[AFFINE] or module.group_size not in GROUP_SIZES:
        return None
    spec = QuantSpec(AFFINE, module.bits, module.group_size, rotation="none")
    arrays = {name: module[name] for name in ("weight", "scales", "biases")}
    shape = (*arrays["weight"].shape[:-1], arrays["scales"].shape[-1] * module.group_size)
    return PackedTensor(spec, shape, arrays)

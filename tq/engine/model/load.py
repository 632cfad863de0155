"""A checkpoint on disk to a runnable model: tq's format, turboquant's, GGUF, and whatever mlx-lm itself loads."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import psutil
from mlx.utils import tree_unflatten

from tq.cpu import build
from tq.engine import ops
from tq.engine.model import formats, hub, layers, native, native_affine, streamed, streamed_load, turboquant
from tq.engine.model.architecture import build_model, outline, parameters
from tq.engine.model.roles import matrices
from tq.engine.model.sources import OWN_MODES, FolderSource, GGUFSource, Source, quantization_mode
from tq.engine.ops import proof
from tq.engine.quantize import PackedTensor
from tq.engine.stream.pager import Pager
from tq.engine.stream.settings import StreamSettings
from tq.errors import TQError

LAYERS = {
    "linear": layers.QuantLinear,
    "switch": layers.QuantSwitchLinear,
    "multi": layers.QuantMultiLinear,
}
HALF = (mx.float16, mx.bfloat16)
HEAD_FROM_WEIGHTS = ("gemma3_text", "recurrent_gemma")


@dataclass
class LoadedModel:
    """A model that can run.

    Attributes:
        model: mlx-lm's module.
        tokenizer: mlx-lm's TokenizerWrapper.
        config: config.json.
        path: The folder or file.
        notes: What a person should know about how it runs.
        size_bytes: Bytes of its tensors on disk.
        pager: What brings its experts from the disk, if they are streamed.
    """

    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    path: Path
    notes: list[str]
    size_bytes: int
    pager: Pager | None = None


def load(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    stream: StreamSettings | None = None,
) -> LoadedModel:
    """Load a model folder, a GGUF file or a Hub id, with its tokenizer.

    Args:
        stream: Leave its experts on the disk, and read them when they are needed.

    Raises:
        TQError: It does not exist, is damaged, mlx-lm has no such architecture, or it cannot be streamed.
    """
    path = hub.resolve(str(model), revision, trust_remote_code=trust_remote_code)
    if path.is_file():
        if stream is not None:
            raise TQError("a GGUF file cannot be streamed", streamed_load.CONVERT)
        return _load_gguf(path, str(model))
    source = FolderSource(path, name=str(model), trust_remote_code=trust_remote_code)
    size = sum(header.size_bytes for header in source.headers.values())
    pager = None
    if quantization_mode(source.config) in OWN_MODES:
        network, notes, pager = _load_packed(source, trust_remote_code, stream)
    elif stream is not None:
        raise TQError(f"{model} is not in a format whose experts can be streamed", streamed_load.CONVERT)
    else:
        network, notes = _load_mlx_lm(source, trust_remote_code)
    tokenizer = _load_tokenizer(path, source.config, trust_remote_code)
    return LoadedModel(network, tokenizer, source.config, path, notes + build.notes(), size, pager)


def load_packed(path: Path, trust_remote_code: bool = False) -> tuple[nn.Module, list[str]]:
    """The model of a tq or turboquant folder, without its tokenizer, and notes on how it runs.

    Raises:
        TQError: A tensor is missing, or has another shape than the model or its spec says.
    """
    source = FolderSource(path, name=str(path), trust_remote_code=trust_remote_code)
    return _load_packed(source, trust_remote_code, None)[:2]


def load_streamed(path: Path, stream: StreamSettings) -> tuple[nn.Module, list[str], Pager]:
    """The same with its experts on the disk, and what brings them.

    Raises:
        TQError: As ``load_packed``, or it cannot be streamed.
    """
    network, notes, pager = _load_packed(FolderSource(path, name=str(path)), False, stream)
    assert pager is not None
    return network, notes, pager


def _load_packed(
    source: FolderSource, trust_remote_code: bool, stream: StreamSettings | None
) -> tuple[nn.Module, list[str], Pager | None]:
    path, config, weights = source.folder, source.config, source.weights()
    if stream is not None:
        config = streamed_load.fewer_active(config, stream.max_active_experts)
    model = build_model(config, path, trust_remote_code)
    _drop_absent_head(model, weights)
    found = matrices(model)
    reader = turboquant if turboquant.is_turboquant(config) else formats
    packed = reader.read_matrices(config, weights, {p: m.shape for p, m in found.items()})
    dense = {name: p.shape for name, p in parameters(model).items() if name.removesuffix(".weight") not in packed}
    for name, shape in dense.items():
        if name not in weights:
            raise TQError(f"{path} has no tensor for {name}", formats.DAMAGED)
        if weights[name].shape != shape:
            raise TQError(f"{path}: {name} has shape {weights[name].shape}, the model wants {shape}", formats.DAMAGED)
    dtype, notes = activation_dtype(_stored_dtype(config, weights))
    experts = None if stream is None else streamed_load.Experts(model, packed, weights, source.headers, config)
    rotations: dict[int, layers.Rotation] = {}
    replaced = _modules(packed, {p: m.kind for p, m in found.items()}, weights, dtype, rotations)
    del packed  # the modules alone hold the arrays, so that they can let go of them
    model.update_modules(tree_unflatten(list(replaced.items())))
    # Biases of packed matrices are in their modules already.
    kept = [(name, _cast(weights.pop(name), dtype)) for name in dense if name in weights]
    model.load_weights(kept, strict=False)
    notes += _prepare(replaced, dtype)
    pager = None
    if experts is not None and stream is not None:
        mx.eval([array for _, array in kept])  # an automatic budget is what is free beside them
        resident = sum(header.size_bytes for header in source.headers.values()) - experts.size_bytes
        pager, more = experts.install(model, stream, dtype, rotations, resident)
        notes += more
    model.eval()
    mx.eval(model.parameters())
    native.accelerate(model)
    streamed.awaken(model)
    return model, notes, pager


def _modules(
    packed: dict[str, PackedTensor],
    kinds: dict[str, str],
    weights: dict[str, mx.array],
    dtype: mx.Dtype,
    rotations: dict[int, layers.Rotation],
) -> dict[str, layers.QuantModule]:
    """The module of each packed matrix. Takes their biases out of ``weights``, and adds to ``rotations``."""
    modules: dict[str, layers.QuantModule] = {}
    for path, matrix in packed.items():
        rotation = None
        if matrix.spec.rotation == "hadamard":
            signs = matrix.arrays["signs"]
            rotation = rotations.setdefault(id(signs), layers.Rotation(signs))
        if kinds[path] == "embedding":
            modules[path] = layers.QuantEmbedding(matrix, rotation, dtype)
        else:
            bias = weights.pop(f"{path}.bias", None)
            modules[path] = LAYERS[kinds[path]](matrix, rotation, None if bias is None else _cast(bias, dtype))
    return modules


def _drop_absent_head(model: nn.Module, weights: dict[str, mx.array]) -> None:
    """Remove a head that the checkpoint does not have: its model shares the embedding.

    mlx-lm's Gemma 3 and RecurrentGemma decide this from the weights, in ``sanitize``.
    """
    for path, module in model.named_modules():
        head = f"{path}.lm_head." if path else "lm_head."
        if (
            type(module).__module__.rpartition(".")[2] in HEAD_FROM_WEIGHTS
            and "lm_head" in module
            and not any(name.startswith(head) for name in weights)
        ):
            module.pop("lm_head")
            module.tie_word_embeddings = True


def activation_dtype(stored: mx.Dtype) -> tuple[mx.Dtype, list[str]]:
    """The type in which a model of ``stored`` type runs here, and a note where that is another one."""
    if mx.default_device() == mx.Device(mx.cpu) and stored in HALF:
        name = str(stored).split(".")[-1]
        return mx.float32, [f"no GPU: activations are float32 instead of {name}, which is slow on a CPU"]
    return stored, []


def _stored_dtype(config: dict, weights: dict[str, mx.array]) -> mx.Dtype:
    name = config.get("quantization", {}).get("dtype") or config.get("dtype") or config.get("torch_dtype")
    if name in ("float16", "bfloat16", "float32"):
        return getattr(mx, name)
    kept = [a.dtype for name, a in weights.items() if name.endswith("norm.weight")]
    return kept[0] if kept else mx.bfloat16


def _cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    """Half types to the activation's; float32 stays, as models keep what must be exact in it."""
    return array.astype(dtype) if array.dtype in HALF else array


def _prepare(modules: dict[str, layers.QuantModule], dtype: mx.Dtype) -> list[str]:
    """Read the weights, and let them be what their backends want: in memory order, decoded, or as they are stored.

    One at a time, the largest first, so that what is read and what is made of it are in memory together only once.
    """
    notes = proof.switch_off_wrong(_metal_work(modules), dtype)
    backends = {path: ops.select(module.op, module.packed, dtype) for path, module in modules.items()}
    slow = [modules[path] for path, backend in backends.items() if backend is ops.reference]
    size = sum(dtype.size * prod(module.dense_shape) for module in slow)
    keep = size <= psutil.virtual_memory().available // 2
    for path in sorted(modules, key=lambda path: -modules[path].packed.size_bytes):
        module = modules[path]
        if backends[path] is ops.cpu:
            module.prepare()
        elif backends[path] is ops.reference and keep:
            module.keep_decoded(dtype)
        mx.eval(module.parameters(), module.hidden.shared, module.hidden.decoded)
    if slow:
        once = f"weights are decoded once and take {size / 1e9:.2f} GB of memory"
        each_time = f"{size / 1e9:.1f} GB of weights are decoded for every token"
        notes.append(f"{_why_slow(slow[0], dtype)}: {once if keep else each_time}")
    return notes


def _metal_work(modules: dict[str, layers.QuantModule]) -> Iterator[proof.Work]:
    for module in modules.values():
        yield module.op, module.spec
        if module.op == "gather_matmul":
            yield "gate_up", module.spec
        if module.rotation is not None:
            yield "rotate", module.dense_shape[-1]


def _why_slow(module: layers.QuantModule, dtype: mx.Dtype) -> str:
    """Why the reference backend runs a module."""
    if ops.forced_backend() == ops.reference.name:
        return f"TQ_BACKEND={ops.reference.name}"
    question = PackedTensor(module.spec, module.dense_shape, {})
    backend = ops.cpu if ops.metal.unavailable() else ops.metal
    return f"no fast kernel for these codes here ({backend.supports(module.op, question, dtype)})"


def _load_gguf(path: Path, name: str) -> LoadedModel:
    """A GGUF file, dequantized in memory: as the reference that a conversion is compared with."""
    if path.suffix != ".gguf":
        raise TQError(f"{name} is not a model: give a folder, a .gguf file or a Hub id")
    source = GGUFSource(path, name=name)
    found = outline(source)
    dtype, notes = activation_dtype(_stored_dtype(source.config, {}))
    weights = []
    for parameter in list(found.weights):
        # All to one type: GGUF keeps norms in float32, which would make the whole model run in it.
        weights.append((parameter, source.materialize(found.weights.pop(parameter)).astype(dtype)))
        mx.eval(weights[-1][1])
    found.model.load_weights(weights)
    found.model.eval()
    native.accelerate(found.model)
    tokenizer = source_tokenizer(source)
    size = sum(header.size_bytes for header in source.headers.values())
    return LoadedModel(found.model, tokenizer, source.config, path, notes + found.notes + build.notes(), size)


def _load_mlx_lm(source: FolderSource, trust_remote_code: bool) -> tuple[nn.Module, list[str]]:
    from mlx_lm.utils import load_model

    path = source.folder
    build_model(source.config, path, trust_remote_code)  # for its errors, which say what to do
    try:
        model, _ = load_model(path, lazy=True, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError) as error:
        raise TQError(f"mlx-lm cannot load {path}: {str(error).splitlines()[0]}") from error
    halves = {array.dtype for array in parameters(model).values() if array.dtype in HALF}
    notes: list[str] = []
    dtype = mx.float32
    if halves:
        dtype, notes = activation_dtype(halves.pop())
    native_affine.adopt(model, dtype)
    if dtype not in HALF:
        model.update(tree_unflatten([(name, _cast(a, dtype)) for name, a in parameters(model).items()]))
    mx.eval(model.parameters())
    native.accelerate(model)
    return model, notes


def source_tokenizer(source: Source, trust_remote_code: bool = False) -> Any:
    """mlx-lm's TokenizerWrapper of a model that is to be converted.

    Raises:
        TQError: It has none that can be loaded.
    """
    if source.folder is not None:
        return _load_tokenizer(source.folder, source.config, trust_remote_code)
    with tempfile.TemporaryDirectory() as folder:
        source.copy_side_files(Path(folder))
        return _load_tokenizer(Path(folder), source.config, False)


def _load_tokenizer(path: Path, config: dict, trust_remote_code: bool) -> Any:
    from mlx_lm.utils import load_tokenizer

    extra = {"trust_remote_code": True} if trust_remote_code else None
    try:
        return load_tokenizer(path, extra, eos_token_ids=config.get("eos_token_id"))
    except (OSError, ValueError) as error:
        raise TQError(f"{path} has no tokenizer that can be loaded: {str(error).splitlines()[0]}") from error

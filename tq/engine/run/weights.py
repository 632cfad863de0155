"""What a loaded model's weights are: how many numbers, and how many bytes one new token reads of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tq.engine.model.layers import QuantEmbedding, QuantModule, QuantSwitchLinear
from tq.engine.model.streamed_load import ACTIVE_EXPERTS


@dataclass(frozen=True)
class Weights:
    """Attributes:
    parameters: Numbers, as many as the unpacked model has.
    size_bytes: Memory that they take.
    token_bytes: What generating one token reads: all matrices, the experts that run, the embedding only as a head.
        None if the config does not say how many experts run.
    """

    parameters: int
    size_bytes: int
    token_bytes: int | None


@dataclass(frozen=True)
class _Part:
    """One module with arrays of its own."""

    module: nn.Module
    rows: int
    parameters: int
    size_bytes: int


def weights_of(model: nn.Module, config: dict[str, Any]) -> Weights:
    """Count a model's weights as they are in memory now."""
    parts = list(_parts(model))
    kinds = (nn.Embedding, nn.QuantizedEmbedding, QuantEmbedding)
    embeddings = [part for part in parts if isinstance(part.module, kinds)]
    others = [part for part in parts if not isinstance(part.module, kinds)]
    vocabulary = max((part.rows for part in embeddings), default=0)
    token_bytes = 0
    if vocabulary not in {part.rows for part in others}:  # no other matrix has logits for outputs
        token_bytes = sum(part.size_bytes for part in embeddings if part.rows == vocabulary)
    active = active_experts(config)
    known = True
    for part in others:
        experts = _experts(part.module)
        if experts is None:
            token_bytes += part.size_bytes
        elif active is None:
            known = False
        else:
            token_bytes += part.size_bytes * min(active, experts) // experts
    size = sum(part.size_bytes for part in parts)
    return Weights(sum(part.parameters for part in parts), size, token_bytes if known else None)


def _parts(model: nn.Module) -> Iterator[_Part]:
    seen = set()
    for _, module in model.named_modules():
        if id(module) in seen:
            continue
        seen.add(id(module))
        arrays = {name: value for name, value in module.items() if isinstance(value, mx.array)}
        if isinstance(module, QuantModule):
            packed = module.packed
            size = packed.decoded.nbytes if packed.decoded is not None else module.spec.size_bytes(module.dense_shape)
            yield _Part(module, module.dense_shape[-2], prod(module.dense_shape), size)
        elif arrays:
            weight = arrays.get("weight")
            count = sum(array.size for array in arrays.values())
            if weight is not None and "scales" in arrays:  # codes of mlx-lm, several in a word
                count = weight.size * 32 // getattr(module, "bits", 32)
            rows = weight.shape[-2] if weight is not None and weight.ndim > 1 else 0
            yield _Part(module, rows, count, sum(array.nbytes for array in arrays.values()))


def _experts(module: nn.Module) -> int | None:
    """How many experts a module holds, or None if it is no module of experts."""
    if isinstance(module, QuantSwitchLinear):
        return module.num_experts
    if type(module).__name__ in ("SwitchLinear", "QuantizedSwitchLinear"):
        return module.weight.shape[0]
    return None


def active_experts(config: dict[str, Any]) -> int | None:
    """How many experts a token runs through, by a model's config; None if it does not say."""
    config = {**config, **(config.get("text_config") or {})}
    return next((config[name] for name in ACTIVE_EXPERTS if isinstance(config.get(name), int)), None)

"""A model's caches replaced by packed ones, before or after it has read a prompt, and what became of each."""

from dataclasses import dataclass, replace
from functools import cache as once
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from tq.engine.cache import hook
from tq.engine.cache.batch import BatchPackedKVCache
from tq.engine.cache.files import CLASSES, register
from tq.engine.cache.packed import PackedKVCache
from tq.engine.cache.settings import KVSettings, number
from tq.engine.cache.window import PackedRotatingKVCache, worth_packing
from tq.errors import TQError

# Layers with several caches, by model type: which of them only `update_and_fetch` writes.
PARTS: dict[str, tuple[int, ...]] = {
    "deepseek_v32": (0,),
    "glm_moe_dsa": (0,),
    "longcat_flash": (0, 1),
    "longcat_flash_ngram": (0, 1),
    "minimax_m3_vl": (0,),
}

# Modules that keys come from, by their names in mlx-lm; not those of latent attention, whose keys are values too.
KEY_PROJECTIONS = ("k_proj", "wk", "qkv_proj", "query_key_value", "c_attn", "wqkv", "Wqkv")


@dataclass(frozen=True)
class CacheEvent:
    """What became of the cache of a layer, or of one part of it.

    Attributes:
        layer: Its number. part: In a layer with several caches.
        cache: The class that it had.
        action: "packed", or "kept": it is as it was.
        reason: Why.
    """

    layer: int
    part: int | None
    cache: str
    action: Literal["packed", "kept"]
    reason: str


def convert_cache(cache: list[Any], settings: KVSettings | None = None, model: nn.Module | None = None) -> list[Any]:
    """A prompt cache of mlx-lm with its keys and values packed; what cannot be packed is kept.

    Args:
        cache: What `make_prompt_cache` made, with or without tokens. After a prompt its tokens are packed now, layer by
            layer; the prompt itself was computed with unpacked ones then.
        settings: K8/V3 if None.
        model: Attends to packed tokens as they are from then on (`hook.install`), and says what its caches are.

    Raises:
        TQError: A cache's vectors cannot be packed with these settings.
    """
    made = list(cache)
    upgrade_cache(made, settings, model=model)
    return made


def upgrade_cache(
    cache: list[Any],
    settings: KVSettings | None = None,
    *,
    start: int = 0,
    model_family: str | None = None,
    model: nn.Module | None = None,
) -> list[CacheEvent]:
    """Replace the entries of a prompt cache by packed ones, in the list itself.

    Args:
        start: Pack a cache only once it holds so many tokens; call again later.
        model_family: The model's type, as in its config: layers with several caches need it. `model` knows it.

    Returns:
        What was packed, what was not, and why: one event for each cache.
    """
    register()
    settings = settings or KVSettings()
    family = model_family or getattr(model, "model_type", None)
    if model is not None:
        hook.install(model)
        if settings.centre is None and has_key_biases(model):
            settings = replace(settings, centre=True)
    events: list[CacheEvent] = []
    for layer, found in enumerate(cache):
        if _is_list(found):
            cache[layer] = _parts(found, settings, start, family, layer, events)
        else:
            cache[layer] = _one(found, settings, start, layer, None, events)
    return events


def has_key_biases(model: nn.Module) -> bool:
    """Whether the keys of a model have biases, so that packing them less their mean pays.

    Not if it has attention sinks: their scores have no key, so that what all keys share counts there.
    """
    modules = model.named_modules()
    biased = any(name.rpartition(".")[2] in KEY_PROJECTIONS and "bias" in module for name, module in modules)
    return biased and not any("sink" in parameter for _, module in modules for parameter in module)


def pack(cache: list[Any], settings: KVSettings, model: nn.Module | None = None) -> list[CacheEvent]:
    """`upgrade_cache` for somebody who asked for packed caches.

    Raises:
        TQError: None can be packed.
    """
    events = upgrade_cache(cache, settings, model=model)
    if not any(event.action == "packed" for event in events):
        reasons = list(dict.fromkeys(event.reason for event in events))
        raise TQError(f"no cache of this model can be packed: {'; '.join(reasons)}", "leave --kv-bits out")
    return events


def summary(events: list[CacheEvent]) -> list[str]:
    """One line for each reason to keep caches as they are."""
    lines = []
    packed = sum(event.action == "packed" for event in events)
    for reason in dict.fromkeys(event.reason for event in events if event.action == "kept"):
        n = sum(event.reason == reason for event in events if event.action == "kept")
        lines.append(f"{n} of {len(events)} caches stay unpacked: {reason}")
    return lines if packed else []


def _parts(found: Any, settings: KVSettings, start: int, family: str | None, layer: int, events: list) -> Any:
    """A layer with several caches."""
    plain = [type(part) in _known() for part in found.caches]
    reason = None
    if sum(plain) > 1 and family not in PARTS:
        known = f"the model type {family}" if family else "the model type, which is not known,"
        reason = f"{known} decides which of a layer's caches are plain keys and values"
    made = []
    for i, part in enumerate(found.caches):
        if reason is None and sum(plain) > 1 and i not in PARTS[family or ""]:
            why: str | None = "the model writes to it itself"
        else:
            why = reason
        if why is not None and plain[i]:
            events.append(CacheEvent(layer, i, type(part).__name__, "kept", why))
            made.append(part)
        else:
            made.append(_one(part, settings, start, layer, i, events))
    return type(found)(*made)


def _one(found: Any, settings: KVSettings, start: int, layer: int, part: int | None, events: list) -> Any:
    reason = _why_kept(found, settings, start)
    kind = type(found).__name__
    if reason is not None:
        events.append(CacheEvent(layer, part, kind, "kept", reason))
        return found
    made = _known()[type(found)](found, settings)
    size = found.size()
    label = f"keys in {number(settings.key_bits)} bits, values in {number(settings.value_bits)}"
    events.append(CacheEvent(layer, part, kind, "packed", f"{label}, {size} tokens now" if size else label))
    return made


def _why_kept(found: Any, settings: KVSettings, start: int) -> str | None:
    if type(found).__name__ in CLASSES:
        return "it is packed already"
    if type(found) not in _known():
        return _OTHERS.get(type(found).__name__, f"{type(found).__name__} is no cache that tq knows")
    if found.size() < start:
        return f"it holds {found.size()} tokens, packing starts at {start}"
    window = getattr(found, "max_size", None)
    if window is None:
        return None
    if not worth_packing(settings, window, getattr(found, "keep", 0)):
        return f"a window of {window} tokens has too few that would be packed"
    return None


_OTHERS = {
    "ArraysCache": "a recurrent state has a fixed size, and no keys and values",
    "ChunkedKVCache": "attention in chunks forgets its first tokens itself",
    "QuantizedKVCache": "mlx-lm has quantized it already",
}


@once
def _known() -> dict[type, Any]:
    """How each class is converted, by the exact type: a subclass may keep something else."""
    from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, KVCache, RotatingKVCache

    return {KVCache: _plain, RotatingKVCache: _rotating, BatchKVCache: _batch, BatchRotatingKVCache: _batch}


def _is_list(found: Any) -> bool:
    from mlx_lm.models.cache import CacheList

    return type(found) is CacheList


def _plain(found: Any, settings: KVSettings) -> PackedKVCache:
    made = PackedKVCache(settings)
    if found.offset:
        _fill(made, found.keys[:, :, : found.offset], found.values[:, :, : found.offset])
    return made


def _rotating(found: Any, settings: KVSettings) -> PackedRotatingKVCache:
    made = PackedRotatingKVCache(settings, found.max_size, found.keep)
    if found.offset:
        keys, values = (
            found._temporal_order(x[:, :, : min(found.offset, x.shape[2])]) for x in (found.keys, found.values)
        )
        _fill(made, keys, values)
        made.seen = keys.shape[2]
        lost = found.offset - keys.shape[2]
        made.offset += lost
        made.dropped += lost
    return made


def _batch(found: Any, settings: KVSettings) -> BatchPackedKVCache:
    window = getattr(found, "max_size", None)
    padding = found.left_padding.tolist()
    if found.empty():
        rows = [PackedKVCache(settings) if window is None else PackedRotatingKVCache(settings, window) for _ in padding]
        return BatchPackedKVCache(rows, padding)
    single = [found.extract(b) for b in range(len(padding))]
    return BatchPackedKVCache([_plain(one, settings) if window is None else _rotating(one, settings) for one in single])


def _fill(made: PackedKVCache, keys: mx.array, values: mx.array) -> None:
    """Pack tokens now: the next layer's must not wait for memory that this one's still hold."""
    made.append(keys, values)
    mx.eval(made.state)

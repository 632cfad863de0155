"""Sequences run together only where that gives what each gives alone, and where it pays."""

import mlx.core as mx
import pytest

from tq.engine.cache.settings import KVSettings
from tq.engine.model.native_layers import NativeModule
from tq.engine.run.serve import batching
from tq.errors import UsageError

PACKED = KVSettings(8, 8)


@pytest.mark.parametrize(
    ("kind", "kv", "mode", "says"),
    [
        ("qwen3", None, "batch", "one batch"),
        ("qwen3", PACKED, "batch", "one batch"),
        ("qwen3", KVSettings(8, 8, start=100), "batch", "one batch"),
        ("falcon_h1", None, "batch", "one batch"),
        ("llama4", None, "turns", "ChunkedKVCache takes one sequence"),
        ("gemma2", None, "turns", "it fails in a batch"),  # its mask has no axis for sequences
        ("afm7", None, "turns", "differ by"),  # keys of earlier layers end up in the wrong columns
        ("gemma3n", PACKED, "turns", "it fails in a batch"),
    ],
)
def test_a_trial_decides(model_of, kind, kv, mode, says):
    found, why = batching.choose(model_of(kind).model.inner, kv, None)
    assert (found, says in why) == (mode, True), why


def test_a_model_that_mixes_sequences_up_is_found_out(model_of):
    loaded = model_of("qwen3")
    inner = loaded.model.inner

    class Mixed(type(inner)):
        def __call__(self, inputs, cache=None):
            logits = super().__call__(inputs, cache=cache)
            return mx.concatenate([logits[1:], logits[:1]])

    inner.__class__ = Mixed
    found, why = batching.choose(loaded.model, None, None)
    assert found == "turns"
    assert "logits in a batch differ" in why
    with pytest.raises(UsageError, match="cannot run in batches: its logits"):
        batching.choose(loaded.model, None, "batch")


def test_not_a_number_is_no_agreement(model_of):
    loaded = model_of("qwen3")
    head = loaded.model.inner.model.norm
    head.weight = head.weight * mx.nan
    assert batching.choose(loaded.model, None, None)[0] == "turns"


def test_layers_of_cpu_kernels_take_turns(model_of):
    loaded = model_of("qwen3")
    loaded.model.native = NativeModule()
    found, why = batching.choose(loaded.model, None, None)
    assert (found, "CPU kernels" in why) == ("turns", True)
    assert batching.choose(loaded.model, None, "batch")[0] == "batch"


def test_turns_can_be_asked_for(model_of):
    assert batching.choose(model_of("qwen3").model, None, "turns") == (
        "turns", "requests take turns, token by token, as asked",
    )  # fmt: skip

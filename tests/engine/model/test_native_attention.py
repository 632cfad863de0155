"""The attention that models are given against MLX's own, and where it is given."""

import sys

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import build

from tq.engine import ops
from tq.engine.cache import hook
from tq.engine.model import native_attention

pytestmark = pytest.mark.skipif(ops.cpu.unavailable() is not None, reason=f"no CPU kernels: {ops.cpu.unavailable()}")


@pytest.fixture(autouse=True)
def clean():
    native_attention.uninstall()
    yield
    native_attention.uninstall()


def samples(*shape, seed=0, dtype=mx.float32):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def qkv(B=1, heads=4, kv_heads=2, L=1, S=9, D=64, V=64):
    return samples(B, heads, L, D), samples(B, kv_heads, S, D, seed=1), samples(B, kv_heads, S, V, seed=2)


def original():
    return native_attention._original()


def assert_same(arguments, mask=None, sinks=None, scale=0.125):
    found = native_attention.attention(*arguments, None, scale=scale, mask=mask, sinks=sinks)
    expected = original()(*arguments, None, scale=scale, mask=mask, sinks=sinks)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=0, atol=2e-5)


@pytest.fixture
def handed_over(monkeypatch):
    """How often mlx-lm's function was asked."""
    calls = []
    real = original()
    monkeypatch.setattr(native_attention, "_original", lambda: lambda *a, **k: calls.append(a) or real(*a, **k))
    return calls


SHAPES = {
    "one token": {},
    "no cache": {"L": 9},
    "a prompt": {"L": 33, "S": 33},
    "the end of a prompt": {"L": 5, "S": 70},
    "a head for each query": {"kv_heads": 4, "L": 3},
    "a batch": {"B": 3, "L": 2, "S": 17},
    "other values": {"D": 96, "V": 48, "L": 3},
    "one key": {"S": 1},
    "odd heads": {"D": 40, "V": 40, "heads": 6, "kv_heads": 3},
    "wide heads": {"D": 256, "V": 256},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("mask", [None, "causal"])
def test_shapes(shape, mask):
    if mask == "causal" and shape.get("L", 1) > shape.get("S", 9):
        pytest.skip("there is no such thing")
    assert_same(qkv(**shape), mask)


@pytest.mark.parametrize("dtype", [mx.bool_, mx.float32, mx.float16])
@pytest.mark.parametrize(
    "shape", [(5, 12), (1, 1, 5, 12), (3, 1, 5, 12), (3, 4, 5, 12), (1, 4, 5, 12), (3, 1, 1, 12), (12,)]
)
def test_masks(dtype, shape):
    mask = samples(*shape, seed=4) > -0.5
    mask = mx.concatenate([mx.ones_like(mask[..., :1]), mask[..., 1:]], axis=-1)  # no row without a key
    if dtype != mx.bool_:
        mask = mx.where(mask, samples(*shape, seed=5), -1e4).astype(dtype)
    assert_same(qkv(B=3, L=5, S=12), mask)


@pytest.mark.parametrize("mask", [None, "causal"])
def test_sinks(mask):
    assert_same(qkv(L=3), mask, sinks=samples(4, seed=3))


def test_sinks_of_a_dead_array_are_not_taken_for_those_of_another():
    for seed in range(20):
        assert_same(qkv(L=3), None, sinks=samples(4, seed=seed))


def test_keys_in_a_part_of_a_longer_buffer():
    queries, keys, values = qkv(B=2, S=40, L=2)
    assert_same((queries, keys[:, :, :17], values[:, :, 3:20]), "causal")


def test_queries_with_transposed_axes():
    queries, keys, values = qkv(L=6)
    swapped = mx.contiguous(queries.swapaxes(1, 2)).swapaxes(1, 2)
    assert_same((swapped, keys, values), None)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": mx.float16},
        {"cache": type("Quantized", (), {"bits": 4, "group_size": 64})()},
        {"mask": "sliding"},
        {"empty": True},
    ],
    ids=["half precision", "a quantized cache", "an unknown mask", "no queries"],
)
def test_what_the_kernel_cannot_do_is_handed_over(monkeypatch, change):
    calls = []
    monkeypatch.setattr(native_attention, "_original", lambda: lambda *a, **k: calls.append((a, k)))
    queries, keys, values = (a.astype(change.get("dtype", mx.float32)) for a in qkv())
    if change.get("empty"):
        queries = queries[:, :, :0]
    cache, mask = change.get("cache"), change.get("mask")
    native_attention.attention(queries, keys, values, cache, scale=0.5, mask=mask)
    ((arguments, named),) = calls
    assert arguments[0] is queries
    assert arguments[3] is cache
    assert named == {"scale": 0.5, "mask": mask, "sinks": None}


def test_what_it_can_do_is_not_handed_over(handed_over):
    native_attention.attention(*qkv(), None, scale=1.0, mask=None)
    assert handed_over == []


def test_the_files_of_a_model_use_it_until_it_is_taken_back():
    model, other = build("llama"), build("qwen2")
    tokens = mx.array([[1, 5, 9, 2]])
    expected = np.array(model(tokens))
    namespace = vars(sys.modules["mlx_lm.models.llama"])
    real = original()
    assert namespace[hook.NAME] is real
    assert native_attention.install(model) == 1
    assert native_attention.install(model) == 0
    assert namespace[hook.NAME] is native_attention.attention
    np.testing.assert_allclose(np.array(model(tokens)), expected, atol=1e-5)
    assert vars(sys.modules[type(other).__module__])[hook.NAME] is real
    native_attention.uninstall()
    assert namespace[hook.NAME] is real

"""Attention over packed tokens against float64: all kinds of codes, masks and shapes, a few query rows and many."""

import mlx.core as mx
import numpy as np
import pytest
from metal.emulator import device_requested, emulated

from tq.metal import attend as attend_module
from tq.metal.attend import Codes, Tokens, declines
from tq.metal.attend_variants import Data, Setting, variants

pytestmark = pytest.mark.usefixtures("metal")

TOLERANCE = {mx.float16: 2e-3, mx.bfloat16: 4e-3, mx.float32: 1e-5}  # of bfloat16 the result alone rounds to 1.7e-3


def check(bits=(8, 3), dims=(64, 64), dtype=mx.float16, heads=(3, 1), tokens=(5, 0, 128, 7), length=1, batch=1,
          groups=(0, 0), mask=None, sinks=False, **how):  # fmt: skip
    """mask: also a function of shapes; sinks: random ones."""
    random = np.random.default_rng(0)
    data = Data(random, Setting(bits, dims, dtype, heads, tokens, length, batch, groups))
    assert declines(dtype, data.key, data.value) is None
    if mask is not None:
        how["mask"] = mask if isinstance(mask, str) else mask(random, batch, heads[0], length, data.tokens.count)
    if sinks:
        how["sinks"] = random.standard_normal(heads[0]).astype(np.float32)
    got = data.attend(**{name: mx.array(x) if isinstance(x, np.ndarray) else x for name, x in how.items()})
    assert got.dtype == dtype
    expected = data.expected(**how)
    assert np.linalg.norm(np.array(got.astype(mx.float32)) - expected) < TOLERANCE[dtype] * np.linalg.norm(expected)


def left_padding(random, batch, heads, length, total):
    """As mlx-lm's batches have it."""
    return np.arange(total) >= np.array([0, 70])[:batch, None, None, None]


def per_head(random, batch, heads, length, total):
    return random.standard_normal((heads, 1, total)).astype(np.float32)


def per_query(random, batch, heads, length, total):
    return random.random((batch, 1, length, total)) < 0.7


@pytest.mark.parametrize(
    ("bits", "dims", "dtype", "heads", "tokens", "more"),
    [
        ((8, 3), (64, 64), mx.float16, (3, 1), (5, 0, 128, 7), {}),
        ((4, 4), (128, 128), mx.float32, (8, 1), (0, 0, 192, 0), {}),
        ((3, 8), (80, 80), mx.bfloat16, (2, 2), (1, 0, 64, 135), {"mask": left_padding, "batch": 2}),
        ((2, 5), (96, 32), mx.float32, (4, 2), (7, 3, 61, 1), {"sinks": True, "softcap": 3.0, "scale": 0.5}),
        (
            (1, 6),
            (32, 128),
            mx.float16,
            (2, 1),
            (3, 0, 200, 9),
            {"starts": np.array([2, 150]), "batch": 2, "groups": (0, 32)},
        ),
        ((7, 2), (112, 16), mx.float32, (4, 2), (63, 1, 255, 65), {"mask": per_head, "groups": (16, 0)}),
        ((6, 1), (256, 48), mx.float32, (4, 1), (2, 0, 65, 4), {"mask": "causal", "length": 3}),
        ((8, 8), (512, 512), mx.float16, (18, 1), (2, 0, 64, 3), {"mask": per_head}),
    ],
)
def test_a_few_rows_equal_float64(bits, dims, dtype, heads, tokens, more):
    check(bits, dims, dtype, heads, tokens, **more)


@pytest.mark.parametrize(
    "tokens",
    [(0, 0, 0, 1), (1, 0, 0, 0), (0, 0, 1, 0), (0, 62, 63, 0), (0, 0, 65, 0), (128, 64, 200, 127), (3, 0, 1100, 1)],
)
def test_any_number_of_tokens(tokens):
    check(tokens=tokens)


def test_a_slice_of_a_larger_array_in_any_order_of_threads():
    if device_requested():
        pytest.skip("a GPU chooses both itself")
    for order in ("backward", "random"):
        with emulated(misalign=1, order=order):
            check()


@pytest.mark.parametrize(
    ("bits", "dims", "dtype", "heads", "tokens", "length", "more"),
    [
        ((8, 3), (64, 64), mx.float16, (6, 2), (5, 0, 128, 37), 9, {"mask": "causal"}),
        ((4, 2), (80, 112), mx.float32, (2, 2), (3, 2, 70, 50), 33, {"mask": per_query, "starts": np.array([40])}),
        ((3, 4), (128, 96), mx.bfloat16, (3, 1), (0, 0, 64, 11), 11, {"mask": "causal", "softcap": 5.0}),
    ],
)
def test_many_rows_equal_float64(bits, dims, dtype, heads, tokens, length, more, monkeypatch):
    arguments = dict(bits=bits, dims=dims, dtype=dtype, heads=heads, tokens=tokens, length=length, **more)
    check(**arguments)
    monkeypatch.setattr("tq.metal.attend.ENOUGH", 1)  # a prompt: no splits, plain tokens are rotated
    check(**arguments, sinks=True)


@pytest.mark.parametrize("n_heads", [1, 20])
def test_a_query_that_sees_nothing_has_the_result_zero(n_heads):
    data = Data(np.random.default_rng(0), Setting((8, 8), (16, 16), mx.float16, (n_heads, 1), (0, 0, 64, 3)))
    for hidden in ({"mask": mx.zeros(67, mx.bool_)}, {"starts": mx.array([67])}):
        assert not mx.any(data.attend(**hidden))


def test_a_mask_of_other_tokens_is_an_error():
    data = Data(np.random.default_rng(0), Setting((8, 8), (16, 16), mx.float16, (1, 1), (0, 0, 64, 3)))
    with pytest.raises(ValueError, match="66"):
        data.attend(mask=mx.ones(66, mx.bool_))


def test_variants_are_what_they_say():
    settings = [Setting((8, 3), (64, 64), mx.float16, (6, 2), (5, 0, 128, 37), length) for length in (1, 9)]
    rows, tile = variants(settings)
    assert (rows.kernel, tile.kernel) == ("attend_rows", "attend_tile")
    for variant in (rows, tile):
        assert variant.prepare(np.random.default_rng(0)).error() < TOLERANCE[variant.dtype]


def test_splits_leave_enough_threadgroups_and_no_token_out():
    def plan(n_packed, key_heads=8, rows=4, dim=128):
        empty = mx.zeros(0)
        tokens = Tokens((empty,) * 2, (empty,) * 2, (empty,) * 2, (empty,) * 2, 128, 0, n_packed, 100)
        return attend_module._plan(tokens, key_heads, rows, dim)

    for n_packed in (64, 2048, 8192, 131072):
        found = plan(n_packed)
        assert found.splits[1] * found.split_tokens >= n_packed > (found.splits[1] - 1) * found.split_tokens
    assert plan(2048).split_tokens == 256
    assert plan(131072).split_tokens == 1024  # of 8 SIMD-groups, as many as they can hold
    assert plan(64, rows=16).kernel is attend_module.ROWS
    assert plan(64, rows=17).kernel is attend_module.TILE
    assert plan(64, rows=17, dim=512).kernel is attend_module.ROWS
    assert not plan(8192, rows=64).final and plan(8192, rows=512).final


def test_declines_what_it_cannot_do():
    def codes(bits, dim, group=0):
        return Codes(bits, mx.zeros(16), mx.eye(dim), group)

    assert declines(mx.bfloat16, codes(8, 512), codes(3, 16)) is None
    assert "int32" in declines(mx.int32, codes(8, 64), codes(8, 64))
    assert "keys of 40 numbers" in declines(mx.float16, codes(8, 40), codes(8, 64))
    assert "values of 576 numbers" in declines(mx.float16, codes(8, 64), codes(8, 576))
    assert "groups of 24" in declines(mx.float16, codes(8, 48, 24), codes(8, 64))
    assert "0 bits" in declines(mx.float16, codes(0, 64), codes(8, 64))

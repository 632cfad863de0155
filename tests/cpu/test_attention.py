"""Attention over float and packed caches, and what is appended to them, against float64 NumPy."""

import functools
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from packed_cache import (
    F16,
    F32,
    PACKED,
    Code,
    PackedCache,
    Segment,
    attend,
    call,
    expected,
    parameters,
    random_packed,
    unpack,
)
from packed_matrix import relative_error

from tq.cpu import library

# head_dim, value_dim. The last ones: fewer than a vector, and latent attention.
DIMENSIONS = [
    (40, 40), (56, 56), (64, 64), (80, 80), (96, 120), (112, 96), (128, 128), (160, 160), (192, 128), (224, 224),
    (256, 256), (7, 5), (576, 512),
]  # fmt: skip
# n_heads, n_kv_heads, queries: every way to share out rows, and both sides of its limits.
ROWS = [(1, 1, 1), (4, 4, 1), (6, 2, 1), (9, 1, 1), (3, 1, 2), (8, 2, 2), (8, 1, 3), (6, 3, 5), (4, 2, 16), (14, 2, 9)]
BITS = [(8, 4), (8, 3), (4, 4), (8, 8), (2, 2), (3, 5), (1, 6), (7, 1), (5, 7), (6, 2)]
# What differs from exact attention: queries of int8 and weights of one byte; both have 127 to 255 levels.
# Both add up over few tokens and dimensions to more than over many: test_error_of_bytes is the measure.
ROUGH, EXACT = 0.03, 1e-5


def normal(random: np.random.Generator, *shape: int, dtype=np.float32) -> np.ndarray:
    return random.standard_normal(shape).astype(dtype)


def floats(random, heads: int, kv_heads: int, queries: int, tokens: int, dims=(64, 64), batch=1, dtype=np.float32):
    """q, keys, values."""
    q = normal(random, batch, heads, queries, dims[0])
    return q, *(normal(random, batch, kv_heads, tokens, dim, dtype=dtype) for dim in dims)


def check(q, keys, values, **options) -> None:
    result = attend(q, [[keys, values]], keys.shape[1], values.shape[3], **options)
    assert relative_error(result, expected(q, keys, values, **options)) < EXACT


def check_packed(
    random, code: Code, heads: int, kv_heads: int, queries: int, tokens: int, batch=1, hidden=0, rough=ROUGH, **options
) -> None:
    """Random codes, behind which there is garbage."""
    q = normal(random, batch, heads, queries, code.dims[0])
    segment, dense = random_packed(code, batch, kv_heads, tokens, random, spare=1, hidden=hidden)
    options = {"causal": True, "position": max(0, tokens - queries), **options}
    for exact, limit in ((True, EXACT), (False, rough)):
        result = attend(q, [segment], kv_heads, code.dims[1], code=code, exact=exact, **options)
        assert relative_error(result, expected(q, *dense(exact), **options)) < limit


# --- floats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("dims", DIMENSIONS, ids=str)
def test_every_head_dimension(dims, dtype):
    random = np.random.default_rng(0)
    for heads, kv_heads, queries in ROWS:
        for tokens in (1, 15, 66):
            options = {"causal": True, "position": tokens - queries} if queries <= tokens else {}
            check(*floats(random, heads, kv_heads, queries, tokens, dims, 2, dtype), **options)


@pytest.mark.parametrize("tokens", [1, 15, 64, 65, 127, 1000, 4097])
def test_contexts(tokens):
    random = np.random.default_rng(1)
    for heads, kv_heads, queries in ((3, 1, 1), (9, 3, 4), (2, 1, 40)):
        if queries <= tokens:
            check(*floats(random, heads, kv_heads, queries, tokens, batch=3), causal=True, position=tokens - queries)


@pytest.mark.parametrize(("past", "queries"), [(0, 300), (1, 64), (100, 77), (1000, 130), (63, 512)])
def test_prompts_with_a_past(past, queries):
    random = np.random.default_rng(2)
    for dtype in (np.float32, np.float16):
        check(*floats(random, 6, 2, queries, past + queries, dtype=dtype), causal=True, position=past)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 17},
        {"window": 64},
        {"window": 1000},
        {"softcap": 2.0},
        {"softcap": 30.0, "window": 33},
        {"sinks": "random"},
        {"sinks": "random", "window": 20, "softcap": 5.0},
        {"scale": 0.7},
        {"scale": -0.05},
        {"causal": False},
        {"causal": False, "sinks": "random"},
    ],
    ids=str,
)
def test_options(options):
    random = np.random.default_rng(3)
    options = {"causal": True, **options}
    if "sinks" in options:
        options["sinks"] = normal(random, 6)
    for queries, tokens in ((1, 200), (1, 700), (3, 70), (100, 300)):
        check(*floats(random, 6, 2, queries, tokens), position=tokens - queries, **options)
        check_packed(random, Code(8, 4, 64, 64), 6, 2, queries, tokens, **options)


@pytest.mark.parametrize("shape", [(2, 6, None), (1, 6, None), (2, 1, None), (1, 1, None)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive", "minus infinity"])
def test_masks(kind, shape):
    random = np.random.default_rng(4)
    for queries, tokens in ((1, 130), (5, 65), (70, 200)):
        mask = random.random((*shape[:2], queries, tokens)) < 0.6
        mask[..., 0] = True
        if kind != "bool":
            hidden = normal(random, *mask.shape) if kind == "additive" else -np.inf
            mask = np.where(mask, np.float32(0), hidden).astype(np.float32)
        check(*floats(random, 6, 2, queries, tokens, batch=2), mask=mask)
        check_packed(random, Code(8, 4, 64, 64), 6, 2, queries, tokens, batch=2, causal=False, mask=mask)


def test_masks_by_strides():
    random = np.random.default_rng(5)
    q, keys, values = floats(random, 4, 2, 6, 40, batch=2)
    mask = random.random((6, 3, 2, 50)) < 0.7
    mask[..., 0] = True
    check(q, keys, values, mask=np.broadcast_to(mask.transpose(2, 1, 0, 3)[:, :1, :, :40], (2, 4, 6, 40)))


def test_arrays_with_other_strides():
    """mlx-lm's projections give (B, tokens, heads, dim), transposed; its caches are longer than what they hold."""
    random = np.random.default_rng(6)
    for queries in (1, 3, 50):
        q = normal(random, 2, queries, 6, 64).transpose(0, 2, 1, 3)
        keys = normal(random, 2, 100, 3, 64).transpose(0, 2, 1, 3)
        values = normal(random, 2, 3, 256, 48)[:, :, :100]
        check(q, keys, values, causal=True, position=100 - queries)


def test_segments_in_any_order_and_a_ring():
    """The window of a ring buffer that has gone round: newer tokens lie before older ones."""
    random = np.random.default_rng(7)
    for dtype, form in ((np.float32, F32), (np.float16, F16)):
        for queries in (1, 20):
            q, keys, values = floats(random, 4, 2, queries, 300, dtype=dtype)
            ring = [np.full((1, 2, 128, 64), np.nan, dtype) for _ in range(2)]
            for position in range(172, 300):
                for buffer, rows in zip(ring, (keys, values), strict=True):
                    buffer[:, :, position % 128] = rows[:, :, position]
            start = 172 % 128
            old, new = Segment(form, ring, 128 - start, 172, start), Segment(form, ring, start, 172 + 128 - start)
            begin = Segment(form, [x[:, :, :10].copy() for x in (keys, values)], 10)
            options = {"causal": True, "position": 300 - queries}
            seen = np.r_[172:300, 0:10]
            want = expected(q, keys[:, :, seen], values[:, :, seen], positions=seen, **options)
            for segments in ([old, new, begin], [begin, new, old]):
                assert relative_error(attend(q, segments, 2, 64, **options), want) < EXACT


# --- what MLX does ---------------------------------------------------------------------------------------------------


def check_like_mlx(q, keys, values, sinks=None, **options) -> np.ndarray:
    result = attend(q, [[keys, values]], keys.shape[1], values.shape[3], sinks=sinks, **options)
    arrays = [mx.array(x) for x in (q, keys, values)]
    mask = "causal" if "causal" in options else None if "mask" not in options else mx.array(options["mask"])
    sinks = None if sinks is None else mx.array(sinks)
    want = mx.fast.scaled_dot_product_attention(*arrays, scale=q.shape[3] ** -0.5, mask=mask, sinks=sinks)
    np.testing.assert_allclose(result, np.array(want), rtol=1e-4, atol=1e-5)
    return result


def test_a_row_that_sees_nothing():
    random = np.random.default_rng(8)
    q, keys, values = floats(random, 4, 2, 3, 150)
    sinks = normal(random, 4)
    mask = np.ones((1, 1, 3, 150), bool)
    mask[:, :, 1] = False
    check_like_mlx(q, keys, values, mask=mask)
    check_like_mlx(q, keys, values, mask=mask, sinks=sinks)
    infinite = np.where(mask, np.float32(0), np.float32(-np.inf))
    assert np.isnan(check_like_mlx(q, keys, values, mask=infinite)[:, :, 1]).all()
    assert not check_like_mlx(q, keys, values, mask=infinite, sinks=sinks)[:, :, 1].any()


@pytest.mark.parametrize(("queries", "tokens"), [(5, 3), (90, 65)])
def test_more_causal_queries_than_tokens(queries, tokens):
    q, keys, values = floats(np.random.default_rng(9), 4, 2, queries, tokens)
    check_like_mlx(q, keys, values, causal=True, position=tokens - queries)


def test_no_tokens_and_no_queries():
    random = np.random.default_rng(10)
    q, keys, values = floats(random, 4, 2, 3, 0)
    assert not check_like_mlx(q, keys, values).any()
    assert not check_like_mlx(q, keys, values, sinks=normal(random, 4)).any()
    q, keys, values = floats(random, 4, 2, 0, 5)
    assert attend(q, [[keys, values]], 2, 64).shape == (1, 4, 0, 64)
    q, keys, values = floats(random, 4, 2, 1, 5, batch=0)
    assert attend(q, [[keys, values]], 2, 64).shape == (0, 4, 1, 64)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_with_those_who_see_them(bad):
    random = np.random.default_rng(11)
    for queries in (1, 40):
        q, keys, values = floats(random, 4, 2, queries, 100)
        position = 100 - queries
        with np.errstate(invalid="ignore"):
            poisoned = q.copy()
            poisoned[0, 1, 0, 3] = bad
            result = attend(poisoned, [[keys, values]], 2, 64, causal=True, position=position)
            assert np.isnan(result[0, 1, 0]).all() and np.isfinite(np.delete(result, 1, axis=1)).all()
            poisoned = keys.copy()
            poisoned[0, 1, 5] = np.nan
            result = attend(q, [[poisoned, values]], 2, 64, causal=True, position=position)
            assert np.isnan(result[0, 2:]).all() and np.isfinite(result[0, :2]).all()
            poisoned = values.copy()
            poisoned[0, 0, 7, 2] = bad
            result = attend(q, [[keys, poisoned]], 2, 64, causal=True, position=position)
            assert not np.isfinite(result[0, :2, -1, 2]).any() and np.isfinite(np.delete(result, 2, axis=3)).all()


def test_large_scores():
    random = np.random.default_rng(12)
    for queries in (1, 40):
        q, keys, values = floats(random, 4, 2, queries, 300)
        check(q * 300, keys, values, causal=True, position=300 - queries)
        check(q * 1e-30, keys * 1e-10, values, causal=True, position=300 - queries)


# --- packed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_every_width_of_codes(bits):
    random = np.random.default_rng(13)
    for dims in ((64, 64), (40, 120), (128, 80), (7, 5)):
        code = Code(*bits, *dims)
        for heads, kv_heads, queries in ROWS[1::2]:
            for tokens in (1, 65, 300):
                check_packed(random, code, heads, kv_heads, queries, tokens, batch=2)


@pytest.mark.parametrize("dims", DIMENSIONS, ids=str)
def test_every_head_dimension_packed(dims):
    random = np.random.default_rng(14)
    for bits in ((8, 3), (4, 4)):
        for rotate in (False, True):
            code = Code(*bits, *dims, rotate=rotate)
            for heads, kv_heads, queries in ROWS[::3]:
                check_packed(random, code, heads, kv_heads, queries, 130)


@pytest.mark.parametrize("tokens", [15, 64, 1000, 4097])
def test_contexts_packed(tokens):
    random = np.random.default_rng(15)
    for bits in ((8, 4), (8, 3), (4, 4)):
        for heads, kv_heads, queries in ((3, 1, 1), (9, 3, 4)):
            check_packed(random, Code(*bits, 64, 64), heads, kv_heads, queries, tokens, batch=3)
    check_packed(random, Code(8, 4, 64, 64), 6, 2, min(tokens, 150), tokens)


def test_error_of_bytes():
    """On normal queries, keys and values, over many rows, beside exact attention to the same codes."""
    for bits in ((8, 4), (8, 3), (4, 4), (8, 8)):
        code = Code(*bits, 64, 64)
        cache, *_ = filled(code, [512], sink=0, window=0)
        q = normal(np.random.default_rng(16), 2, 24, 4, 64)
        result = attend(q, cache.segments, 3, 64, code=code)
        assert relative_error(result, expected(q, *cache.unpacked())) < 0.01


def test_nan_in_a_packed_cache():
    random = np.random.default_rng(17)
    code = Code(8, 4, 64, 64)
    for queries in (1, 20):
        q = normal(random, 1, 4, queries, 64)
        for scales in (1, 3):  # of the keys, of the values
            segment, _ = random_packed(code, 1, 2, 100, random)
            segment.arrays[scales][0, 1, 30] = np.nan
            result = attend(q, [segment], 2, 64, code=code)
            assert np.isnan(result[0, 2:]).all() and np.isfinite(result[0, :2]).all()
        segment, _ = random_packed(code, 1, 2, 100, random)
        q[0, 3, -1, 9] = np.nan
        result = attend(q, [segment], 2, 64, code=code)
        assert np.isnan(result[0, 3, -1]).all() and np.isfinite(result[0, :3]).all()


# Groups with and without a rest, of half a block of columns, one and two; minima; outliers.
FORMS = [
    {"group": 32}, {"group": 64}, {"group": 128}, {"affine": True}, {"affine": True, "group": 32},
    {"affine": True, "group": 64}, {"outliers": True}, {"outliers": True, "rotate": False},
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_of_codes(form):
    random = np.random.default_rng(24)
    for bits, dims in (((8, 3), (128, 128)), ((4, 4), (64, 256)), ((3, 2), (96, 80)), ((2, 6), (224, 64))):
        if form.get("outliers"):
            bits = min(bits[0], 6), bits[1]
        code = Code(*bits, *dims, **form)
        for heads, kv_heads, queries in ((3, 1, 1), (8, 2, 2), (14, 2, 9)):
            check_packed(random, code, heads, kv_heads, queries, 300, batch=2)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_unpacks(form):
    random = np.random.default_rng(25)
    code = Code(6, 4, 128, 96, **form)
    for hidden in (0, 17):
        segment, dense = random_packed(code, 2, 3, 150, random, hidden=hidden)
        for side, rows in enumerate(unpack(code, [segment], 3)):
            assert relative_error(rows, dense(True)[side]) < 1e-6


@pytest.mark.parametrize("hidden", [1, 40, 63])
def test_a_segment_that_begins_inside_a_block(hidden):
    """What a window has left behind of its first block is seen by no row, with or without a mask."""
    random = np.random.default_rng(26)
    for queries, tokens in ((1, 200), (3, 30), (70, 300)):
        code = Code(8, 4, 64, 64)
        check_packed(random, code, 6, 2, queries, tokens, hidden=hidden)
        check_packed(random, code, 6, 2, queries, tokens, hidden=hidden, causal=False, sinks=normal(random, 6))
        check_packed(random, code, 6, 2, queries, tokens, hidden=hidden, window=50)
        mask = random.random((1, 6, queries, tokens)) < 0.6
        mask[..., 0] = True
        check_packed(random, code, 6, 2, queries, tokens, hidden=hidden, causal=False, mask=mask)


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_unpacks(bits):
    random = np.random.default_rng(18)
    for dims in ((64, 64), (40, 120), (130, 5)):
        code = Code(*bits, *dims)
        segment, dense = random_packed(code, 2, 3, 150, random)
        for side, rows in enumerate(unpack(code, [segment], 3)):
            assert relative_error(rows, dense(True)[side]) < 1e-6


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    """Sets their number, and puts it back."""
    before = library.library().tq_get_threads()
    yield library.library().tq_set_threads
    library.library().tq_set_threads(before)


CALLS = [(3, 1, 1, 1000), (9, 3, 2, 300), (4, 4, 1, 40), (2, 1, 200, 400), (8, 8, 1, 64)]


@functools.cache
def calls():
    """Functions that attend, and what they return."""
    random = np.random.default_rng(19)
    code = Code(8, 4, 64, 64)
    made = []
    for heads, kv_heads, queries, tokens in CALLS:
        options = {"causal": True, "position": tokens - queries}
        q, keys, values = floats(random, heads, kv_heads, queries, tokens)
        packed, dense = random_packed(code, 1, kv_heads, tokens, random)
        one = functools.partial(attend, q, [[keys, values]], kv_heads, 64, **options)
        two = functools.partial(attend, q, [packed], kv_heads, 64, code=code, exact=True, **options)
        made += [(one, expected(q, keys, values, **options)), (two, expected(q, *dense(True), **options))]
    return made


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16])
def test_numbers_of_threads(threads, n):
    threads(n)
    for run, want in calls():
        assert relative_error(run(), want) < EXACT


def test_callers_at_the_same_time(threads):
    threads(3)
    work = calls() * 8
    with ThreadPoolExecutor(6) as pool:
        for result, (_, want) in zip(pool.map(lambda call: call[0](), work), work, strict=True):
            assert relative_error(result, want) < EXACT


# --- appending -------------------------------------------------------------------------------------------------------


def filled(code: Code, sizes: list[int], sink=4, window=32, dtype=np.float16, seed=20):
    """A cache that was given tokens in chunks of these sizes, and their keys and values."""
    random = np.random.default_rng(seed)
    total = sum(sizes)
    keys, values = (normal(random, 2, 3, total, dim) for dim in code.dims)
    cache = PackedCache(code, 2, 3, sink, window, total, dtype)
    for n in sizes:
        chunk = slice(cache.length, cache.length + n)
        cache.append(keys[:, :, chunk], values[:, :, chunk])
    return cache, keys, values


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_chunks_make_no_difference(bits):
    code = Code(*bits, 64, 40)
    whole = filled(code, [300], dtype=np.float32)[0].unpacked()
    for sizes in ([1] * 300, [299, 1], [3, 1, 1, 95, 1, 64, 130, 5]):
        for a, b in zip(whole, filled(code, sizes, dtype=np.float32)[0].unpacked(), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("sink", "window"), [(0, 0), (4, 32), (64, 64), (128, 1), (1000, 10), (5, 1000)])
def test_sink_and_window_keep_what_was_given(sink, window):
    code = Code(8, 3, 64, 64)
    for total in (1, 63, 64, 65, 200, 260):
        cache, *given = filled(code, [total // 2, total - total // 2], sink, window, np.float32)
        floating = np.r_[0 : min(sink, total), cache.packed_until(total) : total]
        assert total - cache.packed_until(total) <= window + 63 or total <= sink
        for rows, original in zip(cache.unpacked(), given, strict=True):
            assert rows.shape == original.shape
            np.testing.assert_array_equal(rows[:, :, floating], original[:, :, floating])


@pytest.mark.parametrize(
    ("bits", "limit"),
    [(1, 0.361), (2, 0.113), (3, 0.0305), (4, 0.0074), (5, 0.0018), (6, 0.00047), (7, 0.00013), (8, 5e-5)],
)
def test_error_of_codes(bits, limit):
    """Little more than the best scales leave, tq/engine/quantize/scales.py; norms alone leave .363 .117 .034 .0095."""
    cache, *given = filled(Code(bits, bits, 64, 64), [640], sink=0, window=0)
    for rows, original in zip(cache.unpacked(), given, strict=True):
        assert ((rows - original) ** 2).mean() < limit


def test_attends_to_what_was_appended():
    for sizes in ([150], [100, 1, 1, 1, 60], [1] * 70):
        for bits in ((8, 3), (4, 4)):
            code = Code(*bits, 64, 64)
            cache, *_ = filled(code, sizes)
            for queries in (1, 5, 60):
                q = normal(np.random.default_rng(21), 2, 6, queries, 64)
                options = {"causal": True, "position": cache.length - queries}
                want = expected(q, *cache.unpacked(), **options)
                exact = attend(q, cache.segments, 3, 64, code=code, exact=True, **options)
                assert relative_error(exact, want) < EXACT
                rough = attend(q, cache.segments, 3, 64, code=code, **options)
                assert relative_error(rough, want) < ROUGH


def test_extreme_vectors():
    """Zeros, a single value, the smallest and the largest numbers: no NaN. And NaN and infinity: nothing else."""
    for bits in (1, 3, 4, 6, 8):
        code = Code(bits, bits, 64, 64, rotate=False)
        rows = np.zeros((1, 1, 64, 64), np.float32)
        rows[0, 0, 1, 3], rows[0, 0, 2], rows[0, 0, 3], rows[0, 0, 4] = 5, 1e-40, 60000, 3e38
        rows[0, 0, 5, 7], rows[0, 0, 6, 8] = np.nan, -np.inf
        cache = PackedCache(code, 1, 1, 0, 0, 64)
        cache.append(rows, rows)
        for side in cache.unpacked():
            assert not side[0, 0, 0].any()
            assert np.isfinite(side[0, 0, [1, 2, 3, 4, *range(7, 64)]]).all()
            assert np.isnan(side[0, 0, 5:7]).all()
            assert relative_error(side[0, 0, 3], rows[0, 0, 3]) < (0.5 if bits > 1 else 0.7)


def test_appends_rows_to_a_ring():
    """Four tokens to a ring of ten rows, of which the last two and the first two are next."""
    keys, values = (normal(np.random.default_rng(22), 1, 2, 4, dim) for dim in (8, 6))
    for dtype, form in ((np.float32, F32), (np.float16, F16)):
        ring = [np.zeros((1, 2, 10, dim), dtype) for dim in (8, 6)]
        segments = [Segment(form, ring, 8, 12, 2), Segment(form, ring, 2, 20)]
        params = parameters(segments, 2, 8, 6, None)
        params.position = 18
        call(library.library().tq_kv_append, params, [keys, values], [*ring, *ring])
        for buffer, rows in zip(ring, (keys, values), strict=True):
            np.testing.assert_array_equal(buffer[:, :, [8, 9, 0, 1]], rows.astype(dtype))
            assert not buffer[:, :, 2:8].any()


def test_packs_into_a_ring():
    """A window of two blocks in room for three: the fourth block takes the place of the first."""
    code = Code(8, 4, 64, 64)
    cache, keys, values = filled(code, [256], sink=0, window=0)
    linear = [array.copy() for array in cache.packed]
    ring = [array[:, :, :3].copy() if i % 2 == 0 else array[:, :, :192].copy() for i, array in enumerate(linear)]
    recent = Segment(F16, cache.recent, 0, 256)
    segments = [Segment(PACKED, ring, 128, 64, 64), Segment(PACKED, ring, 64, 192), recent]
    params = parameters(segments, 3, 64, 64, code)
    params.position, params.pack_from = 192, 192
    new = [rows[:, :, 192:] for rows in (keys, values)]
    call(library.library().tq_kv_append, params, new, [*ring, *ring, *recent.arrays])
    for i, (array, whole) in enumerate(zip(ring, linear, strict=True)):
        size = 1 if i % 2 == 0 else 64
        np.testing.assert_array_equal(array[:, :, :size], whole[:, :, 3 * size :])
        np.testing.assert_array_equal(array[:, :, size:], whole[:, :, size : 3 * size])
    q = normal(np.random.default_rng(24), 2, 6, 5, 64)
    options = {"causal": True, "window": 100, "position": 251}
    want = attend(q, cache.segments, 3, 64, code=code, exact=True, **options)
    assert relative_error(attend(q, segments, 3, 64, code=code, exact=True, **options), want) < EXACT

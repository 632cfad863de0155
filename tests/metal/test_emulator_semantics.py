"""What a kernel computes in the emulator is what Metal says: checked against NumPy, and on a GPU if there is one."""

import mlx.core as mx
import numpy as np
import pytest

RNG = np.random.default_rng(0)
LANE = np.arange(32)
X = RNG.standard_normal(32).astype(np.float32)
HALVES = RNG.standard_normal(64).astype(np.float16)
WORDS = RNG.integers(0, 2**32, 64, dtype=np.uint32)


@pytest.fixture
def run(kernel_class):
    """Runs a body with inputs a0, a1, ... and one output o; the text must be clean for the compiler as well."""

    def run(body, inputs, shape, dtype, threads=32, threadgroup=None, header="", template=(), **options):
        constructor = {key: options.pop(key) for key in ("atomic_outputs", "ensure_row_contiguous") if key in options}
        names = [f"a{i}" for i in range(len(inputs))]
        kernel = kernel_class("semantics", names, ["o"], body, header=header, **constructor)
        assert kernel.typecheck(inputs, [dtype], template) == []
        grid = threads if isinstance(threads, tuple) else (threads, 1, 1)
        (output,) = kernel(
            inputs=inputs,
            template=list(template),
            grid=grid,
            threadgroup=threadgroup or (min(grid[0], 32), 1, 1),
            output_shapes=[shape],
            output_dtypes=[dtype],
            **options,
        )
        return output

    return run


def lanes(run, expression, *more, count=32, dtype=mx.float32):
    """`expression` of v, an element of X, and l, the lane, in each of `count` lanes."""
    body = f"uint l = thread_index_in_simdgroup; float v = a0[l]; o[l] = {expression};"
    return run(body, [X, *more], (count,), dtype, threads=count)


# ---- SIMD-groups --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("simd_shuffle(v, ushort((l * 7 + 3) & 31))", X[(LANE * 7 + 3) & 31]),
        ("simd_shuffle_xor(v, 5)", X[LANE ^ 5]),
        ("simd_shuffle_down(v, 3)", np.where(LANE + 3 < 32, X[np.minimum(LANE + 3, 31)], X)),
        ("simd_shuffle_up(v, 3)", np.where(LANE >= 3, X[np.maximum(LANE - 3, 0)], X)),
        ("simd_shuffle_rotate_down(v, 3)", X[(LANE + 3) % 32]),
        ("simd_shuffle_rotate_up(v, 3)", X[(LANE - 3) % 32]),
        ("simd_shuffle_and_fill_down(v, -v, 3)", np.where(LANE < 29, 1, -1) * X[(LANE + 3) % 32]),
        ("simd_shuffle_and_fill_up(v, -v, 3)", np.where(LANE >= 3, 1, -1) * X[(LANE - 3) % 32]),
        ("simd_shuffle_and_fill_down(v, -v, 3, 8)", np.where(LANE % 8 < 5, 1, -1) * X[LANE // 8 * 8 + (LANE + 3) % 8]),
        ("simd_shuffle_and_fill_up(v, -v, 3, 8)", np.where(LANE % 8 >= 3, 1, -1) * X[LANE // 8 * 8 + (LANE - 3) % 8]),
        ("simd_broadcast(v, 9)", np.full(32, X[9])),
        ("simd_broadcast_first(v)", np.full(32, X[0])),
        ("simd_max(v)", np.full(32, X.max())),
        ("simd_min(v)", np.full(32, X.min())),
        ("float(simd_xor(l * 37u))", np.full(32, np.bitwise_xor.reduce(LANE * 37))),
        ("float(simd_or(1u << l) >> 8)", np.full(32, 0xFFFFFF)),
        ("float(simd_and(~(1u << l)))", np.zeros(32)),
        ("simd_any(l == 7u) ? 1.0f : 0.0f", np.ones(32)),
        ("simd_all(l != 7u) ? 1.0f : 0.0f", np.zeros(32)),
        ("simd_is_first() ? 1.0f : 0.0f", LANE == 0),
        ("quad_shuffle_xor(v, 1)", X[LANE ^ 1]),
        ("quad_broadcast(v, 2)", X[LANE // 4 * 4 + 2]),
        ("quad_max(v)", np.repeat(X.reshape(8, 4).max(1), 4)),
    ],
)
def test_lanes_exchange(run, expression, expected):
    np.testing.assert_array_equal(lanes(run, expression), expected)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("simd_sum(v)", np.full(32, X.sum())),
        ("simd_product(v)", np.full(32, X.prod())),
        ("simd_prefix_inclusive_sum(v)", np.cumsum(X)),
        ("simd_prefix_exclusive_sum(v)", np.cumsum(X) - X),
        ("simd_prefix_inclusive_product(v)", np.cumprod(X)),
        ("quad_sum(v)", np.repeat(X.reshape(8, 4).sum(1), 4)),
    ],
)
def test_lanes_reduce(run, expression, expected):
    np.testing.assert_allclose(lanes(run, expression), expected, rtol=1e-5, atol=1e-5)


def test_a_vote_has_a_bit_for_each_lane(run):
    ballot = lanes(run, "uint(ulong(simd_ballot(v > 0.0f)))", dtype=mx.uint32)
    np.testing.assert_array_equal(ballot, np.full(32, sum(1 << i for i in range(32) if X[i] > 0)))


def test_vectors_are_exchanged_whole(run):
    body = "uint l = thread_index_in_simdgroup; float4 w = simd_shuffle_xor(float4(a0[l], l, half2(2.0h).x, 3), 1);"
    output = run(body + "o[l] = w.x + 100.0f * w.y + w.z * w.w;", [X], (32,), mx.float32)
    np.testing.assert_allclose(output, X[LANE ^ 1] + 100 * (LANE ^ 1) + 6, rtol=1e-6)


def test_lanes_that_returned_take_no_part(run):
    body = "uint l = thread_index_in_simdgroup; if (l >= 20) return; o[l] = simd_sum(a0[l]);"
    np.testing.assert_allclose(run(body, [X], (20,), mx.float32), np.full(20, X[:20].sum()), rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 5, 31, 33, 50, 63, 100])
def test_the_last_simdgroup_and_the_last_threadgroup_may_be_partial(run, threads):
    body = """
        uint i = thread_position_in_grid.x;
        uint last = simd_max(thread_index_in_simdgroup);
        o[i] = simd_sum(1u) + 100u * last + 10000u * threads_per_threadgroup.x + 1000000u * simdgroups_per_threadgroup;
    """
    output = run(body, [X], (threads,), mx.uint32, threads=threads, threadgroup=(48, 1, 1))
    index = np.arange(threads)
    group = np.minimum(48, threads - index // 48 * 48)  # threads of this thread's threadgroup
    width = np.minimum(32, group - index % 48 // 32 * 32)  # and of its SIMD-group
    np.testing.assert_array_equal(output, width + 100 * (width - 1) + 10000 * group + 1000000 * -(-group // 32))


def test_a_sum_over_a_partial_simdgroup_has_its_lanes_only(run):
    body = "uint i = thread_position_in_grid.x; o[i] = simd_sum(a0[i]) + 10.0f * simd_prefix_inclusive_sum(1.0f);"
    output = run(body, [np.resize(X, 40)], (40,), mx.float32, threads=40, threadgroup=(64, 1, 1))
    expected = np.r_[np.full(32, X.sum()) + 10 * (LANE + 1), np.full(8, X[:8].sum()) + 10 * np.arange(1, 9)]
    np.testing.assert_allclose(output, expected, rtol=1e-5)


# ---- types --------------------------------------------------------------------------------------------------------
def test_half_rounds_after_each_operation(run):
    body = "uint i = thread_position_in_grid.x; half p = a0[i] * a0[63 - i]; o[i] = p + a0[i];"
    output = run(body, [HALVES], (64,), mx.float16, threads=64)
    np.testing.assert_array_equal(output, (HALVES * HALVES[::-1]) + HALVES)


def test_bfloat_is_rounded_to_nearest_even(run):
    values = mx.array(HALVES).astype(mx.bfloat16)
    body = "uint i = thread_position_in_grid.x; o[i] = a0[i] * a0[63 - i];"
    output = run(body, [values], (64,), mx.bfloat16, threads=64)
    assert output.dtype == mx.bfloat16
    wide = np.array(values.astype(mx.float32))
    expected = mx.array(wide * wide[::-1]).astype(mx.bfloat16)
    np.testing.assert_array_equal(np.array(output.astype(mx.float32)), np.array(expected.astype(mx.float32)))


def test_vectors_load_and_swizzle(run):
    body = """
        half4 q = ((const device half4*)a0)[thread_position_in_grid.x];
        o[thread_position_in_grid.x] = dot(float4(q), float4(1, 2, 3, 4)) + float(q.wzyx.x) + float(q.xy.y);
    """
    rows = HALVES.reshape(16, 4).astype(np.float32)
    output = run(body, [HALVES], (16,), mx.float32, threads=16)
    np.testing.assert_allclose(output, rows @ [1, 2, 3, 4] + rows[:, 3] + rows[:, 1], rtol=1e-4)


@pytest.mark.parametrize(
    "construct",
    [
        "V q = V(a, b, c, d);",  # an alias in the body
        "H q = H(a, b, c, d);",  # one in the header
        "vec<float, 4> q = vec<float, 4>(a, b, c, d);",
        "metal::float4 q = float4(float2(a, b), c, d);",
        "V q = V(float3(a, b, c), d);",
    ],
)
def test_vectors_are_built_from_parts_by_any_name(run, construct):
    body = f"""
        using V = vec<float, 4>;
        uint i = thread_position_in_grid.x;
        float a = a0[i], b = 2, c = 3, d = 4;
        {construct}
        o[i] = q.x + 10 * q.y + 100 * q.z + 1000 * q.w;
    """
    output = run(body, [X], (32,), mx.float32, header="typedef float4 H;\n")
    np.testing.assert_allclose(output, X + 4320, rtol=1e-6)


def test_packed_vectors_have_the_alignment_of_their_elements(run):
    body = """
        uint i = thread_position_in_grid.x;
        float3 v = ((const device packed_float3*)a0)[i];
        ((device packed_float3*)o)[i] = packed_float3(v.zyx);
    """
    output = run(body, [X[:30]], (30,), mx.float32, threads=10)
    np.testing.assert_array_equal(output, X[:30].reshape(10, 3)[:, ::-1].ravel())


@pytest.mark.parametrize(
    ("expression", "of_bytes"),
    [
        ("uint(q.x) + uint(q.y) * 3u + uint(q[2]) * 5u + uint(q.w) * 7u", lambda b: b @ np.uint32([1, 3, 5, 7])),
        ("uint((q >> uchar4(4)).z)", lambda b: b[:, 2] >> 4),
    ],
)
def test_bytes_of_a_word(run, expression, of_bytes):
    body = f"uint i = thread_position_in_grid.x; uchar4 q = as_type<uchar4>(a0[i]); o[i] = {expression};"
    expected = of_bytes(WORDS.view(np.uint8).reshape(-1, 4).astype(np.uint32))
    np.testing.assert_array_equal(run(body, [WORDS], (64,), mx.uint32, threads=64), expected)


def test_words_are_shifted_and_masked_by_vectors(run):
    body = """
        uint4 q = ((const device uint4*)a0)[thread_position_in_grid.x];
        q = (q >> uint4(0, 8, 16, 24)) & 0xffu;
        o[thread_position_in_grid.x] = q.x + q.y + q.z + q.w;
    """
    expected = ((WORDS.reshape(16, 4) >> np.uint32([0, 8, 16, 24])) & 255).sum(1)
    np.testing.assert_array_equal(run(body, [WORDS], (16,), mx.uint32, threads=16), expected)


def test_signed_bytes(run):
    bytes_ = WORDS.view(np.int8).reshape(-1, 4)
    body = """
        char4 q = ((const device char4*)a0)[thread_position_in_grid.x];
        o[thread_position_in_grid.x] = int(q.x) * int(q.y) - int(q.w);
    """
    wide = bytes_.astype(np.int32)
    output = run(body, [bytes_], (64,), mx.int32, threads=64)
    np.testing.assert_array_equal(output, wide[:, 0] * wide[:, 1] - wide[:, 3])


def test_a_word_as_two_halves(run):
    body = "uint i = thread_position_in_grid.x; half2 q = as_type<half2>(a0[i]); o[i] = float(q.x) * 2 + float(q.y);"
    finite = WORDS & 0x3FFF3FFF
    pairs = finite.view(np.float16).reshape(-1, 2).astype(np.float32)
    np.testing.assert_allclose(run(body, [finite], (64,), mx.float32, threads=64), pairs @ [2, 1], rtol=1e-6)


def test_bool_and_int64(run):
    body = "uint i = thread_position_in_grid.x; o[i] = a0[i] ? a1[i] * 3 : int64_t(-1);"
    which, values = LANE % 3 == 0, LANE.astype(np.int64) << 33
    np.testing.assert_array_equal(run(body, [which, values], (32,), mx.int64), np.where(which, values * 3, -1))


def test_template_arguments(run):
    body = "uint i = thread_position_in_grid.x; o[i] = B ? T(a0[i]) * N : T(0);"
    template = [("T", mx.float16), ("N", -3), ("B", True)]
    output = run(body, [X], (32,), mx.float16, template=template)
    np.testing.assert_allclose(output, X.astype(np.float16) * np.float16(-3), rtol=2e-3)


def test_math_at_the_edges(run):
    body = "o[0] = exp(-INFINITY) + exp(a0[0] - a0[0]); o[1] = rsqrt(4.0f); o[2] = fract(2.25f); o[3] = sign(-3.0f);"
    np.testing.assert_array_equal(run(body, [X], (4,), mx.float32, threads=1), [1, 0.5, 0.25, -1])


def test_bits(run):
    body = """
        uint w = a0[thread_position_in_grid.x];
        o[thread_position_in_grid.x] = popcount(w) + 100u * extract_bits(w, 5u, 3u) + 10000u * ctz(w | 0x100u);
    """
    counts = np.array([bin(word).count("1") for word in WORDS.tolist()])
    zeros = np.array([(word | 256) & -(word | 256) for word in WORDS.tolist()])
    expected = counts + 100 * (WORDS >> 5 & 7) + 10000 * np.log2(zeros).astype(int)
    np.testing.assert_array_equal(run(body, [WORDS], (64,), mx.uint32, threads=64), expected)


# ---- memory -------------------------------------------------------------------------------------------------------
def test_a_constant_table(run):
    header = "constant float TABLE[4] = {0.5f, -1.0f, 2.0f, 4.0f};\n"
    body = "uint i = thread_position_in_grid.x; o[i] = TABLE[a0[i] & 3u];"
    output = run(body, [WORDS], (64,), mx.float32, threads=64, header=header)
    np.testing.assert_array_equal(output, np.float32([0.5, -1, 2, 4])[WORDS & 3])


def test_small_inputs_are_constant_and_scalars_are_references(run):
    body = "uint i = thread_position_in_grid.x; o[i] = a0[i] * a1 + a2[i & 1];"
    output = run(body, [X, np.float32(2), np.float32([1, 2])], (32,), mx.float32)
    np.testing.assert_allclose(output, X * 2 + np.tile([1, 2], 16), rtol=1e-6)


def test_strides_of_an_input_that_is_not_contiguous(run):
    matrix = RNG.standard_normal((6, 10)).astype(np.float32)
    body = "uint i = thread_position_in_grid.x; o[i] = a0[elem_to_loc(i, a0_shape, a0_strides, a0_ndim)];"
    output = run(body, [matrix.T], (10, 6), mx.float32, threads=60, ensure_row_contiguous=False)
    np.testing.assert_array_equal(output, matrix.T)


def test_a_grid_of_three_dimensions(run):
    body = """
        uint3 p = thread_position_in_grid, n = threads_per_grid, g = threadgroup_position_in_grid;
        o[(p.z * n.y + p.y) * n.x + p.x] = g.x + 10u * g.y + 100u * g.z + 0u * uint(a0[0]);
    """
    output = run(body, [X], (3, 4, 6), mx.uint32, threads=(6, 4, 3), threadgroup=(4, 2, 1))
    np.testing.assert_array_equal(output, np.fromfunction(lambda z, y, x: x // 4 + 10 * (y // 2) + 100 * z, (3, 4, 6)))


def test_helpers_take_pointers_with_address_spaces(run):
    header = """
        inline float total(const threadgroup float* p, int n) {
          float sum = 0;
          for (int i = 0; i < n; ++i) sum += p[i];
          return sum;
        }
        template <typename P> inline float first(P p) { return p[0]; }
    """
    body = """
        threadgroup float shared[64];
        uint i = thread_index_in_threadgroup;
        shared[i] = a0[i & 31u];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        o[i] = total(shared, 64) + first(a0) + first(a1);
    """
    output = run(body, [X, X[:2]], (64,), mx.float32, threads=64, threadgroup=(64, 1, 1), header=header)
    np.testing.assert_allclose(output, np.full(64, 2 * X.sum() + 2 * X[0]), rtol=1e-4)


@pytest.mark.parametrize(
    ("body", "dtype", "expected"),
    [
        ("atomic_fetch_add_explicit(&o[a0[i] & 7u], 1.0f, memory_order_relaxed);", mx.float32, np.bincount(WORDS & 7)),
        ("atomic_fetch_max_explicit(&o[0], int(a0[i] >> 1), memory_order_relaxed);", mx.int32, [(WORDS >> 1).max()]),
    ],
)
def test_atomics_on_outputs(run, body, dtype, expected):
    body = "uint i = thread_position_in_grid.x; " + body
    output = run(body, [WORDS], (len(expected),), dtype, threads=64, atomic_outputs=True, init_value=0)
    np.testing.assert_array_equal(output, expected)


def test_atomics_in_threadgroup_memory(run):
    body = """
        threadgroup atomic_uint count[1];
        uint i = thread_index_in_threadgroup;
        if (i == 0) atomic_store_explicit(&count[0], 0u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        atomic_fetch_add_explicit(&count[0], a0[i] & 3u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (i == 0) o[threadgroup_position_in_grid.x] = atomic_load_explicit(&count[0], memory_order_relaxed);
    """
    output = run(body, [WORDS], (2,), mx.uint32, threads=128, threadgroup=(64, 1, 1))
    np.testing.assert_array_equal(output, np.full(2, (WORDS & 3).sum()))


@pytest.mark.parametrize("dtype", ["half", "float", "bfloat"])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_of_a_simdgroup(run, dtype, transposed):
    """C = A B of 16x24 by 24x8: A from device memory, B from threadgroup memory, summed in float."""
    left, right = RNG.standard_normal((16, 24)), RNG.standard_normal((24, 8))
    kind = {"half": mx.float16, "float": mx.float32, "bfloat": mx.bfloat16}[dtype]
    inputs = [mx.array(left).astype(kind), mx.array(right.T if transposed else right).astype(kind)]
    loading = "b, shared + 8 * k, 24, ulong2(0, 0), true" if transposed else "b, shared + 64 * k, 8"
    body = f"""
        threadgroup {dtype} shared[24 * 8];
        uint l = thread_index_in_simdgroup;
        for (uint i = l; i < 192; i += 32) shared[i] = a1[i];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int r = 0; r < 2; ++r) {{
          simdgroup_matrix<float, 8, 8> c = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
          for (int k = 0; k < 3; ++k) {{
            simdgroup_matrix<{dtype}, 8, 8> a, b;
            simdgroup_load(a, a0 + r * 8 * 24 + k * 8, 24);
            simdgroup_load({loading});
            simdgroup_multiply_accumulate(c, a, b, c);
          }}
          simdgroup_store(c, o + r * 64, 8);
        }}
    """
    output = np.array(run(body, inputs, (16, 8), mx.float32))
    a, b = (np.array(x.astype(mx.float32)).astype(np.float64) for x in inputs)
    np.testing.assert_allclose(output, a @ (b.T if transposed else b), rtol=1e-5, atol=1e-5)


def test_elements_of_a_simdgroup_matrix_are_where_mlx_expects_them(run):
    body = """
        simdgroup_matrix<float, 8, 8> m;
        simdgroup_load(m, a0, 8);
        ((device float2*)o)[thread_index_in_simdgroup] = m.thread_elements();
    """
    values = np.arange(64, dtype=np.float32)
    row, column = (LANE // 4 & 4) + LANE // 2 % 4, (LANE // 4 & 2) * 2 + LANE % 2 * 2
    output = run(body, [values], (32, 2), mx.float32)
    np.testing.assert_array_equal(output, np.stack([row * 8 + column, row * 8 + column + 1], 1))


@pytest.mark.parametrize(
    "convert", ["T(h)", "bfloat(h)", "bfloat16_t(h)", "static_cast<T>(h)", "convert<T>(h)", "T(T2(h, h).y)"]
)
def test_half_converts_to_bfloat_where_that_is_asked_for(run, convert):
    header = "template <typename U> inline U convert(half h) { return U(h); }\n"
    body = f"using T2 = vec<T, 2>; uint i = thread_position_in_grid.x; half h = a0[i]; o[i] = {convert};"
    output = run(body, [HALVES], (64,), mx.float32, threads=64, header=header, template=[("T", mx.bfloat16)])
    np.testing.assert_array_equal(output, np.array(mx.array(HALVES).astype(mx.bfloat16).astype(mx.float32)))


def test_structures_with_methods_and_operators(run):
    header = """
        struct Pair {
          float a, b;
          Pair operator+(Pair o) const { return {a + o.a, b + o.b}; }
          thread Pair& operator+=(Pair o) thread { a += o.a; b += o.b; return *this; }
          float sum() const thread { return a + b; }
          static float twice(float x) { return 2 * x; }
        };
        struct Scaled {
          float v;
          Scaled() : v(0) {}
          explicit Scaled(float x) : v(x) {}
          float operator()(float y) const { return v * y; }
        };
        struct Nested {
          Pair pairs[2];
          Scaled scaled;
          float get(int i) const { return pairs[i].sum() + scaled(2); }
        };
        inline Pair make(float x) { return {x, x + 1}; }
        inline void set(thread Pair& p) { p.a = 1; }
        template <typename F> float apply(const thread F& f, float x) { return f(x); }
        inline float total(thread float (&values)[2]) { return values[0] + values[1]; }
    """
    body = """
        Pair p = make(1), q = make(2);
        p += q;
        Nested n;
        n.pairs[0] = p;
        n.pairs[1] = make(3) + q;
        n.scaled = Scaled(2);
        threadgroup Pair shared[1];
        shared[0] = p;
        Pair back = shared[0];
        set(back);
        float values[2] = {a0[0], a0[1]};
        o[0] = (p + q).sum() + make(3).sum() + Pair::twice(2) + n.get(1);
        o[1] = apply(n.scaled, 3) + Scaled(1)(2) + back.a + 10 * back.b;
        o[2] = total(values);
    """
    output = run(body, [X], (3,), mx.float32, threads=1, header=header)
    np.testing.assert_allclose(output, [13 + 7 + 4 + 16, 6 + 2 + 1 + 50, X[0] + X[1]], rtol=1e-6)

// Codes in the little-endian bit stream of a row (tq/engine/quantize/packing.py), and the values that they stand for.
//
// A run is what a lane reads at once: 16 codes in BITS half words, or 20 trits in a word (BITS 0).
//
// GPUs shift, convert and look up slowly, and do a mask or a multiply-add in one cycle: Apple's take 4 cycles for a
// shift or a conversion. So a code is not shifted: under the exponent of 2^23, the bits of a half word are an integer,
// and masking all but those of a code o bits up gives the float 2^23 + code * 2^o, exactly. One multiply-add makes this
// u = (2 code + 1) / 2^BITS - 1, exactly. The levels are an odd function of u in 0 to 6 instructions, or else a table.
// tq/metal/fit.py chooses.

// 1.5 * 2^23: adding and subtracting it rounds to an integer. It is added by fma, which no math mode takes apart.
constant constexpr float ROUND = 12582912.0f;

// FORM: the degree of a polynomial in u^2, to be multiplied by u. Or FROM_TABLE. Or QUARTIC + n: v + |v|^3 v with
// v = u n / 32, for 3 bits, and for 4 with an even n: one instruction less than degree 2.
constant constexpr int FROM_TABLE = 15;
constant constexpr int QUARTIC = 16;
constant constexpr int MOST_TERMS = 7;

// What codes stand for: the gain times that function of u; or a level of the table, with a gain of 1.
struct Levels {
    float gain;
    float terms[MOST_TERMS];
    // The bits of 2^23, from memory: where a compiler knows them, it sets them after the mask, once for each code,
    // instead of before, once for each half word.
    uint two_23;
    const threadgroup float* table;
};

// `levels` are those of tq/metal/fit.py: gain, terms and 2^23; or the table, which all threads of the threadgroup fill.
template <int FORM, typename L>
METAL_FUNC Levels read_levels(L levels, int count, threadgroup float* table, uint thread_index, uint threads) {
    Levels result;
    result.gain = FORM == FROM_TABLE ? 1.0f : levels[0];
#pragma unroll
    for (int i = 0; i < MOST_TERMS; ++i) {
        result.terms[i] = FORM == FROM_TABLE ? 0.0f : levels[1 + i];
    }
    result.two_23 = FORM == FROM_TABLE ? 0 : as_type<uint>(float(levels[1 + MOST_TERMS]));
    result.table = table;
    if (FORM == FROM_TABLE) {
        for (int i = int(thread_index); i < count; i += int(threads)) {
            table[i] = levels[i];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    return result;
}

// The level of u by the gain. A polynomial is u (y^n + a y^(n-2) + b y^(n-3) ...) with y = u^2 + terms[0]: n
// multiply-adds and a multiplication. Any has this form: a factor makes its highest coefficient 1, a shift of y makes
// the next one 0.
template <int FORM>
METAL_FUNC float level_of(float u, const thread Levels& levels) {
    if (FORM == 0) {
        return u;
    }
    if (FORM >= QUARTIC) {
        const float square = u * abs(u);
        return fma(square, abs(square), u);
    }
    const float y = fma(u, u, levels.terms[0]);
    float p = FORM == 1 ? y : fma(y, y, levels.terms[1]);
#pragma unroll
    for (int i = 2; i < FORM; ++i) {
        p = fma(p, y, levels.terms[i]);
    }
    return u * p;
}

template <int BITS>
METAL_FUNC uint code_at(const thread ushort* run, int i) {
    // Code i of a run: constant after unrolling.
    const int bit = i * BITS, half_word = bit / 16, offset = bit % 16;
    uint bits = uint(run[half_word]) >> offset;
    if (offset + BITS > 16) {
        bits |= uint(run[half_word + 1]) << (16 - offset);
    }
    return bits & ((1u << BITS) - 1u);
}

// A run in registers, as half words. The pointers are templates, because MLX passes arrays of fewer than 8 elements in
// `constant` memory.
template <int BITS>
struct Run {
    enum { LENGTH = 16 };
    ushort halves[BITS];
};

// 20 trits: 4 numbers of 5 balanced digits, that is trits less 1.
template <>
struct Run<0> {
    enum { LENGTH = 20 };
    float fives[4];
};

METAL_FUNC ushort half_word_at(const device uint32_t* row, uint first, uint i) {
    return ((const device ushort*)row + first)[i];
}

METAL_FUNC ushort half_word_at(const constant uint32_t* row, uint first, uint i) {
    return ((const constant ushort*)row + first)[i];
}

// The run that begins at half word BITS * run of the row at `row`. WHOLE: all runs lie in the row; else what lies
// beyond its `words` words is any bits.
template <bool WHOLE, int BITS, typename W>
METAL_FUNC void load_run(W row, uint run, uint words, thread Run<BITS>& result) {
    if (BITS % 2 == 0) {
        W at = row + run * (BITS / 2);
        const uint last = WHOLE ? BITS : words - 1 - run * (BITS / 2);
#pragma unroll
        for (uint i = 0; i < BITS / 2; ++i) {
            const ushort2 pair = as_type<ushort2>(uint(at[WHOLE ? i : min(i, last)]));
            result.halves[2 * i] = pair.x;
            result.halves[2 * i + 1] = pair.y;
        }
    } else {
        const uint last = WHOLE ? BITS : 2 * words - 1 - run * BITS;
#pragma unroll
        for (uint i = 0; i < BITS; ++i) {
            result.halves[i] = half_word_at(row, run * BITS, WHOLE ? i : min(i, last));
        }
    }
}

template <bool WHOLE, typename W>
METAL_FUNC void load_run(W row, uint run, uint words, thread Run<0>& result) {
    const uint word = row[run], upper_ten = word / 59049u;  // 3^10
    const uint tens[2] = {word - upper_ten * 59049u, upper_ten};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        // Less 2^23, and (3^10 - 1) / 2, which is 1 for every digit.
        const float balanced = as_type<float>(tens[i] | as_type<uint>(8388608.0f)) - 8418132.0f;
        const float upper = fma(balanced, 1.0f / 243.0f, ROUND) - ROUND;
        result.fives[2 * i] = fma(upper, -243.0f, balanced);
        result.fives[2 * i + 1] = upper;
    }
}

// The value of code i of a run by the gain. Polynomials are for less than 8 bits. After unrolling i is constant, and
// what neighbours share is computed once.
template <int FORM, int BITS>
METAL_FUNC float value_at(const thread Run<BITS>& run, int i, const thread Levels& levels) {
    if (FORM == FROM_TABLE) {
        return levels.table[code_at<BITS>(run.halves, i)];
    }
    // Half words are taken in pairs (h0, h1), (h1, h2) ... (hn, h0), and the low 23 bits of a pair. Codes that fit into
    // its upper half word are read there: nearer to bit 0, a float does not hold 2^23 and the half in the centre of u.
    const int bit = i * BITS, in_upper = bit % 16 <= 7 - BITS, offset = bit % 16 + 16 * in_upper;
    const int low = (bit / 16 + in_upper * (BITS - 1)) % BITS;
    const uint pair = as_type<uint>(ushort2(run.halves[low], run.halves[(low + 1) % BITS]));
    constexpr uint code = (1u << BITS) - 1u;
    const float shifted = as_type<float>((pair | levels.two_23) & (0x4B000000u | code << offset));
    const float length = FORM >= QUARTIC ? float(FORM - QUARTIC) / 32.0f : 1.0f;
    const float unit = 2.0f / float(1u << (offset + BITS));
    return level_of<FORM>(
        fma(shifted, unit * length, (1.0f / float(1 << BITS) - 1.0f - 8388608.0f * unit) * length), levels);
}

// round(p / 3^k): p without its k lowest balanced digits.
METAL_FUNC float rounded_digits(float p, int k) {
    const float power = k == 1 ? 3.0f : k == 2 ? 9.0f : k == 3 ? 27.0f : 81.0f;
    return k ? fma(p, 1.0f / power, ROUND) - ROUND : p;
}

// Digit k of a balanced number p is round(p / 3^k) - 3 round(p / 3^(k + 1)).
template <int FORM>
METAL_FUNC float value_at(const thread Run<0>& run, int i, const thread Levels& levels) {
    const int k = i % 5;
    const float p = run.fives[i / 5];
    const float rounded = rounded_digits(p, k);
    const float u = k == 4 ? rounded : fma(rounded_digits(p, k + 1), -3.0f, rounded);
    return FORM == FROM_TABLE ? levels.table[int(u) + 1] : u;
}

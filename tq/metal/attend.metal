// What the attention kernels share: where tokens are read from, and which of them a query sees.
//
// A vector is read 16 numbers (a run) at a time. Dimensions are multiples of 16, so that all runs are whole.
#include "codes.metal"

// Less than every score: of what a query does not see.
constant constexpr float HIDDEN = -3.402823466e38f;

// What `shape` holds (tq/metal/attend.py).
constant constexpr int SINK = 0, FIRST_PACKED = 1, PACKED = 2, RECENT = 3;        // tokens
constant constexpr int SINK_SPLITS = 4, PACKED_SPLITS = 5, SPLITS = 6;            // of each segment, and in all
constant constexpr int SPLIT_TOKENS = 7, HEADS = 8, KEY_HEADS = 9, QUERIES = 10, CAUSAL = 11;

// Packed vectors of one head. GROUP: numbers that share a scale, 0 for all of a vector.
//
// 8-bit codes are integers and 128; others are values of a codebook.
template <int BITS, int FORM, int GROUP>
struct PackedTokens {
    const device uint32_t* words;
    const device half* scales;
    uint words_per_token, groups;
    Levels levels;
};

// One run, to be multiplied with `token_scale`.
template <int BITS, int FORM, int GROUP>
METAL_FUNC void read_run(
    const thread PackedTokens<BITS, FORM, GROUP>& tokens, uint token, uint run, thread float* values) {
    Run<BITS> codes;
    load_run<true>(tokens.words + token * tokens.words_per_token, run, tokens.words_per_token, codes);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        if (BITS == 8) {
            // As value_at does it, but to the integer in the middle.
            const float unit = float(1 << i % 2 * 8);
            const uint mask = 0x4B000000u | 0xFFu << i % 2 * 8;
            const uint shifted = (uint(codes.halves[i / 2]) | tokens.levels.two_23) & mask;
            values[i] = fma(as_type<float>(shifted), 1.0f / unit, -(8388608.0f / unit + 128.0f));
        } else {
            values[i] = value_at<FORM>(codes, i, tokens.levels);
        }
    }
    if (GROUP) {
        const uint group = run * 16 / (GROUP ? GROUP : 1);
        const float scale = tokens.levels.gain * float(tokens.scales[token * tokens.groups + group]);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            values[i] *= scale;
        }
    }
}

template <int BITS, int FORM, int GROUP>
METAL_FUNC float token_scale(const thread PackedTokens<BITS, FORM, GROUP>& tokens, uint token) {
    return GROUP ? 1.0f : tokens.levels.gain * float(tokens.scales[token]);
}

// Vectors of one head as they are.
template <typename T>
struct PlainTokens {
    const device T* numbers;
    uint dim;
};

template <typename T>
METAL_FUNC void read_run(const thread PlainTokens<T>& tokens, uint token, uint run, thread float* values) {
    const device T* source = tokens.numbers + token * tokens.dim + run * 16;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        values[i] = float(source[i]);
    }
}

template <typename T>
METAL_FUNC float token_scale(const thread PlainTokens<T>&, uint) {
    return 1.0f;
}

// What becomes of the scores of one query row. MASK: 0 none, 1 bool (true: seen), 2 added.
template <int MASK, typename M>
struct Scoring {
    M mask;
    size_t row;       // of the mask: where that of the query row begins
    int column_step;  // in the mask; 0 if all tokens have the same
    int last;         // token that the row sees, counted over all segments
    float scale, softcap;
};

template <int MASK, typename M>
METAL_FUNC float score_of(const thread Scoring<MASK, M>& scoring, float product, int column) {
    float result = product * scoring.scale;
    if (scoring.softcap != 0.0f) {
        result = scoring.softcap * tanh(result / scoring.softcap);
    }
    bool seen = column <= scoring.last;
    if (MASK) {
        const size_t at = scoring.row + size_t(column * scoring.column_step);
        if (MASK == 1) {
            seen = seen && bool(scoring.mask[at]);
        } else {
            result += float(scoring.mask[at]);
        }
    }
    return seen ? result : HIDDEN;
}

// mask: (B, n_heads, L, tokens), any of which may be 1.
template <int MASK, typename M, typename I, typename S, typename F>
METAL_FUNC Scoring<MASK, M> scoring(M mask, I mask_shape, S shape, F factors, int batch, int head, int query) {
    Scoring<MASK, M> result;
    result.mask = mask;
    result.row = 0;
    result.column_step = 0;
    if (MASK) {
        result.row = mask_shape[0] > 1 ? batch : 0;
        result.row = result.row * mask_shape[1] + (mask_shape[1] > 1 ? head : 0);
        result.row = (result.row * mask_shape[2] + (mask_shape[2] > 1 ? query : 0)) * mask_shape[3];
        result.column_step = mask_shape[3] > 1;
    }
    const int tokens = shape[SINK] + shape[PACKED] + shape[RECENT];
    result.last = tokens - (shape[CAUSAL] ? shape[QUERIES] - query : 1);
    result.scale = factors[0];
    result.softcap = factors[1];
    return result;
}

// exp(score - largest), and 0 for what is hidden.
METAL_FUNC float weight_of(float score, float largest) {
    return score > HIDDEN ? exp(score - largest) : 0.0f;
}

// Tokens of one segment: 0 the sink, 1 packed, 2 recent.
struct Span {
    int segment, begin, end;  // in the segment's arrays
    int column;               // of the segment's token 0, counted over all segments
};

// The whole of a segment but what lies before token `start` of the sequence.
template <typename S>
METAL_FUNC Span segment_span(S shape, int segment, int start) {
    Span span;
    span.segment = segment;
    span.begin = segment == 1 ? shape[FIRST_PACKED] : 0;
    span.end = span.begin + shape[segment == 0 ? SINK : segment == 1 ? PACKED : RECENT];
    span.column = (segment > 0 ? shape[SINK] : 0) + (segment > 1 ? shape[PACKED] : 0) - span.begin;
    span.begin = max(span.begin, start - span.column);
    return span;
}

// Part number `split` of the tokens: splits do not cross segments.
template <typename S>
METAL_FUNC Span split_span(S shape, int split, int start) {
    const int after_sink = split - shape[SINK_SPLITS], after_packed = after_sink - shape[PACKED_SPLITS];
    const int segment = after_sink < 0 ? 0 : after_packed < 0 ? 1 : 2;
    Span span = segment_span(shape, segment, 0);
    span.begin += (segment == 0 ? split : segment == 1 ? after_sink : after_packed) * shape[SPLIT_TOKENS];
    span.end = min(span.end, span.begin + shape[SPLIT_TOKENS]);
    span.begin = max(span.begin, start - span.column);
    return span;
}

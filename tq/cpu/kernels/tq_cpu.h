// The C interface of tq's CPU kernels: structures that Python fills (tq/cpu/library.py mirrors them) and functions.
//
// Every operation has one signature, so that the lazy MLX primitive (extension.cpp) and the eager path (ctypes) call
// all of them alike: parameters, input arrays, output arrays. Arguments were checked before; a kernel cannot fail.
#pragma once
#include <stdint.h>

#define TQ_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum tq_dtype { TQ_F32 = 0, TQ_F16 = 1, TQ_U32 = 2, TQ_I32 = 3, TQ_U8 = 4, TQ_BOOL = 5 };

// Sizes and strides are in elements. Arrays are row-contiguous unless an operation says that it reads strides.
typedef struct {
  void *data;
  const int32_t *shape;
  const int64_t *strides;
  int32_t ndim;
  int32_t dtype;
} tq_array;

typedef void (*tq_operation)(const void *params, const tq_array *in, const tq_array *out);

// A packed matrix, or `experts` of them one after another. Codes are in blocks of 16 rows by 64 columns (layout.h).
typedef struct {
  const uint8_t *codes;
  const uint16_t *scales;    // float16 [experts][tiles][groups][16], tiles = ceil(rows / 16)
  const uint16_t *biases;    // float16, like scales: value = scale * table_scale * code + bias (affine), else NULL
  const uint8_t *table;      // [256] byte of each code: value = table_scale * (byte - offset)
  const uint8_t *table_low;  // [256] or NULL: value = table_scale * (byte - offset + (low - 128) / 256), 7 and 8 bits
  const float *values;       // [2^bits] the codebook itself, for exact arithmetic and rows; affine: the codes
  const float *bias;         // float32 [experts][rows] added to the product, or NULL
  float table_scale;
  int32_t offset;            // 128 for codebooks; 0 for affine codes, whose bytes are the codes
  int32_t rows, columns;
  int32_t experts;
  int32_t bits;              // of a code in memory, 1 to 8 (ternary: 2)
  int32_t group;             // columns that share a scale: 32, 64, 128, or 0 for one scale per row
} tq_matrix;

// y = H (signs * x) in blocks of `block` = m * 2^k; n == 0: no rotation.
typedef struct {
  const float *signs;   // [n]
  const float *factor;  // [m][m] orthonormal, row-major, H_m itself, or NULL if m == 1
  int32_t n, block, m;
} tq_rotation;

// in: x f32 (..., columns), already rotated. out: y f32 (..., rows).
typedef struct {
  tq_matrix matrix;
  int32_t exact;  // 1: float32 activations and codebook
} tq_matmul_params;
TQ_API void tq_matmul(const void *params, const tq_array *in, const tq_array *out);

// in: x f32 (X, columns) rotated, expert u32 (R), X divides R. out: y f32 (R, rows); row r reads x[r / (R / X)]. X and R
// may be several axes.
typedef struct {
  tq_matrix matrix;
  int32_t exact;
} tq_gather_params;
TQ_API void tq_gather_matmul(const void *params, const tq_array *in, const tq_array *out);

// A gated feed-forward layer of experts: down(act(gate(x)) * up(x)).
// in: x f32 (T, columns) NOT rotated, expert u32 (T, k), optionally weight f32 (T, k).
// out: y f32 (T, k, rows of down), or, with weights, their sum (T, rows of down).
enum tq_activation { TQ_SILU = 0, TQ_GELU_TANH = 1, TQ_GELU = 2, TQ_RELU = 3, TQ_RELU2 = 4, TQ_SWIGLU_OAI = 5 };
typedef struct {
  tq_matrix gate, up, down;
  tq_rotation in_rotation, hidden_rotation;
  int32_t activation;
  float alpha, limit;  // SWIGLU_OAI: gate * sigmoid(alpha * gate) * (up + 1), both clamped to limit
  int32_t exact;
} tq_experts_params;
TQ_API void tq_experts(const void *params, const tq_array *in, const tq_array *out);

// in: ids i32 (...). out: rows f32 (..., columns), back in the original basis if rotation.n > 0.
typedef struct {
  tq_matrix matrix;
  tq_rotation rotation;
} tq_embed_params;
TQ_API void tq_embed(const void *params, const tq_array *in, const tq_array *out);

// in: x f32 (..., n). out: f32 (..., n).
typedef struct {
  tq_rotation rotation;
  int32_t inverse;
} tq_rotate_params;
TQ_API void tq_rotate(const void *params, const tq_array *in, const tq_array *out);

// --- attention -----------------------------------------------------------------------------------------------------

// Consecutive tokens of one cache, all kv heads. Floating point: rows, head h of batch b at b * batch_stride +
// h * head_stride (elements). Packed: blocks of 64 tokens, codes in the rotated basis, and float16 scales (kv_layout.h).
// Several segments may be parts of the same buffers (a ring).
enum tq_kv_format { TQ_KV_F32 = 0, TQ_KV_F16 = 1, TQ_KV_PACKED = 2 };
typedef struct {
  void *keys, *values;
  uint16_t *key_scales, *value_scales;      // packed: [batch][kv head][capacity / 64][planes][64]
  int32_t *key_order, *value_order;         // packed and ordered: [batch][kv head][dim]
  int64_t key_head_stride, value_head_stride, key_batch_stride, value_batch_stride;  // elements, or bytes if packed
  int64_t key_row_stride, value_row_stride;  // elements from token to token; 0: head_dim and value_dim
  int32_t format;
  int32_t capacity;                         // tokens per head that fit
  int32_t count;                            // tokens that are there
  int32_t position;                         // position in the sequence of the first one
  int32_t first;                            // row of the first one in the buffers
} tq_segment;

// Numbers of a key or value that are rotated and coded together. A group of them shares a float16 scale.
typedef struct {
  int32_t dim, bits;
  int32_t group;            // 32, 64 or 128, which divides dim; 0: all
  int32_t affine;           // 1: value = minimum + scale * code, the float16 minimum of a group beside its scale.
                            // 0: scale * (code - 128) at 8 bits, else scale * values[code]
  const uint8_t *table;     // [256], as in tq_matrix, offset 128; not read at 8 bits
  const float *values;      // [2^bits]; affine: code - 2^(bits - 1)
  float table_scale;
  tq_rotation rotation;     // of dim numbers
} tq_kv_part;

// How keys or values of packed segments are coded: as one part or as two.
typedef struct {
  tq_kv_part parts[2];
  int32_t n_parts;
  int32_t ordered;          // 1: each kv head has an order of its numbers, in which the parts follow each other: that of
                            // their energy in the first tokens that are packed, the largest first
} tq_kv_side;

typedef struct {
  tq_kv_side keys, values;
} tq_kv_code;

typedef struct {
  int32_t n_heads, n_kv_heads, head_dim, value_dim;
  float scale, softcap;                     // softcap 0: none
  int32_t causal;                           // 1: query i sees positions <= its own
  int32_t window;                           // > 0: and only the last `window` positions up to its own
  int32_t position;                         // of the first query
  const float *sinks;                       // [n_heads] logits that only take weight, or NULL
  int32_t n_segments;
  tq_segment segments[4];                   // in any order
  tq_kv_code code;
  int32_t exact;
  int32_t mask;                             // tq_attend: 1: the last input is a mask
  int32_t pack_from;                        // tq_kv_append: position of the first token that it packs
  int32_t n_sequences;                      // 0: these parameters are for all sequences of the batch. Otherwise as many
                                            // such structures follow each other, with caches of one sequence each
  int32_t new_first, new_count;             // tq_kv_append, n_sequences > 0: those of the T tokens that are this sequence's
} tq_attend_params;

// in: q f32 (B, n_heads, L, head_dim), then the cache, or those of all sequences, then the mask if there is one. All are
// read by strides, with the last axis contiguous. out: f32 (B, n_heads, L, value_dim).
// The cache, if n_segments is 0: keys and values f32 or f16 (B, n_kv_heads, S, ...), all S of them, at positions from 0.
// Otherwise, for each segment: keys and values (B, n_kv_heads, capacity, ...), or, packed, u8 keys (B, n_kv_heads,
// capacity / 64, bytes of a block), f16 key scales (B, n_kv_heads, capacity * planes), i32 key order (B, n_kv_heads,
// head_dim) if there is one, and values alike; the pointers, strides and capacity of params.segments are not read then.
// Mask: bool or f32 additive, (B or 1, n_heads or 1, L, S); its column for a token is the token's position.
TQ_API void tq_attend(const void *params, const tq_array *in, const tq_array *out);

// T new tokens, at positions from params.position on. in: keys f32 (B, n_kv_heads, T, head_dim) and values. out: the
// cache as above (n_segments > 0), each array what it was, written to in place. The segments of params describe the
// cache as it is afterwards, so the same params serve for the attention that follows:
//   - a floating-point segment stores those of the new tokens that lie in [position, position + count);
//   - blocks of packed segments from position pack_from on are encoded. Tokens of theirs that are not new are taken from
//     the floating-point segment `recent`, the last one, whose rows before this call begin with position pack_from (the
//     first token that was not packed); what stays in it is moved to its new rows. Packed segments begin with a block.
// A cache without packed segments may be a ring: two segments over one buffer. pack_from is not read then.
TQ_API void tq_kv_append(const void *params, const tq_array *in, const tq_array *out);

// All tokens as floats, in the original basis. in: the cache, or those of all sequences, as above.
// out: keys f32 (B, n_kv_heads, S, head_dim), values; a token's row is its position, and other rows are 0.
TQ_API void tq_kv_unpack(const void *params, const tq_array *in, const tq_array *out);

// Bytes of 64 tokens of a kv head: of their keys, or of their values.
TQ_API int64_t tq_kv_block_bytes(int32_t dim, int32_t bits, int32_t values);

// --- encoding ------------------------------------------------------------------------------------------------------

// The nearest level of a codebook, as tq/engine/quantize/nearest.py holds it: levels ascend and are antisymmetric.
typedef struct {
  const float *levels;         // [n_levels]
  const float *boundaries;     // [n_levels - 1] half-way between them
  const uint8_t *below;        // [n_cells] the code below the one boundary that a cell may hold
  const float *level_of_cell;  // [n_cells]
  float cells_per_unit, offset;
  int32_t n_levels, n_cells;
} tq_nearest;

// Scales are tried from lowest to highest, in RMS of the group; to_largest: or up to where its largest value is the
// highest level.
typedef struct {
  tq_nearest nearest;
  float lowest, highest;
  int32_t to_largest, n_starts;
  int32_t size;                // of a group
  int64_t n_groups;
} tq_scale_search;
// groups f32 [n_groups][size] -> scales f32 [n_groups], exact in float16, and codes u8 [n_groups][size].
TQ_API void tq_best_scales(const void *params, const float *groups, float *scales, uint8_t *codes);

// --- sampling ------------------------------------------------------------------------------------------------------

// in: logits f32 (1, vocabulary), uniform f32 (1) in [0, 1). out: token u32 (1), its log-probability f32 (1) at
// temperature 1 and before any filter. Filters as in mlx-lm: top_p (1: off), then min_p (0: off), then top_k (0: off).
typedef struct {
  float temperature;  // 0: the most likely token
  float top_p, min_p;
  int32_t top_k;
} tq_sample_params;
TQ_API void tq_sample(const void *params, const tq_array *in, const tq_array *out);

// --- memory order --------------------------------------------------------------------------------------------------

// Bytes of the codes of one matrix, and the change from the stored bit stream (DESIGN: code i of a row is bits
// [i*b, (i+1)*b) of its little-endian words; trits: 20 per word, base 3, low first) to blocks. Threads: the pool.
TQ_API int64_t tq_codes_bytes(int32_t rows, int32_t columns, int32_t bits);
TQ_API void tq_pack(const uint32_t *weight, int64_t words_per_row, int32_t rows, int32_t columns, int32_t bits,
             int32_t trits, uint8_t *codes);

// --- the process ---------------------------------------------------------------------------------------------------

TQ_API void tq_set_threads(int32_t n);             // starts or replaces the pool
TQ_API int32_t tq_get_threads(void);
TQ_API const char *tq_isa(void);                   // the instruction set this library was built for
TQ_API const char *tq_self_check(void);            // once, before all else: NULL, or why this process cannot use it
TQ_API double tq_read_bandwidth(int64_t bytes);    // bytes per second, best of several reads of that much memory
TQ_API int32_t tq_struct_size(const char *name);   // sizeof, for Python to compare with its own; -1 for an unknown name

#ifdef __cplusplus
}
#endif

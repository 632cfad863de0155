// The C interface of a decoder layer as one operation: what Python fills (tq/engine/model/native_layers.py) and calls.
//
//   h = x + residual * after_attention(attention(before_attention(x)))
//   y = h + residual * after_feed_forward(down(act(gate(n)) * up(n))),  n = before_feed_forward(h)
// A norm without a weight is left out. With a router the second half is a mixture of experts.
#pragma once
#include "tq_cpu.h"

#ifdef __cplusplus
extern "C" {
#endif

// y = weight * x / sqrt(mean(x^2) + eps).
typedef struct {
  const float *weight;
  float eps;
} tq_norm;

// A matrix and the rotation of what it reads. Neighbours that read the same rotation point to the same signs: they are
// then given one rotated activation.
typedef struct {
  tq_matrix matrix;
  tq_rotation rotation;
} tq_projection;

// Pairs of features turn by angle[i] = position_scale * position * frequencies[i], i < dims / 2: features 2i and 2i + 1
// if interleaved, else i and i + dims / 2. The first `dims` features are multiplied by `multiplier`, the rest is kept.
typedef struct {
  const float *frequencies;  // NULL: no rotary embedding
  int32_t dims;
  int32_t interleaved;
  float position_scale, multiplier;
} tq_rope;

// Which experts a token goes to: the k with the largest score + correction; their scores are their weights.
typedef struct {
  const float *weight;         // [experts][hidden], or NULL if `packed` has rows
  tq_projection packed;
  const float *bias;           // [experts] of the logits that `weight` gives, or NULL
  const float *correction;     // [experts], or NULL
  int32_t experts, k;          // experts 0: none
  int32_t groups, kept_groups; // of equal size; of all others than the kept, the best by their two best, it is 0
  int32_t sigmoid;             // 1: a score is the sigmoid of a logit; 0: their softmax
  int32_t normalize;           // 1: weights are divided by their sum
  float factor;                // and multiplied by this
} tq_router;

typedef struct {
  int32_t hidden;
  int32_t bare;                          // 1: y is the branch alone, without `x + residual *`
  float residual;

  tq_norm before_attention, after_attention;
  tq_projection query, key, value, out;  // key and value without rows: query holds the rows of all three
  int32_t gated;                         // 1: each head of query is followed by head_dim gates: o is times sigmoid(gate)
  tq_norm query_norm, key_norm;
  int32_t norm_whole;                    // 1: query_norm and key_norm take all heads as one vector; 0: each head
  int32_t norm_after_rope;
  tq_rope rope;
  int32_t n_heads, n_kv_heads, head_dim, value_dim;
  float scale, softcap;                  // of attention, as in tq_attend_params
  const float *sinks;

  tq_norm before_feed_forward, after_feed_forward;
  tq_projection gate, up, down;          // up without rows: gate holds the rows of both, gate first
  int32_t activation;                    // tq_activation, not SWIGLU_OAI
  tq_router router;
  tq_experts_params experts;             // with a router: in place of the network above, or with it as one more expert
  const float *shared_gate;              // [hidden]: that one is times sigmoid(shared_gate . n); NULL: as it is
} tq_layer;

// A layer with experts that something else computes has the second half in two parts. TQ_LAYER_CHOOSE, alone: in: x.
// out: f32 (tokens, hidden), which experts read; u32 (tokens, k), the experts; f32 (tokens, k), their weights.
// TQ_LAYER_COMBINE, alone: in: x; f32 (tokens, k, hidden), what the experts say; their weights. out: y.
enum tq_layer_parts {
  TQ_LAYER_ATTENTION = 1,
  TQ_LAYER_FEED_FORWARD = 2,
  TQ_LAYER_CHOOSE = 4,
  TQ_LAYER_COMBINE = 8,
};

// in: x f32 (..., hidden), all its rows tokens of one sequence. With a mask: bool or additive f32 that broadcasts to
// (n_heads, tokens, rows). With query factors: f32, one per token.
// out: y like x. With a cache: its keys and values, f16 or f32 (1, n_kv_heads, capacity, head_dim or value_dim), of
// equal type, which hold the earlier tokens and get the new ones; or the arrays of a packed cache.
typedef struct {
  const tq_layer *layer;
  int32_t parts;              // of tq_layer_parts; both halves are residual blocks of their own
  int32_t causal;             // 1: token i sees the rows up to row + i; 0: all
  int32_t has_cache, has_mask, has_query_factors;
  int32_t exact;
  // A packed cache (has_cache 1, causal 1, no mask), else NULL. It keeps its first `sink` tokens and at least the last
  // `window` ones in float16; between them, whole blocks are packed as they fill, `packed` tokens before this call.
  // out[1..]: keys and values of the sink, then of the packed tokens, then of the recent ones, window + 64 rows, as
  // tq_kv_append takes them. `row` is then the position of the first token among those that are kept. limit > 0: one token
  // is given, which sees the sink and the newest of the others, so many in all.
  const tq_kv_code *code;
  int32_t sink, window, limit;
  // 1: no block fills and nothing goes to the sink in this call: sink and packed arrays are read only, and are inputs
  // behind x; out[1] and out[2] are the recent keys and values.
  int32_t resting;
  // What differs from token to token.
  int32_t position;           // of the first token, for the rotary embedding
  int32_t row;                // of the cache where the first token goes, the others after it
  int32_t rows;               // of the cache that hold tokens once these are there
  int32_t packed;
} tq_layer_params;
TQ_API void tq_layer_forward(const void *params, const tq_array *in, const tq_array *out);

#ifdef __cplusplus
}
#endif

// Attention of a block of query rows over tokens whose keys and values are rows of floats.
#pragma once
#include "attention_rows.h"

namespace tq {

// Consecutive tokens of one kv head. T is float or uint16_t (float16).
template <class T>
struct FloatTokens {
  const T *keys, *values;
  int64_t key_row, value_row;  // elements from token to token
  int count, position;
};

template <class T>
void attend_floats(Rows &rows, const FloatTokens<T> &tokens);

// Tokens as float32, for a walk of many rows.
constexpr int PANEL_TOKENS = 128;
struct Panels {
  float *rows;    // keys [PANEL_TOKENS][head_width]
  float *keys;    // the same, transposed
  float *values;  // [PANEL_TOKENS][value_width]
};
Panels scratch_panels(const Rows &rows);                   // of this thread, zeros
void transpose(const float *x, int width, float *y);       // (PANEL_TOKENS, width) to (width, PANEL_TOKENS)
// Only panels.keys and values are read. The first n tokens are there, `hidden` of which nobody sees.
void attend_panels(Rows &rows, const float *queries, const Panels &panels, int n, int position, int hidden,
                   float *sums);

}  // namespace tq

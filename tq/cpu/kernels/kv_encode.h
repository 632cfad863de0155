// From float vectors of keys and values to the codes of a packed cache.
#pragma once
#include <array>

#include "internal.h"

namespace tq {

// Codes of vectors that have one scale each. 8 bits: x = scale * (code - 128). Fewer: x = scale * levels[code].
class VectorCoder {
 public:
  VectorCoder(int bits, const float *levels);

  // Writes n codes and returns the scale, a float16: NaN if x has a NaN or an infinity.
  uint16_t encode(const float *x, int n, uint8_t *codes) const;

 private:
  float search(const float *x, int n, float largest) const;
  void gain(const float *x, int n, float inverse, float &xq, float &qq) const;

  int bits_, half_ = 0;                        // half_: positive levels, the others are their mirror image
  std::array<float, 64> levels_{}, borders_{};  // positive ones; borders_[i] lies between levels i and i + 1
};

// Codes [BLOCK_TOKENS][row] of a block of keys, or of values, to their places in memory (kv_layout.h). Rows are padded
// with zeros to whole blocks, or tiles.
void pack_keys(const uint8_t *codes, int64_t row, int head_dim, int bits, uint8_t *block);
void pack_values(const uint8_t *codes, int64_t row, int value_dim, int bits, uint8_t *block);

}  // namespace tq

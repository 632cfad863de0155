// From float vectors of keys and values to the codes of a packed cache.
#pragma once
#include <array>

#include "internal.h"

namespace tq {

// Codes of one part of a vector, in the basis of the codes.
class VectorCoder {
 public:
  explicit VectorCoder(const tq_kv_part &part);

  // Writes a code for each number, and what planes of a block hold of it, `stride` apart: the scale of each group, then,
  // of an affine part, the minimum of each. A scale is NaN if the group has a NaN or an infinity.
  void encode(const float *x, uint8_t *codes, uint16_t *scales, int64_t stride) const;

 private:
  uint16_t encode_levels(const float *x, int n, uint8_t *codes) const;
  uint16_t encode_affine(const float *x, int n, uint8_t *codes, uint16_t &least) const;
  float search(const float *x, int n, float largest) const;
  void gain(const float *x, int n, float inverse, float &xq, float &qq) const;

  int dim_, group_, bits_, half_ = 0;           // half_: positive levels, the others are their mirror image
  bool affine_;
  std::array<float, 64> levels_{}, borders_{};  // positive ones; borders_[i] lies between levels i and i + 1
};

// Codes [BLOCK_TOKENS][row] of a block of keys, or of values, to their places in memory (kv_layout.h). Rows are padded
// with zeros to whole blocks, or tiles.
void pack_keys(const uint8_t *codes, int64_t row, int head_dim, int bits, uint8_t *block);
void pack_values(const uint8_t *codes, int64_t row, int value_dim, int bits, uint8_t *block);

}  // namespace tq

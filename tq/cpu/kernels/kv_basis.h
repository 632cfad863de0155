// Vectors of keys and values in the basis of their codes: ordered, cut into parts, each rotated, in whole tiles.
#pragma once
#include <algorithm>

#include "internal.h"
#include "kv_layout.h"

namespace tq {

// x (dim) to y (code_width); y is not x. `order` is not read if the side has none.
inline void to_code_basis(const tq_kv_side &side, const int32_t *order, const float *x, float *y) {
  int from = 0;
  for (int i = 0; i < side.n_parts; i++) {
    const tq_kv_part &part = side.parts[i];
    if (side.ordered) {
      for (int d = 0; d < part.dim; d++) y[d] = x[order[from + d]];
    } else {
      std::copy_n(x + from, part.dim, y);
    }
    if (part.rotation.n > 0) rotate_row(part.rotation, y, y);
    const int width = round_up(part.dim, TILE_ROWS);
    std::fill(y + part.dim, y + width, 0.f);
    from += part.dim, y += width;
  }
}

// The inverse; y is changed.
inline void from_code_basis(const tq_kv_side &side, const int32_t *order, float *y, float *x) {
  int from = 0;
  for (int i = 0; i < side.n_parts; i++) {
    const tq_kv_part &part = side.parts[i];
    if (part.rotation.n > 0) unrotate_row(part.rotation, y, y);
    if (side.ordered) {
      for (int d = 0; d < part.dim; d++) x[order[from + d]] = y[d];
    } else {
      std::copy_n(y, part.dim, x + from);
    }
    from += part.dim, y += round_up(part.dim, TILE_ROWS);
  }
}

}  // namespace tq

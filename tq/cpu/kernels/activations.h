// Rows of activations as int8 codes with one scale per 64 columns, in the order in which products read them.
#pragma once
#include <stdint.h>

#include "internal.h"
#include "simd.h"

namespace tq {

// Rows come in groups of `width` = 1, 2, 4 or 8, side by side: codes [block][row][64], scales [block][row], and sums
// [block][2][row] of the codes of a block and of its second half. x = scale * code.
struct RowGroup {
  int8_t *codes;
  float *scales;
  int32_t *sums;
  int width;
};

// The memory of all groups: full ones of MAX_ROWS, then one of the smallest width that holds the rest.
class Activations {
 public:
  // The slot ACTIVATIONS of this thread.
  Activations(int padded_rows, int columns);

  // The group that starts at padded row `first`.
  RowGroup group(int first, int width) const;

  static int width(int rows);   // of the group that holds the next of `rows` rows
  static int padded(int rows);  // rows, with those that fill up the last group

 private:
  int8_t *codes_;
  float *scales_;
  int32_t *sums_;
  int blocks_;
};

// One row x (columns) as row `row` of its group, or zeros if x is NULL. A NaN or an infinity makes the scale of its
// block NaN; a block too small for 127 / max to be finite becomes 0.
void quantize_row(const float *x, int columns, const RowGroup &group, int row);

// Calls f.operator()<width>() for the width of a group.
template <class F>
void with_width(int width, F &&f) {
  switch (width) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 4: return f.template operator()<4>();
    default: return f.template operator()<MAX_ROWS>();
  }
}

}  // namespace tq

// From the stored bit stream, or trits, to blocks of layout.h. 16 rows side by side, one in each 32-bit lane.
#include <string.h>

#include <algorithm>

#include "internal.h"

namespace tq {
namespace {

using Lanes = uint32_t[TILE_ROWS];
using Steps = Lanes[STEPS];  // byte c of lane r in step s: the code of row r, column 4 s + c

constexpr int TRITS_PER_WORD = 20;
constexpr uint32_t EACH_BYTE = 0x01010101;

// The rows of a tile; past their ends there are zeros.
struct Words {
  const uint32_t *first;
  int64_t per_row;
  int rows;

  // `count` words from `word` on: lanes[w][r]. Each row in one go, as rows may lie a power of two apart.
  void get(int64_t word, int count, Lanes *lanes) const {
    const int available = int(std::clamp(per_row - word, int64_t(0), int64_t(count)));
    uint32_t read[TILE_ROWS][2 * 8] = {};
    for (int r = 0; r < rows; r++) memcpy(read[r], first + r * per_row + word, available * sizeof(uint32_t));
    for (int w = 0; w < count; w++) {
      for (int r = 0; r < TILE_ROWS; r++) lanes[w][r] = read[r][w];
    }
  }
};

// One block. A step's 4 codes are a window of 4 * bits bits, cut in half and moved apart twice.
void unpack_bits(const Words &words, int64_t block, int bits, Steps &steps) {
  const uint32_t window = bits == 8 ? ~0u : (1u << 4 * bits) - 1, pair = (1u << 2 * bits) - 1;
  const uint32_t code = ((1u << bits) - 1) * 0x00010001;
  Lanes lanes[2 * 8 + 1];
  words.get(block * 2 * bits, 2 * bits, lanes);
  for (int s = 0; s < STEPS; s++) {
    const int word = 4 * bits * s / 32, shift = 4 * bits * s % 32;
    const int rest = shift + 4 * bits > 32 ? word + 1 : word;
    const int rest_shift = rest == word ? 0 : 32 - shift;
#pragma omp simd
    for (int r = 0; r < TILE_ROWS; r++) {
      uint32_t x = lanes[word][r] >> shift;
      if (rest != word) x |= lanes[rest][r] << rest_shift;
      x &= window;
      x = (x & pair) | (x & ~pair) << (16 - 2 * bits);
      steps[s][r] = (x & code) | (x & ~code) << (8 - bits);
    }
  }
}

// One block after another, 5 of them from 16 words: 64 columns do not end with a word of 20 digits.
class TritReader {
 public:
  explicit TritReader(const Words &words) : words_(words) {}

  void next(Steps &steps) {
    if (column_ % COLUMNS == 0) read();
    const auto *digits = digits_ + column_ % COLUMNS;
    for (int s = 0; s < STEPS; s++, digits += 4) {
#pragma omp simd
      for (int r = 0; r < TILE_ROWS; r++) {
        steps[s][r] = digits[0][r] | digits[1][r] << 8 | digits[2][r] << 16 | digits[3][r] << 24;
      }
    }
    column_ += BLOCK_COLUMNS;
  }

 private:
  void read() {
    Lanes words[WORDS];
    words_.get(column_ / TRITS_PER_WORD, WORDS, words);
    for (int digit = 0; digit < TRITS_PER_WORD; digit++) {
      for (int w = 0; w < WORDS; w++) {
#pragma omp simd
        for (int r = 0; r < TILE_ROWS; r++) {
          const uint32_t quotient = words[w][r] / 3;
          digits_[w * TRITS_PER_WORD + digit][r] = uint8_t(words[w][r] - 3 * quotient);
          words[w][r] = quotient;
        }
      }
    }
  }

  static constexpr int WORDS = 16, COLUMNS = WORDS * TRITS_PER_WORD;
  const Words words_;
  uint8_t digits_[COLUMNS][TILE_ROWS];
  int64_t column_ = 0;
};

// `width` bits of each code, from bit `low` on: 8 / width steps share a vector. Returns the end of the plane.
uint8_t *write_plane(const Steps &steps, int low, int width, uint8_t *out) {
  const int shared = 8 / width;
  const uint32_t mask = EACH_BYTE * ((1u << width) - 1);
  for (int v = 0; v < 2 * width; v++, out += LANES) {
    Lanes lanes = {};
    for (int k = 0; k < shared; k++) {
#pragma omp simd
      for (int r = 0; r < TILE_ROWS; r++) lanes[r] |= (steps[v * shared + k][r] >> low & mask) << width * k;
    }
    memcpy(out, lanes, sizeof lanes);
  }
  return out;
}

void write_3_bits(const Steps &steps, uint8_t *out) {
  for (int s = 0; s < STEPS; s += 8) {
    for (int v = 0; v < 3; v++, out += LANES) {
      Lanes lanes;
#pragma omp simd
      for (int r = 0; r < TILE_ROWS; r++) {
        const uint32_t top = steps[s + 6][r] | steps[s + 7][r] << 3;
        lanes[r] = steps[s + 2 * v][r] | steps[s + 2 * v + 1][r] << 3 | (top >> 2 * v & 3 * EACH_BYTE) << 6;
      }
      memcpy(out, lanes, sizeof lanes);
    }
  }
}

void clear_columns(Steps &steps, int first) {
  for (int column = first; column < BLOCK_COLUMNS; column++) {
    for (int r = 0; r < TILE_ROWS; r++) steps[column / 4][r] &= ~(0xffu << 8 * (column % 4));
  }
}

}  // namespace

void pack_block(const Steps &steps, int bits, uint8_t *out) {
  if (bits == 3) return write_3_bits(steps, out);
  for (int width = 8, low = 0; width > 0; width /= 2) {
    if (!(bits & width)) continue;
    out = write_plane(steps, low, width, out);
    low += width;
  }
}

}  // namespace tq

int64_t tq_codes_bytes(int32_t rows, int32_t columns, int32_t bits) {
  return tq::tiles(rows) * tq::tile_bytes(columns, bits);
}

void tq_pack(const uint32_t *weight, int64_t words_per_row, int32_t rows, int32_t columns, int32_t bits, int32_t trits,
             uint8_t *codes) {
  using namespace tq;
  parallel([&](int i, int n) {
    const Share share(tiles(rows), i, n);
    for (int64_t tile = share.first; tile < share.last; tile++) {
      const int64_t row = tile * TILE_ROWS;
      const Words words{weight + row * words_per_row, words_per_row, int(std::min<int64_t>(TILE_ROWS, rows - row))};
      TritReader reader(words);
      uint8_t *out = codes + tile * tile_bytes(columns, bits);
      for (int block = 0; block < blocks(columns); block++, out += block_bytes(bits)) {
        alignas(64) Steps steps;
        trits ? reader.next(steps) : unpack_bits(words, block, bits, steps);
        if (columns - block * BLOCK_COLUMNS < BLOCK_COLUMNS) clear_columns(steps, columns - block * BLOCK_COLUMNS);
        pack_block(steps, bits, out);
      }
    }
  });
}

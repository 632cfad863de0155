// The tile registers of AMX in plain C++, in the place of the compiler's intrinsics: for processors that have none. What
// a tile unit would not do ends the program. EMULATED_TILES=denied or wrong: a system that does not grant them, or a
// processor with a fault.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace emulated_tiles {

constexpr int TILES = 8, MOST_ROWS = 16, MOST_BYTES = 64;

struct Tile {
  int rows, row_bytes;
  uint8_t data[MOST_ROWS][MOST_BYTES];
};

inline thread_local bool configured = false;
inline thread_local Tile tiles[TILES];
inline bool granted = false;

inline bool are(const char *how) {
  const char *set = getenv("EMULATED_TILES");
  return set && strcmp(set, how) == 0;
}

inline void require(bool condition) {
  if (!condition) abort();
}

// Of 64 bytes: a palette, a start row, 14 zeros, the bytes of a row of each of 16 tiles, and the rows of each.
inline void configure(const void *shapes) {
  require(granted);
  const uint8_t *bytes = static_cast<const uint8_t *>(shapes);
  require(bytes[0] == 1 && bytes[1] == 0);
  for (int i = 2; i < 16; i++) require(bytes[i] == 0);
  for (int t = 0; t < 2 * TILES; t++) {
    uint16_t row_bytes;
    memcpy(&row_bytes, bytes + 16 + 2 * t, 2);
    const uint8_t rows = bytes[48 + t];
    require(row_bytes <= MOST_BYTES && rows <= MOST_ROWS && !row_bytes == !rows);
    require(t < TILES || rows == 0);
    if (t < TILES) tiles[t] = {rows, row_bytes, {}};
  }
  configured = true;
}

inline void release() {
  memset(tiles, 0, sizeof tiles);
  configured = false;
}

inline Tile &tile(int t) {
  require(configured && t < TILES && tiles[t].rows > 0);
  return tiles[t];
}

inline void zero(int t) { memset(tile(t).data, 0, sizeof tile(t).data); }

inline void load(int t, const void *from, int64_t stride) {
  Tile &to = tile(t);
  memset(to.data, 0, sizeof to.data);
  for (int r = 0; r < to.rows; r++) memcpy(to.data[r], static_cast<const char *>(from) + r * stride, to.row_bytes);
}

inline void store(int t, void *to, int64_t stride) {
  const Tile &from = tile(t);
  for (int r = 0; r < from.rows; r++) memcpy(static_cast<char *>(to) + r * stride, from.data[r], from.row_bytes);
}

// sum[m][n] += the sum of a[m][4 k + j] * b[k][4 n + j] over k and j < 4; a is signed, b is not.
inline void multiply(int sum, int a, int b) {
  Tile &to = tile(sum);
  const Tile &left = tile(a), &right = tile(b);
  require(to.rows == left.rows && left.row_bytes == 4 * right.rows && right.row_bytes == to.row_bytes);
  require(sum != a && sum != b && a != b);
  const bool fault = are("wrong");
  for (int m = 0; m < to.rows; m++) {
    for (int n = 0; n < to.row_bytes / 4; n++) {
      int32_t total;
      memcpy(&total, to.data[m] + 4 * n, 4);
      for (int k = 0; k < right.rows; k++) {
        for (int j = 0; j < 4; j++) total += int8_t(left.data[m][4 * k + j]) * right.data[k][4 * n + j];
      }
      total += fault && m == 3;
      memcpy(to.data[m] + 4 * n, &total, 4);
    }
  }
}

}  // namespace emulated_tiles

namespace tq {

inline bool request_tiles() { return emulated_tiles::granted = !emulated_tiles::are("denied"); }

}  // namespace tq

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#define _tile_loadconfig(shapes) emulated_tiles::configure(shapes)
#define _tile_release() emulated_tiles::release()
#define _tile_loadd(t, from, stride) emulated_tiles::load(t, from, stride)
#define _tile_stored(t, to, stride) emulated_tiles::store(t, to, stride)
#define _tile_zero(t) emulated_tiles::zero(t)
#define _tile_dpbsud(sum, a, b) emulated_tiles::multiply(sum, a, b)

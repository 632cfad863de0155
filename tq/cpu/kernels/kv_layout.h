// Where the tokens of a packed cache lie: the one place that knows, on top of layout.h.
//
// A segment is a run of blocks of 64 tokens, so that a cache grows without moving what is there. The keys of a block are
// a matrix with its tokens as rows and head_dim columns (4 tiles), the values one with value_dim rows and its tokens as
// 64 columns. Codes of 8 bits are bytes `code + 128`; as nothing is looked up, keys of 8 bits end with the last step that
// holds a column.
#pragma once
#include "layout.h"
#include "tq_cpu.h"

namespace tq {

constexpr int BLOCK_TOKENS = 64;
constexpr int BLOCK_TILES = BLOCK_TOKENS / TILE_ROWS;

// Steps of 4 columns in a tile of keys.
constexpr int key_steps(int head_dim, int bits) { return bits == 8 ? (head_dim + 3) / 4 : STEPS * blocks(head_dim); }

constexpr int64_t key_tile_bytes(int head_dim, int bits) {
  return bits == 8 ? int64_t(LANES) * key_steps(head_dim, 8) : tile_bytes(head_dim, bits);
}
constexpr int64_t key_block_bytes(int head_dim, int bits) { return BLOCK_TILES * key_tile_bytes(head_dim, bits); }
constexpr int64_t value_block_bytes(int value_dim, int bits) { return int64_t(tiles(value_dim)) * block_bytes(bits); }

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
constexpr int64_t round_down(int64_t n, int64_t unit) { return n / unit * unit; }

// A block of keys or values is that of its first part, then that of its second one. Its scales are planes of 64 tokens,
// one for each group of a part; those of an affine part are followed by the planes of its minima.
inline int groups(const tq_kv_part &part) { return part.group ? part.dim / part.group : 1; }
inline int planes(const tq_kv_part &part) { return groups(part) * (part.affine ? 2 : 1); }

inline int64_t block_bytes_of(const tq_kv_part &part, bool values) {
  return values ? value_block_bytes(part.dim, part.bits) : key_block_bytes(part.dim, part.bits);
}

inline int planes(const tq_kv_side &side) {
  int n = 0;
  for (int i = 0; i < side.n_parts; i++) n += planes(side.parts[i]);
  return n;
}
inline int64_t block_bytes_of(const tq_kv_side &side, bool values) {
  int64_t n = 0;
  for (int i = 0; i < side.n_parts; i++) n += block_bytes_of(side.parts[i], values);
  return n;
}

// Floats of a vector in the basis of the codes: each part in whole tiles.
inline int code_width(const tq_kv_side &side) {
  int n = 0;
  for (int i = 0; i < side.n_parts; i++) n += round_up(side.parts[i].dim, TILE_ROWS);
  return n;
}

}  // namespace tq

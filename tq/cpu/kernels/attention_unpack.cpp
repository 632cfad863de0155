// Packed tokens as floats: for exact arithmetic, and for those who want to see them.
#include <algorithm>

#include "attention_float.h"
#include "attention_packed.h"
#include "kv_half.h"
#include "kv_layout.h"

namespace tq {
namespace {

// A token's numbers of one group: value = scale * level + middle.
struct Scaled {
  const float *levels;  // NULL: of code c, c - 128
  float scale, middle;

  Scaled(const PartCode &code, const uint16_t *scales, int t, int group) {
    const tq_kv_part &part = *code.part;
    const uint16_t *plane = scales + (code.plane + group) * BLOCK_TOKENS + t;
    levels = part.bits == 8 ? nullptr : part.values;
    scale = float_of(*plane);
    middle = part.affine ? float_of(plane[code.n_groups * BLOCK_TOKENS]) + scale * float(1 << (part.bits - 1)) : 0.f;
  }

  float operator()(uint8_t byte) const {
    const uint8_t code = byte ^ SIGN_FLIP;
    return scale * (levels ? levels[code] : float(code) - 128.f) + middle;
  }
};

int group_of(const tq_kv_part &part, int d) { return part.group ? d / part.group : 0; }

void unpack_keys(const PartCode &code, const uint8_t *block, const uint16_t *scales, int n, float *keys, int64_t row) {
  const tq_kv_part &part = *code.part;
  alignas(64) uint8_t bytes[LANES * STEPS];
  const int64_t tile = key_tile_bytes(part.dim, part.bits);
  for (int first = 0; first < n; first += TILE_ROWS) {
    for (int b = 0; b < blocks(part.dim); b++) {
      const uint8_t *from = block + code.at + first / TILE_ROWS * tile + int64_t(b) * block_bytes(part.bits);
      if (part.bits == 8) {  // whose last block may be cut off
        const int last = std::min(STEPS, key_steps(part.dim, 8) - STEPS * b) * LANES;
        for (int i = 0; i < last; i++) bytes[i] = from[i] ^ SIGN_FLIP;
      } else {
        decode_blocks(code.decode, from, part.bits, 1, bytes);
      }
      for (int t = first; t < std::min(n, first + TILE_ROWS); t++) {
        float *to = keys + t * row + code.offset + BLOCK_COLUMNS * b;
        const int step = part.group ? std::min(part.group, BLOCK_COLUMNS) : BLOCK_COLUMNS;
        const int last = std::min(part.dim - BLOCK_COLUMNS * b, BLOCK_COLUMNS);
        for (int begin = 0; begin < last; begin += step) {
          const Scaled value(code, scales, t, group_of(part, BLOCK_COLUMNS * b + begin));
          for (int d = begin; d < std::min(last, begin + step); d++) {
            to[d] = value(bytes[d / 4 * LANES + 4 * (t % TILE_ROWS) + d % 4]);
          }
        }
      }
    }
  }
}

void unpack_values(const PartCode &code, const uint8_t *block, const uint16_t *scales, int n, float *values, int64_t row) {
  const tq_kv_part &part = *code.part;
  alignas(64) uint8_t bytes[LANES * STEPS];
  for (int first = 0; first < part.dim; first += TILE_ROWS) {
    decode_blocks(code.decode, block + code.at + int64_t(first / TILE_ROWS) * block_bytes(part.bits), part.bits, 1, bytes);
    for (int t = 0; t < n; t++) {
      const Scaled value(code, scales, t, group_of(part, first));
      for (int d = first; d < std::min(part.dim, first + TILE_ROWS); d++) {
        values[t * row + code.offset + d] = value(bytes[t / 4 * LANES + 4 * (d % TILE_ROWS) + t % 4]);
      }
    }
  }
}

}  // namespace

void unpack_block(const PackedTokens &tokens, const PackedCode &code, float *keys, int64_t key_row, float *values,
                  int64_t value_row) {
  for (const PartCode &part : code.keys.parts) {
    unpack_keys(part, tokens.keys, tokens.key_scales, tokens.count, keys, key_row);
  }
  for (const PartCode &part : code.values.parts) {
    unpack_values(part, tokens.values, tokens.value_scales, tokens.count, values, value_row);
  }
}

void attend_unpacked(Rows &rows, const PackedTokens &tokens, const PackedCode &code) {
  const Panels panels = scratch_panels(rows);
  for (int first = 0; first < tokens.count; first += PANEL_TOKENS) {
    const int n = std::min(tokens.count - first, PANEL_TOKENS);
    for (int t = 0; t < n; t += BLOCK_TOKENS) {
      const int64_t block = (first + t) / BLOCK_TOKENS;
      const PackedTokens here = {tokens.keys + block * code.keys.block_bytes,
                                 tokens.values + block * code.values.block_bytes,
                                 tokens.key_scales + block * BLOCK_TOKENS * code.keys.planes,
                                 tokens.value_scales + block * BLOCK_TOKENS * code.values.planes,
                                 std::min(n - t, BLOCK_TOKENS), 0, 0};
      unpack_block(here, code, panels.rows + int64_t(t) * rows.head_width, rows.head_width,
                   panels.values + int64_t(t) * rows.value_width, rows.value_width);
    }
    transpose(panels.rows, rows.head_width, panels.keys);
    attend_panels(rows, rows.turned, panels, n, tokens.position + first, std::max(0, tokens.hidden - first),
                  rows.state.rotated);
  }
}

}  // namespace tq

// Attention over packed tokens. Keys: int8 queries times the bytes of the codes. Values: weights times the values'
// scales, as unsigned bytes with one scale per 64 tokens, times the bytes of the codes.
//
// Codes are decoded to bytes in the caches, for all rows; up to FEW_ROWS rows take the values of the common widths from
// registers instead.
#include "attention_packed.h"

#include <string.h>

#include <algorithm>
#include <array>
#include <bit>
#include <limits>

#include "attention_float.h"
#include "attention_simd.h"
#include "attention_vector.h"
#include "kv_half.h"
#include "kv_layout.h"

namespace tq {
namespace {

constexpr int FEW_ROWS = 4;
constexpr int SHARED_TOKENS = 128;  // decoded at once for many rows
constexpr int CHUNK_BLOCKS = CHUNK_TOKENS / BLOCK_TOKENS;
constexpr int PREFETCH_BYTES = 4096;  // ahead: past the page that hardware prefetchers stop at

void prefetch_bytes(const uint8_t *p, int64_t n) {
  for (int64_t line = 0; line < n; line += 64) prefetch(p + PREFETCH_BYTES + line);
}

// --- decoders ------------------------------------------------------------------------------------------------------

template <int BITS>
AnyDecoder decoder_of(const uint8_t *entries, uint8_t mask) {
  std::array<uint8_t, 256> flipped{};
  for (int i = 0; i < 1 << BITS; i++) flipped[i] = entries[i] ^ mask;
  return AnyDecoder(std::in_place_type<Decoder<BITS>>, flipped.data());
}

// Bytes as dot() reads them, but for those bits that are set in `mask`.
AnyDecoder make_decoder(int bits, const uint8_t *entries, uint8_t mask) {
  switch (bits) {
    case 1: return decoder_of<1>(entries, mask);
    case 2: return decoder_of<2>(entries, mask);
    case 3: return decoder_of<3>(entries, mask);
    case 4: return decoder_of<4>(entries, mask);
    case 5: return decoder_of<5>(entries, mask);
    case 6: return decoder_of<6>(entries, mask);
    case 7: return decoder_of<7>(entries, mask);
    default: return PlainBytes{splat_byte(SIGN_FLIP ^ mask)};
  }
}

constexpr std::array<uint8_t, 256> IDENTITY = [] {
  std::array<uint8_t, 256> codes{};
  for (int i = 0; i < 256; i++) codes[i] = uint8_t(i);
  return codes;
}();

void decode_blocks(const AnyDecoder &any, const uint8_t *codes, int bits, int64_t n, uint8_t *bytes) {
  std::visit(
      [&](const auto &decode) {
        for (int64_t i = 0; i < n; i++, codes += block_bytes(bits), bytes += LANES * STEPS) {
          decode(codes, [&](int step, Bytes w) TQ_INLINE_LAMBDA { store_bytes(bytes + LANES * step, w); });
        }
      },
      any);
}

// --- keys ----------------------------------------------------------------------------------------------------------

int32_t start_sum(const RowGroup &x, int block, int row) {
  return -(128 - BYTE_ZERO) * x.sums[int64_t(block) * 2 * x.width + row];
}

const int8_t *row_codes(const RowGroup &x, int block, int row) {
  return x.codes + (int64_t(block) * x.width + row) * BLOCK_COLUMNS;
}

// score += sum * factor * key_scales, or = in the first block of columns.
TQ_INLINE void add_score(Ints sum, float factor, const float *key_scales, int block, float *score) {
  const Floats product = to_floats(sum) * (splat(factor) * load(key_scales));
  store(score, block == 0 ? product : load(score) + product);
}

// Scores of R rows from `row` on with TILES tiles of 16 tokens, whose bytes (value + 128) are `steps` vectors each.
template <int R, int TILES>
void score_bytes(const uint8_t *bytes, int steps, const float *key_scales, const RowGroup &x, int row, float *scores) {
  const int64_t tile = int64_t(steps) * LANES;
  const Bytes mask = splat_byte(SIGN_FLIP);
  for (int b = 0; STEPS * b < steps; b++) {
    Ints sums[R][TILES];
    unrolled<R>([&](auto r) TQ_INLINE_LAMBDA {
      unrolled<TILES>([&](auto t) TQ_INLINE_LAMBDA { sums[r][t] = splat_int(start_sum(x, b, row + r)); });
    });
    const uint8_t *p = bytes + int64_t(b) * STEPS * LANES;
    const int8_t *query = row_codes(x, b, row);
    for (int s = 0; s < std::min(STEPS, steps - STEPS * b); s++, p += LANES) {
      Bytes w[TILES];
      unrolled<TILES>([&](auto t) TQ_INLINE_LAMBDA { w[t] = flip(load_bytes(p + t * tile), mask); });
      unrolled<R>([&](auto r) TQ_INLINE_LAMBDA {
        const Quad quad = load_quad(query + r * BLOCK_COLUMNS + 4 * s);
        unrolled<TILES>([&](auto t) TQ_INLINE_LAMBDA { sums[r][t] = dot(sums[r][t], w[t], quad); });
      });
    }
    unrolled<R>([&](auto r) TQ_INLINE_LAMBDA {
      const float factor = x.scales[int64_t(b) * x.width + row + r];
      unrolled<TILES>([&](auto t) TQ_INLINE_LAMBDA {
        add_score(sums[r][t], factor, key_scales + TILE_ROWS * t, b, scores + r * CHUNK_TOKENS + TILE_ROWS * t);
      });
    });
  }
}

// Scores of rows [first, first + count) with a block of 64 tokens, whose bytes are `steps` vectors for each tile.
void score_block(const uint8_t *bytes, int steps, const float *key_scales, const RowGroup &x, int first, int count,
                 float *scores) {
  const int64_t tile = int64_t(steps) * LANES;
  for (int r = 0; r < count; r += MAX_ROWS) {
    with_count<MAX_ROWS>(count - r, [&]<int R>() {
      constexpr int TILES = R <= MAX_ROWS / 2 ? 2 * MAX_TILES : MAX_TILES;
      for (int t = 0; t < BLOCK_TILES; t += TILES) {
        score_bytes<R, TILES>(bytes + t * tile, steps, key_scales + TILE_ROWS * t, x, first + r,
                              scores + r * CHUNK_TOKENS + TILE_ROWS * t);
      }
    });
  }
}

// --- values --------------------------------------------------------------------------------------------------------

// Weights of rows as unsigned bytes: [row][CHUNK_TOKENS], with a scale and a sum for each block.
struct Weights {
  uint8_t *bytes;
  float *scales;   // [row][CHUNK_BLOCKS]
  int32_t *sums;
};

// A block of n tokens: bytes = weights * value_scales / scale. NaN or infinity make the scale NaN.
void quantize_weights(const float *weights, const float *value_scales, int n, float table_scale, uint8_t *bytes,
                      float &scale, int32_t &sum) {
  constexpr float SHIFTER = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to an integer, in the low bits
  alignas(64) float products[BLOCK_TOKENS];
  int32_t most = products_of(weights, value_scales, n, products);
  for (int t = n; t < BLOCK_TOKENS; t++) products[t] = 0;
  const float largest = std::bit_cast<float>(most), inverse = 255.f / largest;
  const bool finite = most < 0x7f800000, tiny = std::bit_cast<uint32_t>(inverse) >= 0x7f800000;
  scale = !finite ? std::numeric_limits<float>::quiet_NaN() : tiny ? 0.f : largest / 255.f * table_scale;
  const float factor = finite && !tiny ? inverse : 0.f;
#pragma omp simd
  for (int t = 0; t < BLOCK_TOKENS; t++) bytes[t] = uint8_t(std::bit_cast<uint32_t>(products[t] * factor + SHIFTER));
  sum = 0;
  if constexpr (VALUE_ZERO) {
#pragma omp simd reduction(+ : sum)
    for (int t = 0; t < BLOCK_TOKENS; t++) sum += bytes[t];
  }
}

// sums[r] += the weighted values of a block, for R rows. `decode` yields bytes as dot_values reads them.
template <int R, class D>
void add_values(const D &decode, const uint8_t *codes, int64_t tile_step, int n_tiles, const uint8_t *weights,
                const float *scales, const int32_t *weight_sums, float *sums, int64_t width) {
  constexpr int PARTS = R < CHAINS ? 2 : 1;  // sums of a row that do not wait for each other
  for (int i = 0; i < n_tiles; i++, codes += tile_step, sums += TILE_ROWS) {
    Ints total[R][2];
    unrolled<R>([&](auto r) TQ_INLINE_LAMBDA {
      total[r][0] = splat_int(-VALUE_ZERO * weight_sums[r * CHUNK_BLOCKS]);
      total[r][1] = splat_int(0);
    });
    decode(codes, [&](int step, Bytes w) TQ_INLINE_LAMBDA {
      unrolled<R>([&](auto r) TQ_INLINE_LAMBDA {
        Ints &sum = total[r][step % PARTS];
        sum = dot_values(sum, w, load_quad(weights + r * CHUNK_TOKENS + 4 * step));
      });
    });
    unrolled<R>([&](auto r) TQ_INLINE_LAMBDA {
      const Ints whole = PARTS == 1 ? total[r][0] : total[r][0] + total[r][1];
      float *sum = sums + r * width;
      store(sum, fma(to_floats(whole), splat(scales[r * CHUNK_BLOCKS]), load(sum)));
    });
  }
}

// --- the walk ------------------------------------------------------------------------------------------------------

// Whether a few rows read values of this width from their codes. For others, and with few registers, it gains little.
template <class D>
constexpr bool FROM_CODES = false;
#if defined(TQ_ISA_AVX512)
template <>
constexpr bool FROM_CODES<Decoder<3>> = true;
template <>
constexpr bool FROM_CODES<Decoder<4>> = true;
template <>
constexpr bool FROM_CODES<PlainBytes> = true;
#endif

class Walk {
 public:
  Walk(Rows &rows, const PackedTokens &tokens, const PackedCode &code)
      : rows_(rows),
        tokens_(tokens),
        code_(code),
        key_bits_(code.params.code.key_bits),
        value_bits_(code.params.code.value_bits),
        steps_(key_steps(code.params.head_dim, key_bits_)),
        value_tiles_(tiles(code.params.value_dim)),
        step_tokens_(rows.count <= FEW_ROWS ? CHUNK_TOKENS : SHARED_TOKENS) {
    const auto cut = [&](Cutter memory) {
      weights_.bytes = memory.take<uint8_t>(MAX_ROWS * CHUNK_TOKENS);
      weights_.scales = memory.take<float>(MAX_ROWS * CHUNK_BLOCKS);
      weights_.sums = memory.take<int32_t>(MAX_ROWS * CHUNK_BLOCKS);
      key_panel_ = memory.take<uint8_t>(size_t(step_tokens_) * steps_ * 4);
      value_panel_ = memory.take<uint8_t>(size_t(step_tokens_) * value_tiles_ * TILE_ROWS);
      return memory.bytes();
    };
    cut(Cutter(scratch<uint8_t>(PANEL, cut(Cutter(nullptr)))));
  }

  void run() {
    for (int first = 0; first < tokens_.count; first += step_tokens_) {
      const int n = std::min(tokens_.count - first, step_tokens_), n_blocks = (n + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
      load_scales(first, n);
      const uint8_t *keys = find_keys(first / BLOCK_TOKENS, n_blocks);
      const uint8_t *values = tokens_.values + first / BLOCK_TOKENS * value_bytes();
      const bool from_codes =
          rows_.count <= FEW_ROWS &&
          std::visit([]<class D>(const D &) { return FROM_CODES<D>; }, code_.values);
      if (!from_codes) {
        decode_blocks(code_.values, values, value_bits_, int64_t(n_blocks) * value_tiles_, value_panel_);
      }
      for (int r = 0; r < rows_.count; r += MAX_ROWS) {
        const int count = std::min(rows_.count - r, MAX_ROWS);
        if (rows_.unseen(r, count, tokens_.position + first, n)) continue;
        float *scores = rows_.scores;
        for (int b = 0; b < n_blocks; b++) {
          const int token = b * BLOCK_TOKENS;
          const uint8_t *block = keys + int64_t(token) * 4 * steps_;
          if (keys != key_panel_) prefetch_bytes(block, BLOCK_TOKENS * 4 * steps_);
          score_block(block, steps_, key_scales_ + token, rows_.codes, r, count, scores + token);
        }
        weigh(r, count, scores, first, n);
        if (from_codes) {
          std::visit([&](const auto &decode) { add_from_codes(decode, values, n_blocks); }, code_.values);
        } else {
          with_count<MAX_ROWS>(count, [&]<int R>() {
            add<R>(PlainBytes{splat_byte(0)}, value_panel_, LANES * STEPS, n_blocks, r);
          });
        }
      }
    }
  }

 private:
  int64_t key_bytes() const { return key_block_bytes(code_.params.head_dim, key_bits_); }
  int64_t value_bytes() const { return value_block_bytes(code_.params.value_dim, value_bits_); }

  // Of whole blocks: there is memory for those.
  void load_scales(int first, int n) {
    for (int t = 0; t < n; t += TILE_ROWS) {
      store(key_scales_ + t, load_half(tokens_.key_scales + first + t) * splat(code_.key_scale));
      store(value_scales_ + t, load_half(tokens_.value_scales + first + t));
    }
    for (int t = n; t % TILE_ROWS != 0; t++) value_scales_[t] = 0;  // what is there is of no token
  }

  // The bytes of n blocks of keys.
  const uint8_t *find_keys(int block, int n) const {
    const uint8_t *keys = tokens_.keys + block * key_bytes();
    if (key_bits_ == 8) return keys;
    decode_blocks(code_.keys, keys, key_bits_, n * BLOCK_TILES * int64_t(steps_ / STEPS), key_panel_);
    return key_panel_;
  }

  // Scores of rows [r, r + count) become weights, and these bytes.
  void weigh(int r, int count, float *scores, int first, int n) {
    for (int i = 0; i < count; i++, scores += CHUNK_TOKENS) {
      rows_.weigh(r + i, scores, n, tokens_.position + first);
      for (int t = 0, b = i * CHUNK_BLOCKS; t < n; t += BLOCK_TOKENS, b++) {
        quantize_weights(scores + t, value_scales_ + t, std::min(n - t, BLOCK_TOKENS), code_.value_scale,
                         weights_.bytes + i * CHUNK_TOKENS + t, weights_.scales[b], weights_.sums[b]);
      }
    }
  }

  template <int R, class D>
  void add(const D &decode, const uint8_t *codes, int64_t tile, int n_blocks, int r) {
    float *sums = rows_.state.rotated + int64_t(r) * rows_.value_width;
    for (int b = 0; b < n_blocks; b++, codes += tile * value_tiles_) {
      if constexpr (FROM_CODES<D>) prefetch_bytes(codes, tile * value_tiles_);
      add_values<R>(decode, codes, tile, value_tiles_, weights_.bytes + b * BLOCK_TOKENS, weights_.scales + b,
                    weights_.sums + b, sums, rows_.value_width);
    }
  }

  template <class D>
  void add_from_codes(const D &decode, const uint8_t *codes, int n_blocks) {
    if constexpr (FROM_CODES<D>) {
      with_count<FEW_ROWS>(rows_.count, [&]<int R>() { add<R>(decode, codes, block_bytes(value_bits_), n_blocks, 0); });
    }
  }

  Rows &rows_;
  const PackedTokens &tokens_;
  const PackedCode &code_;
  const int key_bits_, value_bits_, steps_, value_tiles_, step_tokens_;
  Weights weights_;  // of a group of rows
  uint8_t *key_panel_, *value_panel_;
  alignas(64) float key_scales_[CHUNK_TOKENS], value_scales_[CHUNK_TOKENS];
};

void attend_exact(Rows &rows, const PackedTokens &tokens, const PackedCode &code) {
  const tq_attend_params &p = code.params;
  const Panels panels = scratch_panels(rows);
  for (int first = 0; first < tokens.count; first += PANEL_TOKENS) {
    const int n = std::min(tokens.count - first, PANEL_TOKENS);
    for (int t = 0; t < n; t += BLOCK_TOKENS) {
      const int token = first + t, block = token / BLOCK_TOKENS;
      const PackedTokens here = {tokens.keys + block * key_block_bytes(p.head_dim, p.code.key_bits),
                                 tokens.values + block * value_block_bytes(p.value_dim, p.code.value_bits),
                                 tokens.key_scales + token, tokens.value_scales + token,
                                 std::min(n - t, BLOCK_TOKENS), tokens.position + token};
      unpack_block(here, code, panels.rows + int64_t(t) * rows.head_width, rows.head_width,
                   panels.values + int64_t(t) * rows.value_width, rows.value_width);
    }
    transpose(panels.rows, rows.head_width, panels.keys);
    attend_panels(rows, rows.turned, panels, n, tokens.position + first, rows.state.rotated);
  }
}

// level[code] * scale, or, without levels, (code - 128) * scale.
float value_of(uint8_t byte, const float *levels, int bits, float scale) {
  const uint8_t code = byte ^ SIGN_FLIP;
  return scale * (bits == 8 ? float(code) - 128.f : levels[code]);
}

}  // namespace

PackedCode::PackedCode(const tq_attend_params &p)
    : params(p),
      keys(make_decoder(p.code.key_bits, p.code.key_table, SIGN_FLIP)),
      values(make_decoder(p.code.value_bits, p.code.value_table, VALUE_FLIP ^ SIGN_FLIP)),
      key_codes(make_decoder(p.code.key_bits, IDENTITY.data(), 0)),
      value_codes(make_decoder(p.code.value_bits, IDENTITY.data(), 0)),
      key_scale(p.code.key_bits == 8 ? 1.f : p.code.key_table_scale),
      value_scale(p.code.value_bits == 8 ? 1.f : p.code.value_table_scale) {}

void attend_packed(Rows &rows, const PackedTokens &tokens, const PackedCode &code) {
  if (code.params.exact) return attend_exact(rows, tokens, code);
  Walk(rows, tokens, code).run();
}

void unpack_block(const PackedTokens &tokens, const PackedCode &code, float *keys, int64_t key_row, float *values,
                  int64_t value_row) {
  const int n = tokens.count;
  const tq_attend_params &p = code.params;
  const tq_kv_code &kv = p.code;
  alignas(64) uint8_t bytes[LANES * STEPS];
  const int64_t tile = key_tile_bytes(p.head_dim, kv.key_bits);
  for (int first = 0; first < n; first += TILE_ROWS) {
    for (int b = 0; b < blocks(p.head_dim); b++) {
      const uint8_t *from = tokens.keys + first / TILE_ROWS * tile + int64_t(b) * block_bytes(kv.key_bits);
      if (kv.key_bits == 8) {  // whose last block may be cut off
        const int last = std::min(STEPS, key_steps(p.head_dim, 8) - STEPS * b) * LANES;
        for (int i = 0; i < last; i++) bytes[i] = from[i] ^ SIGN_FLIP;
      } else {
        decode_blocks(code.key_codes, from, kv.key_bits, 1, bytes);
      }
      for (int t = first; t < std::min(n, first + TILE_ROWS); t++) {
        const float scale = float_of(tokens.key_scales[t]);
        for (int d = 0; d < std::min(p.head_dim - BLOCK_COLUMNS * b, BLOCK_COLUMNS); d++) {
          const uint8_t byte = bytes[d / 4 * LANES + 4 * (t % TILE_ROWS) + d % 4];
          keys[t * key_row + BLOCK_COLUMNS * b + d] = value_of(byte, kv.key_values, kv.key_bits, scale);
        }
      }
    }
  }
  for (int first = 0; first < p.value_dim; first += TILE_ROWS) {
    decode_blocks(code.value_codes, tokens.values + int64_t(first / TILE_ROWS) * block_bytes(kv.value_bits),
                  kv.value_bits, 1, bytes);
    for (int t = 0; t < n; t++) {
      const float scale = float_of(tokens.value_scales[t]);
      for (int d = first; d < std::min(p.value_dim, first + TILE_ROWS); d++) {
        const uint8_t byte = bytes[t / 4 * LANES + 4 * (d % TILE_ROWS) + t % 4];
        values[t * value_row + d] = value_of(byte, kv.value_values, kv.value_bits, scale);
      }
    }
  }
}

}  // namespace tq

// Attention over packed tokens. Keys: int8 queries times the bytes of the codes. Values: weights times the values'
// scales, as unsigned bytes with one scale per 64 tokens, times the bytes of the codes.
//
// Codes are decoded to bytes in the caches, for all rows; up to FEW_ROWS rows take the values of the common widths from
// registers instead. A part that has groups is taken group by group: their scales belong to the keys' products and to
// the values' weights.
#include "attention_packed.h"

#include <string.h>

#include <algorithm>
#include <array>
#include <bit>
#include <limits>

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

SideCode make_side(const tq_kv_side &side, bool values, bool exact) {
  SideCode made{};
  made.parts.reserve(side.n_parts);
  int offset = 0, query_block = 0;
  for (int i = 0; i < side.n_parts; i++) {
    const tq_kv_part &part = side.parts[i];
    const uint8_t mask = exact ? 0 : values ? VALUE_FLIP ^ SIGN_FLIP : SIGN_FLIP;
    const int64_t size = block_bytes_of(part, values);
    const int steps = key_steps(part.dim, part.bits), unit = part.group == BLOCK_COLUMNS / 2 ? STEPS / 2 : STEPS;
    made.parts.push_back({&part, make_decoder(part.bits, exact ? IDENTITY.data() : part.table, mask),
                          part.bits == 8 ? 1.f : part.table_scale, offset, query_block, made.planes, groups(part),
                          made.block_bytes, size, steps, unit, part.group ? part.group / (4 * unit) : steps});
    offset += round_up(part.dim, TILE_ROWS);
    query_block += blocks(part.dim);
    made.planes += planes(part);
    made.block_bytes += size;
  }
  return made;
}

// --- keys ----------------------------------------------------------------------------------------------------------

const int8_t *row_codes(const RowGroup &x, int block, int row) {
  return x.codes + (int64_t(block) * x.width + row) * BLOCK_COLUMNS;
}

// What the sum of a unit's products begins with, for the offset of the bytes.
TQ_INLINE int32_t start_sum(const PartCode &code, const RowGroup &x, int step, int row) {
  const int32_t *sums = x.sums + int64_t(code.query_block + step / STEPS) * 2 * x.width + row;
  if (code.unit == STEPS) return -(128 - BYTE_ZERO) * sums[0];
  const int32_t second = sums[x.width];
  return -(128 - BYTE_ZERO) * (step % STEPS ? second : sums[0] - second);
}

// score += sum * factor * key_scales, or =.
TQ_INLINE void add_score(Ints sum, float factor, const float *key_scales, bool add, float *score) {
  const Floats product = to_floats(sum) * (splat(factor) * load(key_scales));
  store(score, add ? load(score) + product : product);
}

// Scores of R rows from `row` on with TILES tiles of 16 tokens, whose bytes (value + 128) are `steps` vectors each.
// key_scales: [group][CHUNK_TOKENS].
template <int R, int TILES>
void score_bytes(const PartCode &keys, const uint8_t *bytes, const float *key_scales, const RowGroup &x, int row,
                 bool add, float *scores) {
  const int64_t tile = int64_t(keys.steps) * LANES;
  const Bytes mask = splat_byte(SIGN_FLIP);
  for (int first = 0, left = keys.units_of_scale; first < keys.steps; first += keys.unit, left--) {
    if (left == 0) key_scales += CHUNK_TOKENS, left = keys.units_of_scale;
    Ints sums[R][TILES];
    unrolled<R>([&](auto r) TQ_INLINE_LAMBDA {
      unrolled<TILES>([&](auto t) TQ_INLINE_LAMBDA { sums[r][t] = splat_int(start_sum(keys, x, first, row + r)); });
    });
    const int block = keys.query_block + first / STEPS;
    const uint8_t *p = bytes + int64_t(first) * LANES;
    const int8_t *query = row_codes(x, block, row) + 4 * (first % STEPS);
    for (int s = 0; s < std::min(keys.unit, keys.steps - first); s++, p += LANES) {
      Bytes w[TILES];
      unrolled<TILES>([&](auto t) TQ_INLINE_LAMBDA { w[t] = flip(load_bytes(p + t * tile), mask); });
      unrolled<R>([&](auto r) TQ_INLINE_LAMBDA {
        const Quad quad = load_quad(query + r * BLOCK_COLUMNS + 4 * s);
        unrolled<TILES>([&](auto t) TQ_INLINE_LAMBDA { sums[r][t] = dot(sums[r][t], w[t], quad); });
      });
    }
    unrolled<R>([&](auto r) TQ_INLINE_LAMBDA {
      const float factor = x.scales[int64_t(block) * x.width + row + r];
      unrolled<TILES>([&](auto t) TQ_INLINE_LAMBDA {
        add_score(sums[r][t], factor, key_scales + TILE_ROWS * t, add || first > 0, scores + r * CHUNK_TOKENS + TILE_ROWS * t);
      });
    });
  }
}

// Scores of rows [first, first + count) with a block of 64 tokens.
void score_block(const PartCode &keys, const uint8_t *bytes, const float *key_scales, const RowGroup &x, int first,
                 int count, bool add, float *scores) {
  const int64_t tile = int64_t(keys.steps) * LANES;
  for (int r = 0; r < count; r += MAX_ROWS) {
    with_count<MAX_ROWS>(count - r, [&]<int R>() {
      constexpr int TILES = R <= MAX_ROWS / 2 ? 2 * MAX_TILES : MAX_TILES;
      for (int t = 0; t < BLOCK_TILES; t += TILES) {
        score_bytes<R, TILES>(keys, bytes + t * tile, key_scales + TILE_ROWS * t, x, first + r, add,
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
void quantize_weights(const float *weights, const float *value_scales, int n, uint8_t *bytes, float &scale,
                      int32_t &sum) {
  constexpr float SHIFTER = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to an integer, in the low bits
  alignas(64) float products[BLOCK_TOKENS];
  int32_t most = products_of(weights, value_scales, n, products);
  for (int t = n; t < BLOCK_TOKENS; t++) products[t] = 0;
  const float largest = std::bit_cast<float>(most), inverse = 255.f / largest;
  const bool finite = most < 0x7f800000, tiny = std::bit_cast<uint32_t>(inverse) >= 0x7f800000;
  scale = !finite ? std::numeric_limits<float>::quiet_NaN() : tiny ? 0.f : largest / 255.f;
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
        step_tokens_(rows.count <= FEW_ROWS ? CHUNK_TOKENS : SHARED_TOKENS) {
    int64_t key_panel = 0, value_panel = 0;  // bytes for a token
    for (const PartCode &part : code.keys.parts) key_panel += 4 * part.steps;
    for (const PartCode &part : code.values.parts) value_panel += round_up(part.part->dim, TILE_ROWS);
    const auto cut = [&](Cutter memory) {
      weights_.bytes = memory.take<uint8_t>(MAX_ROWS * CHUNK_TOKENS);
      weights_.scales = memory.take<float>(MAX_ROWS * CHUNK_BLOCKS);
      weights_.sums = memory.take<int32_t>(MAX_ROWS * CHUNK_BLOCKS);
      key_scales_ = memory.take<float>(code.keys.planes * CHUNK_TOKENS);
      value_scales_ = memory.take<float>(code.values.planes * CHUNK_TOKENS);
      key_panel_ = memory.take<uint8_t>(step_tokens_ * key_panel);
      value_panel_ = memory.take<uint8_t>(step_tokens_ * value_panel);
      return memory.bytes();
    };
    cut(Cutter(scratch<uint8_t>(PANEL, cut(Cutter(nullptr)))));
  }

  void run() {
    for (int first = 0; first < tokens_.count; first += step_tokens_) {
      const int n = std::min(tokens_.count - first, step_tokens_), n_blocks = (n + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
      const int block = first / BLOCK_TOKENS;
      load_scales(code_.keys, tokens_.key_scales, block, n_blocks, key_scales_);
      load_scales(code_.values, tokens_.value_scales, block, n_blocks, value_scales_);
      for (int p = 0; p < code_.values.planes; p++) {  // what lies behind the last token is of no token
        for (int t = n; t % TILE_ROWS != 0; t++) value_scales_[p * CHUNK_TOKENS + t] = 0;
      }
      find_keys(block, n_blocks);
      find_values(block, n_blocks);
      for (int r = 0; r < rows_.count; r += MAX_ROWS) {
        const int count = std::min(rows_.count - r, MAX_ROWS);
        if (rows_.unseen(r, count, tokens_.position + first, n)) continue;
        score(r, count, n, n_blocks);
        for (int i = 0; i < count; i++) {
          rows_.weigh(r + i, rows_.scores + i * CHUNK_TOKENS, n, tokens_.position + first,
                      std::max(0, tokens_.hidden - first));
        }
        for (size_t i = 0; i < code_.values.parts.size(); i++) {
          for (int g = 0; g < code_.values.parts[i].n_groups; g++) add_group(i, g, r, count, n, n_blocks);
        }
      }
    }
  }

 private:
  // Where the blocks of a part are: in memory, or decoded in a panel.
  struct Found {
    const uint8_t *bytes;
    int64_t step;  // from block to block
    bool decoded;
  };

  // The planes of whole blocks, times what belongs to bytes; minima become the values of byte 0.
  static void load_scales(const SideCode &side, const uint16_t *scales, int block, int n_blocks, float *to) {
    for (const PartCode &code : side.parts) {
      const tq_kv_part &part = *code.part;
      for (int b = 0; b < n_blocks; b++) {
        const uint16_t *from = scales + (int64_t(block + b) * side.planes + code.plane) * BLOCK_TOKENS;
        for (int g = 0; g < code.n_groups; g++, from += BLOCK_TOKENS) {
          float *plane = to + (code.plane + g) * CHUNK_TOKENS + b * BLOCK_TOKENS;
          for (int t = 0; t < BLOCK_TOKENS; t += TILE_ROWS) {
            const Floats scale = load_half(from + t);
            store(plane + t, scale * splat(code.scale));
            if (!part.affine) continue;
            const Floats least = load_half(from + code.n_groups * BLOCK_TOKENS + t);
            store(plane + code.n_groups * CHUNK_TOKENS + t, fma(scale, splat(float(1 << (part.bits - 1))), least));
          }
        }
      }
    }
  }

  void find_keys(int block, int n) {
    const uint8_t *keys = tokens_.keys + block * code_.keys.block_bytes;
    uint8_t *panel = key_panel_;
    for (size_t i = 0; i < code_.keys.parts.size(); i++) {
      const PartCode &code = code_.keys.parts[i];
      keys_[i] = {keys + code.at, code_.keys.block_bytes, code.part->bits != 8};
      if (code.part->bits != 8) panel = decode(code, n, BLOCK_TILES * (code.steps / STEPS), panel, keys_[i]);
    }
  }

  void find_values(int block, int n) {
    const uint8_t *values = tokens_.values + block * code_.values.block_bytes;
    uint8_t *panel = value_panel_;
    for (size_t i = 0; i < code_.values.parts.size(); i++) {
      const PartCode &code = code_.values.parts[i];
      const bool from_codes =
          rows_.count <= FEW_ROWS && std::visit([]<class D>(const D &) { return FROM_CODES<D>; }, code.decode);
      values_[i] = {values + code.at, code_.values.block_bytes, !from_codes};
      if (!from_codes) panel = decode(code, n, tiles(code.part->dim), panel, values_[i]);
    }
  }

  // n blocks of tokens, each of so many blocks of codes, to a panel. Returns what is behind it.
  uint8_t *decode(const PartCode &code, int n, int64_t codes, uint8_t *panel, Found &found) {
    const uint8_t *from = found.bytes;
    if (found.step == code.size) {
      decode_blocks(code.decode, from, code.part->bits, n * codes, panel);
    } else {
      for (int b = 0; b < n; b++) {
        decode_blocks(code.decode, from + b * found.step, code.part->bits, codes, panel + b * codes * LANES * STEPS);
      }
    }
    found.bytes = panel, found.step = codes * LANES * STEPS;
    return panel + n * found.step;
  }

  void score(int r, int count, int n, int n_blocks) {
    for (int b = 0; b < n_blocks; b++) {
      const int token = b * BLOCK_TOKENS;
      for (size_t i = 0; i < code_.keys.parts.size(); i++) {
        const PartCode &code = code_.keys.parts[i];
        const uint8_t *block = keys_[i].bytes + b * keys_[i].step;
        if (!keys_[i].decoded) prefetch_bytes(block, code.size);
        score_block(code, block, key_scales_ + code.plane * CHUNK_TOKENS + token, rows_.codes, r, count, i > 0,
                    rows_.scores + token);
      }
    }
    for (const PartCode &code : code_.keys.parts) {
      if (code.part->affine) add_middles(code, r, count, n);
    }
  }

  // The part of scores that belongs to what byte 0 stands for.
  void add_middles(const PartCode &code, int r, int count, int n) {
    const int group = code.part->dim / code.n_groups;
    for (int i = 0; i < count; i++) {
      const float *query = rows_.turned + int64_t(r + i) * rows_.head_width + code.offset;
      float *scores = rows_.scores + i * CHUNK_TOKENS;
      for (int g = 0; g < code.n_groups; g++, query += group) {
        const float *middles = key_scales_ + (code.plane + code.n_groups + g) * CHUNK_TOKENS;
        float sum = 0;
        for (int d = 0; d < group; d++) sum += query[d];
#pragma omp simd
        for (int t = 0; t < n; t++) scores[t] += sum * middles[t];
      }
    }
  }

  // The weighted sums of group g of part `index`, for rows [r, r + count), whose weights are in rows_.scores.
  void add_group(int index, int g, int r, int count, int n, int n_blocks) {
    const PartCode &code = code_.values.parts[index];
    const int group = code.part->dim / code.n_groups, first = code.n_groups == 1 ? 0 : g * group / TILE_ROWS;
    const int n_tiles = tiles(group);
    const float *value_scales = value_scales_ + (code.plane + g) * CHUNK_TOKENS;
    float *sums = rows_.state.rotated + int64_t(r) * rows_.value_width + code.offset + first * TILE_ROWS;
    for (int i = 0; i < count; i++) {
      const float *weights = rows_.scores + i * CHUNK_TOKENS;
      for (int t = 0, b = i * CHUNK_BLOCKS; t < n; t += BLOCK_TOKENS, b++) {
        quantize_weights(weights + t, value_scales + t, std::min(n - t, BLOCK_TOKENS),
                         weights_.bytes + i * CHUNK_TOKENS + t, weights_.scales[b], weights_.sums[b]);
      }
      if (code.part->affine) {
        const float *middles = value_scales + code.n_groups * CHUNK_TOKENS;
        float middle = 0;
#pragma omp simd reduction(+ : middle)
        for (int t = 0; t < n; t++) middle += weights[t] * middles[t];
        for (int d = 0; d < group; d++) sums[int64_t(i) * rows_.value_width + d] += middle;
      }
    }
    const Found &found = values_[index];
    if (found.decoded) {
      with_count<MAX_ROWS>(count, [&]<int R>() {
        add<R>(PlainBytes{splat_byte(0)}, found, LANES * STEPS, first, n_tiles, n_blocks, sums);
      });
      return;
    }
    std::visit(
        [&]<class D>(const D &decode) {
          if constexpr (FROM_CODES<D>) {
            with_count<FEW_ROWS>(count, [&]<int R>() {
              add<R>(decode, found, block_bytes(code.part->bits), first, n_tiles, n_blocks, sums);
            });
          }
        },
        code.decode);
  }

  template <int R, class D>
  void add(const D &decode, const Found &found, int64_t tile, int first, int n_tiles, int n_blocks, float *sums) {
    const uint8_t *codes = found.bytes + first * tile;
    for (int b = 0; b < n_blocks; b++, codes += found.step) {
      if (!found.decoded) prefetch_bytes(codes, tile * n_tiles);
      add_values<R>(decode, codes, tile, n_tiles, weights_.bytes + b * BLOCK_TOKENS, weights_.scales + b,
                    weights_.sums + b, sums, rows_.value_width);
    }
  }

  Rows &rows_;
  const PackedTokens &tokens_;
  const PackedCode &code_;
  const int step_tokens_;
  Found keys_[2], values_[2];             // of each part
  Weights weights_;                       // of a group of rows
  float *key_scales_, *value_scales_;     // [plane][CHUNK_TOKENS]
  uint8_t *key_panel_, *value_panel_;
};

}  // namespace

void decode_blocks(const AnyDecoder &any, const uint8_t *codes, int bits, int64_t n, uint8_t *bytes) {
  std::visit(
      [&](const auto &decode) {
        for (int64_t i = 0; i < n; i++, codes += block_bytes(bits), bytes += LANES * STEPS) {
          decode(codes, [&](int step, Bytes w) TQ_INLINE_LAMBDA { store_bytes(bytes + LANES * step, w); });
        }
      },
      any);
}

PackedCode::PackedCode(const tq_attend_params &p, bool exact)
    : keys(make_side(p.code.keys, false, exact)), values(make_side(p.code.values, true, exact)) {}

int query_blocks(const tq_kv_side &keys) {
  int n = 0;
  for (int i = 0; i < keys.n_parts; i++) n += blocks(keys.parts[i].dim);
  return n;
}

void quantize_query(const PackedCode &code, const float *turned, const RowGroup &group, int row) {
  for (const PartCode &part : code.keys.parts) {
    const int64_t n = int64_t(part.query_block) * group.width;
    const RowGroup own = {group.codes + n * BLOCK_COLUMNS, group.scales + n, group.sums + 2 * n, group.width};
    quantize_row(turned + part.offset, part.part->dim, own, row);
  }
}

void attend_packed(Rows &rows, const PackedTokens &tokens, const PackedCode &code) { Walk(rows, tokens, code).run(); }

}  // namespace tq

// Attention of a block of query rows over packed tokens, in the basis of the codes.
#pragma once
#include <variant>
#include <vector>

#include "attention_rows.h"
#include "decode.h"

namespace tq {

// Consecutive tokens of one kv head, from the beginning of a block. The first `hidden` ones are seen by nobody.
struct PackedTokens {
  const uint8_t *keys, *values;
  const uint16_t *key_scales, *value_scales;
  int count, position, hidden;
};

// Codes of 8 bits, which are the bytes themselves.
struct PlainBytes {
  Bytes mask;
  template <class F>
  TQ_INLINE void operator()(const uint8_t *block, F &&use) const {
    unrolled<STEPS>([&](auto step) TQ_INLINE_LAMBDA { use(step, flip(load_bytes(block + LANES * step), mask)); });
  }
};

using AnyDecoder =
    std::variant<Decoder<1>, Decoder<2>, Decoder<3>, Decoder<4>, Decoder<5>, Decoder<6>, Decoder<7>, PlainBytes>;

// One part of keys or values, and where what belongs to it lies.
struct PartCode {
  const tq_kv_part *part;
  AnyDecoder decode;     // to the bytes of the table (exact: to the codes; 8 bits: code + 128); those of values as
                         // dot_values reads them, else as dot does
  float scale;           // of these bytes
  int offset;            // of its first number in the basis of the codes
  int query_block;       // of its first number in the codes of a query, which has each part in blocks of its own
  int plane, n_groups;   // of its first scale
  int64_t at, size;      // of its bytes in a block of 64 tokens
  // Keys only: steps of 4 columns, and how many of them share a scale of the queries and one of the keys (a unit: a block
  // of columns, or half of one); units that have the same scales.
  int steps, unit, units_of_scale;
};

struct SideCode {
  std::vector<PartCode> parts;
  int planes;
  int64_t block_bytes;
};

// What is known of the codes of a cache, ready for use.
struct PackedCode {
  explicit PackedCode(const tq_attend_params &params, bool exact);
  SideCode keys, values;
};

// Blocks of 64 numbers in the codes of a query.
int query_blocks(const tq_kv_side &keys);

// A row of queries in the basis of packed keys as row `row` of a group.
void quantize_query(const PackedCode &code, const float *turned, const RowGroup &group, int row);

void attend_packed(Rows &rows, const PackedTokens &tokens, const PackedCode &code);

// attention_unpack.cpp: up to 64 tokens as floats, in the basis of the codes, keys [count][key_row] and values
// [count][value_row]; and attention to those. `code` is that of exact parameters.
void unpack_block(const PackedTokens &tokens, const PackedCode &code, float *keys, int64_t key_row, float *values,
                  int64_t value_row);
void attend_unpacked(Rows &rows, const PackedTokens &tokens, const PackedCode &code);

// `n` blocks of codes to bytes [n][16][64].
void decode_blocks(const AnyDecoder &any, const uint8_t *codes, int bits, int64_t n, uint8_t *bytes);

}  // namespace tq

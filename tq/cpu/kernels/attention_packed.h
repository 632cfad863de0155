// Attention of a block of query rows over packed tokens, in the basis of the codes.
#pragma once
#include <variant>

#include "attention_rows.h"
#include "decode.h"

namespace tq {

// Consecutive tokens of one kv head, from the beginning of a block.
struct PackedTokens {
  const uint8_t *keys, *values;
  const uint16_t *key_scales, *value_scales;
  int count, position;
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

// Tables of the codes of a cache, ready for use.
struct PackedCode {
  explicit PackedCode(const tq_attend_params &params);
  const tq_attend_params &params;
  AnyDecoder keys, values;            // to the bytes of the table; those of values as dot_values reads them
  AnyDecoder key_codes, value_codes;  // to the codes (8 bits: code + 128), as dot reads them
  float key_scale, value_scale;       // of a table's bytes
};

void attend_packed(Rows &rows, const PackedTokens &tokens, const PackedCode &code);

// Up to 64 tokens as floats, in the basis of the codes: keys [count][key_row] and values [count][value_row].
void unpack_block(const PackedTokens &tokens, const PackedCode &code, float *keys, int64_t key_row, float *values,
                  int64_t value_row);

}  // namespace tq

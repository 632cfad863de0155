// Decoded blocks in memory, for products that read them more than once.
#include "decode.h"

#include "tile.h"

namespace tq {

void decode_blocks(int bits, const uint8_t *table, const uint8_t *blocks, int count, uint8_t *bytes) {
  with_bits(bits, [&]<int BITS>() {
    const Decoder<BITS> decode(table);
    for (int b = 0; b < count; b++, blocks += block_bytes(BITS)) {
      for (int line = 0; line < block_bytes(BITS); line += 64) prefetch(blocks + PREFETCH_BYTES + line);
      decode(blocks, [&](int, const Bytes &w) TQ_INLINE_LAMBDA {
        store_bytes(bytes, w);
        bytes += LANES;
      });
    }
  });
}

}  // namespace tq

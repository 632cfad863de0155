// New tokens of a key-value cache: stored as rows, or packed in blocks of 64 as these fill.
#include <string.h>

#include <algorithm>

#include "attention.h"
#include "kv_encode.h"
#include "kv_half.h"
#include "kv_layout.h"

namespace tq {
namespace {

constexpr int64_t PARALLEL_VALUES = 16 * 1024;  // from here on storing rows takes longer than waking a thread

// Keys or values: the two are treated alike.
struct Side {
  bool values;
  int dim, bits;
  const tq_rotation *rotation;
  VectorCoder coder;

  Side(const tq_attend_params &p, bool values)
      : values(values),
        dim(values ? p.value_dim : p.head_dim),
        bits(values ? p.code.value_bits : p.code.key_bits),
        rotation(values ? &p.code.value_rotation : &p.code.key_rotation),
        coder(bits ? bits : 8, values ? p.code.value_values : p.code.key_values) {}

  void *data(const tq_segment &s) const { return values ? s.values : s.keys; }
  uint16_t *scales(const tq_segment &s) const { return values ? s.value_scales : s.key_scales; }
  int64_t head_stride(const tq_segment &s) const { return values ? s.value_head_stride : s.key_head_stride; }
  int64_t row_stride(const tq_segment &s) const {
    const int64_t stride = values ? s.value_row_stride : s.key_row_stride;
    return stride ? stride : dim;
  }
  int64_t block_size() const { return values ? value_block_bytes(dim, bits) : key_block_bytes(dim, bits); }

  // Row of a token in a floating-point segment whose rows begin with position `begin`.
  char *row(const tq_segment &s, int head, int position, int begin) const {
    const int64_t size = s.format == TQ_KV_F16 ? 2 : 4;
    return static_cast<char *>(data(s)) +
           (head * head_stride(s) + (int64_t(s.first) + position - begin) * row_stride(s)) * size;
  }
};

class Append {
 public:
  Append(const tq_attend_params &params, Strided keys, Strided values, int n)
      : p_(params), sides_{Side(params, false), Side(params, true)}, new_{keys, values}, n_(n) {
    for (int s = 0; s < p_.n_segments; s++) {
      const tq_segment &segment = p_.segments[s];
      if (segment.format == TQ_KV_PACKED) {
        has_packed_ = true;
        first_block_[s] = std::max<int64_t>(0, round_up(p_.pack_from - segment.position, BLOCK_TOKENS) / BLOCK_TOKENS);
        new_blocks_ += std::max(0, segment.count / BLOCK_TOKENS - first_block_[s]);
      } else {
        recent_ = &segment;
      }
    }
  }

  void run() {
    if (new_blocks_ > 0) {
      const int64_t items = 2 * int64_t(p_.n_kv_heads) * new_blocks_;
      parallel([&](int i, int n) {
        const Share share(items, i, n);
        for (int64_t item = share.first; item < share.last; item++) pack(item);
      });
    }
    // Rows that stay are moved only after the blocks were packed from them.
    const auto store_heads = [&](int i, int n) {
      const Share share(2 * p_.n_kv_heads, i, n);
      for (int64_t item = share.first; item < share.last; item++) store(sides_[item % 2], item / 2);
    };
    if (int64_t(n_) * p_.n_kv_heads * (p_.head_dim + p_.value_dim) < PARALLEL_VALUES) {
      store_heads(0, 1);
    } else {
      parallel(store_heads);
    }
  }

 private:
  const float *input(const Side &side, int head, int position) const {
    const Strided &from = new_[side.values];
    return from.data + head * from.head_stride + int64_t(position - p_.position) * from.row_stride;
  }

  // One block of the keys or values of one head.
  void pack(int64_t item) const {
    const Side &side = sides_[item % 2];
    const int head = item / 2 % p_.n_kv_heads;
    int64_t block = item / 2 / p_.n_kv_heads;
    int s = 0;
    for (;; s++) {
      if (p_.segments[s].format != TQ_KV_PACKED) continue;
      const int64_t here = std::max(0, p_.segments[s].count / BLOCK_TOKENS - first_block_[s]);
      if (block < here) break;
      block -= here;
    }
    const tq_segment &segment = p_.segments[s];
    block += first_block_[s];
    const int64_t width = round_up(side.dim, BLOCK_COLUMNS);
    float *x = scratch<float>(HIDDEN, width + BLOCK_TOKENS * width / 4);
    uint8_t *codes = reinterpret_cast<uint8_t *>(x + width);
    memset(codes, 0, BLOCK_TOKENS * width);
    const int64_t first_row = segment.first + block * BLOCK_TOKENS;
    uint16_t *scales = side.scales(segment) + int64_t(head) * segment.capacity + first_row;
    for (int t = 0; t < BLOCK_TOKENS; t++) {
      load(side, head, segment.position + block * BLOCK_TOKENS + t, x);
      if (side.rotation->n > 0) rotate_row(*side.rotation, x, x);
      scales[t] = side.coder.encode(x, side.dim, codes + t * width);
    }
    uint8_t *to = static_cast<uint8_t *>(side.data(segment)) + head * side.head_stride(segment) +
                  first_row / BLOCK_TOKENS * side.block_size();
    (side.values ? pack_values : pack_keys)(codes, width, side.dim, side.bits, to);
  }

  // A token that is new, or still in its row from before this call.
  void load(const Side &side, int head, int position, float *x) const {
    if (position >= p_.position) {
      std::copy_n(input(side, head, position), side.dim, x);
      return;
    }
    const char *from = side.row(*recent_, head, position, p_.pack_from);
    if (recent_->format == TQ_KV_F16) {
      to_float(reinterpret_cast<const uint16_t *>(from), side.dim, x);
    } else {
      memcpy(x, from, side.dim * sizeof(float));
    }
  }

  void store(const Side &side, int head) const {
    for (int s = 0; s < p_.n_segments; s++) {
      const tq_segment &segment = p_.segments[s];
      if (segment.format == TQ_KV_PACKED) continue;
      if (has_packed_ && &segment == recent_ && p_.pack_from != segment.position) {
        const int64_t size = (segment.format == TQ_KV_F16 ? 2 : 4) * side.row_stride(segment);
        const int64_t staying = p_.position - segment.position;
        if (staying > 0) {
          memmove(side.row(segment, head, segment.position, segment.position),
                  side.row(segment, head, segment.position, p_.pack_from), staying * size);
        }
      }
      const int last = std::min(p_.position + n_, segment.position + segment.count);
      for (int position = std::max(p_.position, segment.position); position < last; position++) {
        char *to = side.row(segment, head, position, segment.position);
        const float *from = input(side, head, position);
        if (segment.format == TQ_KV_F16) {
          to_half(from, side.dim, reinterpret_cast<uint16_t *>(to));
        } else {
          memcpy(to, from, side.dim * sizeof(float));
        }
      }
    }
  }

  const tq_attend_params &p_;
  const Side sides_[2];
  const Strided new_[2];  // keys, values
  const int n_;
  const tq_segment *recent_ = nullptr;
  bool has_packed_ = false;
  int first_block_[4] = {};  // of a packed segment, that is new
  int64_t new_blocks_ = 0;
};

}  // namespace

void append(const tq_attend_params &params, Strided keys, Strided values, int n) {
  if (n > 0) Append(params, keys, values, n).run();
}

}  // namespace tq

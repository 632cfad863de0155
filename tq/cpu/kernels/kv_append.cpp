// New tokens of a key-value cache: stored as rows, or packed in blocks of 64 as these fill.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "attention.h"
#include "kv_basis.h"
#include "kv_encode.h"
#include "kv_half.h"
#include "kv_layout.h"

namespace tq {
namespace {

constexpr int64_t PARALLEL_VALUES = 16 * 1024;  // from here on storing rows takes longer than waking a thread

// Keys or values: the two are treated alike.
struct Side {
  bool values;
  int dim;
  const tq_kv_side &code;
  std::vector<VectorCoder> coders;  // of the parts

  Side(const tq_attend_params &p, bool values)
      : values(values), dim(values ? p.value_dim : p.head_dim), code(values ? p.code.values : p.code.keys) {
    for (int i = 0; i < code.n_parts; i++) coders.emplace_back(code.parts[i]);
  }

  void *data(const tq_segment &s) const { return values ? s.values : s.keys; }
  uint16_t *scales(const tq_segment &s) const { return values ? s.value_scales : s.key_scales; }
  int64_t head_stride(const tq_segment &s) const { return values ? s.value_head_stride : s.key_head_stride; }
  int64_t row_stride(const tq_segment &s) const {
    const int64_t stride = values ? s.value_row_stride : s.key_row_stride;
    return stride ? stride : dim;
  }
  int32_t *order(const tq_segment &s, int head) const {
    int32_t *orders = values ? s.value_order : s.key_order;
    return code.ordered ? orders + int64_t(head) * dim : nullptr;
  }

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
        if (!has_packed_ && p_.pack_from <= segment.position) unordered_ = &segment;
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
      if (unordered_ && (sides_[0].code.ordered || sides_[1].code.ordered)) find_orders();
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
    const int n_planes = planes(side.code), width = code_width(side.code);
    int64_t columns = 0;
    for (int i = 0; i < side.code.n_parts; i++) columns += round_up(side.code.parts[i].dim, BLOCK_COLUMNS);
    float *x = scratch<float>(HIDDEN, side.dim + width + BLOCK_TOKENS * columns / 4), *turned = x + side.dim;
    uint8_t *codes = reinterpret_cast<uint8_t *>(turned + width);
    memset(codes, 0, BLOCK_TOKENS * columns);
    const int64_t row = segment.first + block * BLOCK_TOKENS;
    uint16_t *scales = side.scales(segment) + (int64_t(head) * segment.capacity + row) * n_planes;
    for (int t = 0; t < BLOCK_TOKENS; t++) {
      load(side, head, segment.position + block * BLOCK_TOKENS + t, x);
      to_code_basis(side.code, side.order(segment, head), x, turned);
      const float *from = turned;
      uint8_t *to = codes;
      uint16_t *plane = scales + t;
      for (int i = 0; i < side.code.n_parts; i++) {
        const tq_kv_part &part = side.code.parts[i];
        const int64_t part_columns = round_up(part.dim, BLOCK_COLUMNS);
        side.coders[i].encode(from, to + t * part_columns, plane, BLOCK_TOKENS);
        from += round_up(part.dim, TILE_ROWS), to += BLOCK_TOKENS * part_columns, plane += planes(part) * BLOCK_TOKENS;
      }
    }
    uint8_t *to = static_cast<uint8_t *>(side.data(segment)) + head * side.head_stride(segment) +
                  row / BLOCK_TOKENS * block_bytes_of(side.code, side.values);
    for (int i = 0; i < side.code.n_parts; i++) {
      const tq_kv_part &part = side.code.parts[i];
      const int64_t part_columns = round_up(part.dim, BLOCK_COLUMNS);
      (side.values ? pack_values : pack_keys)(codes, part_columns, part.dim, part.bits, to);
      codes += BLOCK_TOKENS * part_columns, to += block_bytes_of(part, side.values);
    }
  }

  // Of each head, from all tokens that are packed now, which are the first ones.
  void find_orders() const {
    const int begin = unordered_->position, end = begin + new_blocks_ * BLOCK_TOKENS;
    parallel([&](int i, int n) {
      const Share share(2 * p_.n_kv_heads, i, n);
      for (int64_t item = share.first; item < share.last; item++) {
        const Side &side = sides_[item % 2];
        const int head = item / 2;
        int32_t *order = side.order(*unordered_, head);
        if (!order) continue;
        std::vector<float> x(side.dim), energy(side.dim);
        for (int position = begin; position < end; position++) {
          load(side, head, position, x.data());
          for (int d = 0; d < side.dim; d++) energy[d] += x[d] * x[d];
        }
        for (float &e : energy) e = e < INFINITY ? e : INFINITY;  // what is no number can be ordered too
        std::iota(order, order + side.dim, 0);
        std::stable_sort(order, order + side.dim, [&](int32_t a, int32_t b) { return energy[a] > energy[b]; });
      }
    });
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
  const tq_segment *unordered_ = nullptr;  // the first packed segment, if nothing is packed in it yet
  int first_block_[4] = {};  // of a packed segment, that is new
  int64_t new_blocks_ = 0;
};

}  // namespace

void append(const tq_attend_params &params, Strided keys, Strided values, int n) {
  if (n > 0) Append(params, keys, values, n).run();
}

}  // namespace tq

// Attention: the work cut into units and pieces for the threads, queries brought in, results merged and written.
//
// A unit is a block of query rows of one kv head with the tokens they see. With units enough, threads take them one by
// one; with few, as while decoding, all blocks of tokens of all units form one line that is cut into equal pieces, and
// what the pieces of a unit found is merged.
#include "attention.h"

#include <math.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "attention_float.h"
#include "attention_packed.h"
#include "elementwise.h"
#include "kv_layout.h"

namespace tq {
namespace {

constexpr int UNIT_ROWS = 192;              // enough to make bringing in keys and values cheap, few enough for the cache
constexpr int UNITS_PER_THREAD = 4;         // from here on units are not cut
constexpr int64_t LEAST_PIECE = 32 * 1024;  // multiplications: a few microseconds, as waking a thread

struct Span {
  const tq_segment *segment;
  int first, last;  // tokens, counted from the segment's first
};

struct Unit {
  int batch, kv_head, first_query, n_queries;
  bool blind;  // as in Rows
  int n_spans = 0;
  Span spans[4];
  int64_t n_blocks = 0;  // of 64 tokens
};

class Attention {
 public:
  Attention(const tq_attend_params &params, const Sequences &batch, Strided q, int n_queries, Strided out, const Mask *mask)
      : p_(params), batch_(batch), q_(q), out_(out), mask_(mask), n_queries_(n_queries) {
    group_ = p_.n_heads / p_.n_kv_heads;
    const int fit = std::max(1, UNIT_ROWS / group_);
    query_blocks_ = (n_queries + fit - 1) / fit;
    block_queries_ = (n_queries + query_blocks_ - 1) / query_blocks_;
    head_width_ = round_up(p_.head_dim, TILE_ROWS);
    value_width_ = round_up(p_.value_dim, TILE_ROWS);
    for (int s = 0; s < p_.n_segments; s++) packed_ |= p_.segments[s].format == TQ_KV_PACKED;
    if (packed_) code_.emplace(p_);
    const int n_units = batch.count * p_.n_kv_heads * query_blocks_;
    begins_.assign(n_units + 1, 0);
    for (int u = 0; u < n_units; u++) begins_[u + 1] = begins_[u] + unit(u).n_blocks;
  }

  void run() {
    const int n_units = begins_.size() - 1, wanted = threads();
    const int64_t work = begins_.back() * BLOCK_TOKENS * block_queries_ * group_ * (p_.head_dim + p_.value_dim);
    if (n_units >= UNITS_PER_THREAD * wanted || begins_.back() == 0) {
      // The last queries see most: they go first.
      share_out(n_units, work, [&](int i) { whole(n_units - 1 - i); });
      return;
    }
    const int n_pieces = std::clamp<int64_t>(work / LEAST_PIECE, 1, wanted);
    const auto cut_partials = [&](Cutter memory) {
      for (Partial &partial : partials_) cut(partial, block_queries_ * group_, value_width_, packed_, memory);
      return memory.bytes();
    };
    partials_.resize(2 * n_pieces);
    cut_partials(Cutter(scratch<char>(ACCUMULATORS, cut_partials(Cutter(nullptr)))));
    share_out(n_pieces, work, [&](int i) { piece(i, n_pieces); });
    for (int u = 0; u < n_units; u++) merge_pieces(u, n_pieces);
  }

 private:
  Unit unit(int index) const {
    Unit unit;
    unit.first_query = index % query_blocks_ * block_queries_;
    unit.n_queries = std::min(block_queries_, n_queries_ - unit.first_query);
    unit.kv_head = index / query_blocks_ % p_.n_kv_heads;
    unit.batch = index / query_blocks_ / p_.n_kv_heads;
    unit.blind = false;
    const int first = p_.position + unit.first_query, last = first + unit.n_queries - 1;
    for (int query = first; query <= last; query++) unit.blind |= !sees_something(query);
    for (int s = 0; s < p_.n_segments; s++) {
      const tq_segment &segment = p_.segments[s];
      Span span = {&segment, 0, segment.count};
      if (p_.causal && !unit.blind) span.last = std::min(span.last, last + 1 - segment.position);
      if (p_.window > 0 && !unit.blind) span.first = std::max(0, first - p_.window + 1 - segment.position);
      span.first = round_down(span.first, BLOCK_TOKENS);
      if (span.first >= span.last) continue;
      unit.spans[unit.n_spans++] = span;
      unit.n_blocks += (span.last - span.first + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    }
    return unit;
  }

  bool sees_something(int query) const {
    for (int s = 0; s < p_.n_segments; s++) {
      const tq_segment &segment = p_.segments[s];
      const int last = segment.position + segment.count - 1;
      const bool later = p_.causal && segment.position > query, earlier = p_.window > 0 && last <= query - p_.window;
      if (segment.count > 0 && !later && !earlier) return true;
    }
    return false;
  }

  // task(i) for each i < n, by whichever thread is free.
  template <class F>
  void share_out(int n, int64_t work, F &&task) const {
    std::atomic<int> next{0};
    const auto take = [&] {
      for (int i; (i = next.fetch_add(1)) < n;) task(i);
    };
    if (n == 1 || work < 2 * LEAST_PIECE) return take();
    parallel([&](int, int) { take(); });
  }

  void whole(int index) const {
    const Unit unit = this->unit(index);
    Rows rows = begin(unit, true);
    if (unit.n_blocks > 0) walk(unit, rows, 0, unit.n_blocks);
    finish(unit, rows.state);
  }

  // Cuts of the line of all blocks: piece i of n is [cut(i), cut(i + 1)).
  int64_t piece_begin(int i, int n) const { return begins_.back() * i / n; }

  void piece(int i, int n) {
    const int64_t first = piece_begin(i, n), last = piece_begin(i + 1, n);
    if (first == last) return;
    int u = std::upper_bound(begins_.begin(), begins_.end(), first) - begins_.begin() - 1;
    for (; begins_[u] < last; u++) {
      if (begins_[u] == begins_[u + 1]) continue;
      if (begins_[u] >= first && begins_[u + 1] <= last) {
        whole(u);
        continue;
      }
      const Unit unit = this->unit(u);
      Rows rows = begin(unit, false);
      rows.state = partials_[2 * i + (begins_[u] >= first)];
      rows.begin();
      walk(unit, rows, std::max<int64_t>(first - begins_[u], 0), std::min(last - begins_[u], unit.n_blocks));
    }
  }

  // The unit's results, if several pieces have parts of it, or if nobody had it.
  void merge_pieces(int u, int n) {
    const int64_t first = begins_[u], last = begins_[u + 1];
    const Unit unit = this->unit(u);
    if (first == last) return whole(u);
    Partial *total = nullptr;
    for (int i = 0; i < n; i++) {
      const int64_t begin = piece_begin(i, n), end = piece_begin(i + 1, n);
      if (end <= first || begin >= last || begin == end) continue;
      if (begin <= first && end >= last) return;
      Partial &part = partials_[2 * i + (first >= begin)];
      if (total) {
        merge(part, unit.n_queries * group_, value_width_, *total);
      } else {
        total = &part;
      }
    }
    finish(unit, *total);
  }

  // Memory of this thread for the rows of a unit, and their queries.
  Rows begin(const Unit &unit, bool own_state) const {
    Rows rows{};
    rows.params = &p_;
    rows.mask = mask_;
    rows.batch = unit.batch;
    rows.kv_head = unit.kv_head;
    rows.first_query = unit.first_query;
    rows.count = unit.n_queries * group_;
    rows.group = group_;
    rows.head_width = head_width_;
    rows.value_width = value_width_;
    rows.packed = packed_;
    rows.blind = unit.blind;
    const auto cut_all = [&](Cutter memory) {
      rows.cut(memory);
      if (own_state) cut(rows.state, rows.count, value_width_, packed_, memory);
      return memory.bytes();
    };
    cut_all(Cutter(scratch<char>(SCORES, cut_all(Cutter(nullptr)))));
    if (own_state) rows.begin();
    for (int r = 0; r < rows.count; r++) {
      const float *from = q_.data + unit.batch * batch_.q_stride + rows.head(r) * q_.head_stride +
                          rows.query(r) * q_.row_stride;
      float *to = rows.queries + int64_t(r) * head_width_;
#pragma omp simd
      for (int i = 0; i < p_.head_dim; i++) to[i] = from[i] * p_.scale;
      std::fill(to + p_.head_dim, to + head_width_, 0.f);
      if (!packed_) continue;
      float *turned = rows.turned + int64_t(r) * head_width_;
      std::copy_n(to, head_width_, turned);
      if (p_.code.key_rotation.n > 0) rotate_row(p_.code.key_rotation, to, turned);
      if (!p_.exact) quantize_row(turned, p_.head_dim, rows.codes, r);
    }
    return rows;
  }

  // Over blocks [first, last) of the unit's tokens.
  void walk(const Unit &unit, Rows &rows, int64_t first, int64_t last) const {
    int64_t begin = 0;  // of the span
    for (int s = 0; s < unit.n_spans && begin < last; s++) {
      const Span &span = unit.spans[s];
      const int64_t n = (span.last - span.first + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
      const int64_t from = std::max(first - begin, int64_t(0)), to = std::min(last - begin, n);
      if (from < to) {
        const int token = span.first + from * BLOCK_TOKENS;
        visit(*span.segment, unit, rows, token, std::min<int64_t>(span.last, span.first + to * BLOCK_TOKENS) - token);
      }
      begin += n;
    }
  }

  void visit(const tq_segment &segment, const Unit &unit, Rows &rows, int token, int count) const {
    const int64_t row = segment.first + token;
    const int64_t keys = unit.batch * segment.key_batch_stride + unit.kv_head * segment.key_head_stride;
    const int64_t values = unit.batch * segment.value_batch_stride + unit.kv_head * segment.value_head_stride;
    const int position = segment.position + token;
    if (segment.format == TQ_KV_PACKED) {
      const int64_t block = row / BLOCK_TOKENS;
      const int64_t scales = (int64_t(unit.batch) * p_.n_kv_heads + unit.kv_head) * segment.capacity + row;
      const PackedTokens tokens = {
          static_cast<const uint8_t *>(segment.keys) + keys + block * key_block_bytes(p_.head_dim, p_.code.key_bits),
          static_cast<const uint8_t *>(segment.values) + values +
              block * value_block_bytes(p_.value_dim, p_.code.value_bits),
          segment.key_scales + scales, segment.value_scales + scales, count, position};
      return attend_packed(rows, tokens, *code_);
    }
    const int64_t key_row = segment.key_row_stride ? segment.key_row_stride : p_.head_dim;
    const int64_t value_row = segment.value_row_stride ? segment.value_row_stride : p_.value_dim;
    const auto floats = [&]<class T>(const T *all_keys, const T *all_values) {
      attend_floats<T>(rows, {all_keys + keys + row * key_row, all_values + values + row * value_row, key_row,
                              value_row, count, position});
    };
    if (segment.format == TQ_KV_F16) {
      floats(static_cast<const uint16_t *>(segment.keys), static_cast<const uint16_t *>(segment.values));
    } else {
      floats(static_cast<const float *>(segment.keys), static_cast<const float *>(segment.values));
    }
  }

  void finish(const Unit &unit, const Partial &state) const {
    for (int r = 0; r < unit.n_queries * group_; r++) {
      const int head = unit.kv_head * group_ + r % group_, query = unit.first_query + r / group_;
      float *sums = state.sums + int64_t(r) * value_width_;
      if (packed_) {
        float *rotated = state.rotated + int64_t(r) * value_width_;
        if (p_.code.value_rotation.n > 0) unrotate_row(p_.code.value_rotation, rotated, rotated);
#pragma omp simd
        for (int i = 0; i < p_.value_dim; i++) sums[i] += rotated[i];
      }
      float weight = state.weight[r], factor = 1.f;
      if (p_.sinks) {
        const float largest = std::max(state.largest[r], p_.sinks[head]);
        factor = fast_exp(state.largest[r] - largest);
        weight = weight * factor + fast_exp(p_.sinks[head] - largest);
      }
      // As MLX: without any token zeros; with nothing but scores of -infinity NaN.
      if (state.largest[r] == -INFINITY && !p_.sinks) weight = unit.n_blocks > 0 ? NAN : INFINITY;
      factor /= weight;
      float *to = out_.data + unit.batch * batch_.out_stride + head * out_.head_stride + query * out_.row_stride;
#pragma omp simd
      for (int i = 0; i < p_.value_dim; i++) to[i] = sums[i] * factor;
    }
  }

  const tq_attend_params &p_;
  const Sequences &batch_;
  const Strided q_, out_;
  const Mask *mask_;
  const int n_queries_;
  int group_, query_blocks_, block_queries_, head_width_, value_width_;
  bool packed_ = false;
  std::optional<PackedCode> code_;
  std::vector<int64_t> begins_;    // of each unit, in the line of all blocks
  std::vector<Partial> partials_;  // for each piece: of a unit that began before it, and of one that goes on after it
};

}  // namespace

void attend(const tq_attend_params &params, const Sequences &batch, Strided q, int n_queries, Strided out,
            const Mask *mask) {
  if (n_queries > 0 && batch.count > 0) Attention(params, batch, q, n_queries, out, mask).run();
}

void attend(const tq_attend_params &params, Strided q, int n_queries, Strided out) {
  attend(params, {1, 0, 0}, q, n_queries, out, nullptr);
}

}  // namespace tq

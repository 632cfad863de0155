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
#include "kv_basis.h"
#include "kv_layout.h"

namespace tq {
namespace {

constexpr int UNIT_ROWS = 192;              // enough to make bringing in keys and values cheap, few enough for the cache
constexpr int UNITS_PER_THREAD = 4;         // from here on units are not cut
constexpr int64_t LEAST_PIECE = 32 * 1024;  // multiplications: a few microseconds, as waking a thread

struct Span {
  const tq_segment *segment;
  int first, last;  // tokens, counted from the segment's first, or from the beginning of the block that has it
};

// Tokens that a packed segment's first block holds before the segment begins.
int hidden(const tq_segment &segment) { return segment.format == TQ_KV_PACKED ? segment.first % BLOCK_TOKENS : 0; }

struct Unit {
  int batch, kv_head, first_query, n_queries;
  bool blind;  // as in Rows
  int n_spans = 0;
  Span spans[4];
  int64_t n_blocks = 0;  // of 64 tokens
};

class Attention {
 public:
  Attention(const tq_attend_params *params, const Sequences &batch, Strided q, int n_queries, Strided out, const Mask *mask)
      : p_(*params), batch_(batch), q_(q), out_(out), mask_(mask), n_queries_(n_queries) {
    group_ = p_.n_heads / p_.n_kv_heads;
    const int fit = std::max(1, UNIT_ROWS / group_);
    query_blocks_ = (n_queries + fit - 1) / fit;
    block_queries_ = (n_queries + query_blocks_ - 1) / query_blocks_;
    head_width_ = round_up(p_.head_dim, TILE_ROWS);
    value_width_ = round_up(p_.value_dim, TILE_ROWS);
    for (int b = 0; b < (batch.own_params ? batch.count : 1); b++) packed_ |= packed_segment(b) != nullptr;
    if (packed_) {
      code_.emplace(p_, p_.exact);
      head_width_ = std::max(head_width_, code_width(p_.code.keys));
      value_width_ = std::max(value_width_, code_width(p_.code.values));
    }
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
    const tq_attend_params &p = params(unit.batch);
    const int first = p.position + unit.first_query, last = first + unit.n_queries - 1;
    for (int query = first; query <= last; query++) unit.blind |= !sees_something(p, query);
    for (int s = 0; s < p.n_segments; s++) {
      const tq_segment &segment = p.segments[s];
      if (segment.count == 0) continue;
      const int skipped = hidden(segment), position = segment.position - skipped;
      Span span = {&segment, 0, segment.count + skipped};
      if (p.causal && !unit.blind) span.last = std::min(span.last, last + 1 - position);
      if (p.window > 0 && !unit.blind) span.first = std::max(0, first - p.window + 1 - position);
      span.first = round_down(span.first, BLOCK_TOKENS);
      if (span.first >= span.last) continue;
      unit.spans[unit.n_spans++] = span;
      unit.n_blocks += (span.last - span.first + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    }
    return unit;
  }

  const tq_attend_params &params(int batch) const { return (&p_)[batch_.own_params ? batch : 0]; }

  // A segment with packed tokens, or NULL.
  const tq_segment *packed_segment(int batch) const {
    const tq_attend_params &p = params(batch);
    for (int s = 0; s < p.n_segments; s++) {
      if (p.segments[s].format == TQ_KV_PACKED && p.segments[s].count > 0) return &p.segments[s];
    }
    return nullptr;
  }

  // The order of a kv head's keys or values. Without packed tokens nothing is read in it.
  const int32_t *order(const Unit &unit, bool values) const {
    const tq_segment *segment = packed_segment(unit.batch);
    const int32_t *orders = !segment ? nullptr : values ? segment->value_order : segment->key_order;
    if (!orders) return nullptr;
    const int64_t head = (batch_.own_params ? 0 : int64_t(unit.batch) * p_.n_kv_heads) + unit.kv_head;
    return orders + head * (values ? p_.value_dim : p_.head_dim);
  }

  static bool sees_something(const tq_attend_params &p, int query) {
    for (int s = 0; s < p.n_segments; s++) {
      const tq_segment &segment = p.segments[s];
      const int last = segment.position + segment.count - 1;
      const bool later = p.causal && segment.position > query, earlier = p.window > 0 && last <= query - p.window;
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
    rows.params = &params(unit.batch);
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
    const bool turns = packed_segment(unit.batch);
    const int32_t *key_order = turns ? order(unit, false) : nullptr;
    for (int r = 0; r < rows.count; r++) {
      const float *from = q_.data + unit.batch * batch_.q_stride + rows.head(r) * q_.head_stride +
                          rows.query(r) * q_.row_stride;
      float *to = rows.queries + int64_t(r) * head_width_;
#pragma omp simd
      for (int i = 0; i < p_.head_dim; i++) to[i] = from[i] * p_.scale;
      std::fill(to + p_.head_dim, to + head_width_, 0.f);
      if (!turns) continue;
      float *turned = rows.turned + int64_t(r) * head_width_;
      to_code_basis(p_.code.keys, key_order, to, turned);
      const int used = code_width(p_.code.keys);
      std::fill(turned + used, turned + head_width_, 0.f);
      if (!p_.exact) quantize_query(*code_, turned, rows.codes, r);
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
    const int batch = batch_.own_params ? 0 : unit.batch, skipped = hidden(segment);
    const int64_t row = segment.first - skipped + token;
    const int64_t keys = batch * segment.key_batch_stride + unit.kv_head * segment.key_head_stride;
    const int64_t values = batch * segment.value_batch_stride + unit.kv_head * segment.value_head_stride;
    const int position = segment.position - skipped + token;
    if (segment.format == TQ_KV_PACKED) {
      const int64_t block = row / BLOCK_TOKENS;
      const int64_t scales = (int64_t(batch) * p_.n_kv_heads + unit.kv_head) * segment.capacity + row;
      const PackedTokens tokens = {static_cast<const uint8_t *>(segment.keys) + keys + block * code_->keys.block_bytes,
                                   static_cast<const uint8_t *>(segment.values) + values + block * code_->values.block_bytes,
                                   segment.key_scales + scales * code_->keys.planes,
                                   segment.value_scales + scales * code_->values.planes,
                                   count, position, std::max(0, skipped - token)};
      return p_.exact ? attend_unpacked(rows, tokens, *code_) : attend_packed(rows, tokens, *code_);
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
    const bool turned = packed_segment(unit.batch);
    const int32_t *value_order = turned ? order(unit, true) : nullptr;
    for (int r = 0; r < unit.n_queries * group_; r++) {
      const int head = unit.kv_head * group_ + r % group_, query = unit.first_query + r / group_;
      float *sums = state.sums + int64_t(r) * value_width_;
      if (turned) {
        float *rotated = state.rotated + int64_t(r) * value_width_, *back = scratch<float>(PANEL, p_.value_dim);
        from_code_basis(p_.code.values, value_order, rotated, back);
#pragma omp simd
        for (int i = 0; i < p_.value_dim; i++) sums[i] += back[i];
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

  const tq_attend_params &p_;  // of the first sequence, or of all
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

void attend(const tq_attend_params *params, const Sequences &batch, Strided q, int n_queries, Strided out,
            const Mask *mask) {
  if (n_queries > 0 && batch.count > 0) Attention(params, batch, q, n_queries, out, mask).run();
}

void attend(const tq_attend_params &params, Strided q, int n_queries, Strided out) {
  attend(&params, {1, 0, 0}, q, n_queries, out, nullptr);
}

}  // namespace tq

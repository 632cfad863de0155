// The gated feed-forward network of experts: down(act(gate(x)) * up(x)) for the experts of each token.
//
// Three parallel steps for a token: gates and ups of all its experts, activation and rotation, downs. A prompt goes in
// chunks of tokens, which bound the memory; the rows that go to one expert are multiplied together.
#include <algorithm>
#include <vector>

#include "elementwise.h"
#include "internal.h"
#include "product.h"

namespace tq {
namespace {

constexpr int64_t CHUNK_BYTES = 64 << 20;  // of intermediate rows
constexpr int64_t SERIAL = 1 << 12;        // floats that are not worth a second thread

enum { ROTATED = EXPERTS, GATE, UP, DOWN };  // slots of scratch memory

template <class F>
void for_rows(int64_t rows, int64_t columns, F &&f) {
  const auto share = [&](int i, int n) {
    const Share share(rows, i, n);
    for (int64_t row = share.first; row < share.last; row++) f(row);
  };
  if (rows * columns <= SERIAL) share(0, 1);
  else parallel(share);
}

// All rows are (token, place among its k experts).
class Network {
 public:
  Network(const tq_experts_params &params, int k) : p_(params), k_(k) {}

  // y (tokens, k, out).
  void run(const float *x, const uint32_t *expert, int tokens, float *y) const {
    const int64_t rows = int64_t(tokens) * k_;
    float *gate = scratch<float>(GATE, rows * p_.gate.rows), *up = scratch<float>(UP, rows * p_.up.rows);
    multiply_inputs(rotated(x, tokens), expert, tokens, gate, up);
    const int hidden = p_.gate.rows;
    for_rows(rows, hidden, [&](int64_t row) {
      float *h = gate + row * hidden;
      gated(p_.activation, p_.alpha, p_.limit, h, up + row * hidden, h, hidden);
      if (p_.hidden_rotation.n > 0) rotate_row(p_.hidden_rotation, h, h);
    });
    const GatheredProduct down{&p_.down, y, p_.down.rows};
    multiply_gathered(&down, 1, gate, hidden, nullptr, expert, static_cast<int>(rows), p_.exact);
  }

  // y (tokens, out), summed with weights (tokens, k).
  void run_weighted(const float *x, const uint32_t *expert, const float *weight, int tokens, float *y) const {
    const int out = p_.down.rows;
    float *down = scratch<float>(DOWN, int64_t(tokens) * k_ * out);
    run(x, expert, tokens, down);
    for_rows(tokens, int64_t(k_) * out, [&](int64_t token) {
      sum_experts(down + token * k_ * out, weight + token * k_, k_, out, y + token * out);
    });
  }

  int most_tokens(bool weighted) const {
    const int64_t floats = p_.gate.rows + p_.up.rows + (weighted ? p_.down.rows : 0);
    return static_cast<int>(std::max<int64_t>(1, CHUNK_BYTES / int64_t(sizeof(float)) / (floats * k_)));
  }

 private:
  const float *rotated(const float *x, int tokens) const {
    if (p_.in_rotation.n == 0) return x;
    const int columns = p_.gate.columns;
    float *y = scratch<float>(ROTATED, int64_t(tokens) * columns);
    for_rows(tokens, columns, [&](int64_t t) { rotate_row(p_.in_rotation, x + t * columns, y + t * columns); });
    return y;
  }

  void multiply_inputs(const float *x, const uint32_t *expert, int tokens, float *gate, float *up) const {
    if (tokens == 1) return multiply_input(x, expert, gate, up);
    std::vector<int32_t> x_row(int64_t(tokens) * k_);
    for (size_t row = 0; row < x_row.size(); row++) x_row[row] = static_cast<int32_t>(row / k_);
    const GatheredProduct products[] = {{&p_.gate, gate, p_.gate.rows}, {&p_.up, up, p_.up.rows}};
    const int rows = static_cast<int>(x_row.size());
    multiply_gathered(products, 2, x, p_.gate.columns, x_row.data(), expert, rows, p_.exact);
  }

  // One token: its row is quantized once for all experts.
  void multiply_input(const float *x, const uint32_t *expert, float *gate, float *up) const {
    Batch batch{x, p_.gate.columns, nullptr, nullptr, 1, 0};
    std::vector<Job> jobs;
    jobs.reserve(2 * k_);
    for (int i = 0; i < k_; i++) {
      const int e = static_cast<int>(expert[i]);
      jobs.push_back({&batch, &p_.gate, e, gate + int64_t(i) * p_.gate.rows, p_.gate.rows});
      jobs.push_back({&batch, &p_.up, e, up + int64_t(i) * p_.up.rows, p_.up.rows});
    }
    multiply_batches(&batch, 1, jobs.data(), static_cast<int>(jobs.size()), p_.exact);
  }

  const tq_experts_params &p_;
  const int k_;
};

}  // namespace

void sum_experts(const float *terms, const float *weights, int k, int columns, float *sum) {
  std::fill_n(sum, columns, 0.f);
  for (int place = 0; place < k; place++) {
    const float *term = terms + int64_t(place) * columns, factor = weights[place];
#pragma omp simd
    for (int i = 0; i < columns; i++) sum[i] += factor * term[i];
  }
}

}  // namespace tq

void tq_experts(const void *params, const tq_array *in, const tq_array *out) {
  const auto &p = *static_cast<const tq_experts_params *>(params);
  const int tokens = in[1].shape[0], k = in[1].shape[1];
  const bool weighted = out[0].ndim == 2;
  if (tokens == 0) return;
  const tq::Network network(p, k);
  const int chunks = (tokens - 1) / network.most_tokens(weighted) + 1;
  for (int chunk = 0; chunk < chunks; chunk++) {
    const tq::Share share(tokens, chunk, chunks);
    const int64_t first = share.first, count = share.last - share.first;
    const float *x = static_cast<const float *>(in[0].data) + first * p.gate.columns;
    const uint32_t *expert = static_cast<const uint32_t *>(in[1].data) + first * k;
    float *y = static_cast<float *>(out[0].data);
    if (weighted) {
      const float *weight = static_cast<const float *>(in[2].data) + first * k;
      network.run_weighted(x, expert, weight, static_cast<int>(count), y + first * p.down.rows);
    } else {
      network.run(x, expert, static_cast<int>(count), y + first * k * p.down.rows);
    }
  }
}

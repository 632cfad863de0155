// Products of rows with the matrices of the experts they were sent to.
#include <vector>

#include "internal.h"
#include "product.h"

namespace tq {

namespace {

struct Work {
  std::vector<Batch> batches;
  std::vector<Job> jobs;

  Work(int n_batches, int n_jobs) {
    batches.reserve(n_batches);  // jobs point into it
    jobs.reserve(n_jobs);
  }

  void run(bool exact) {
    const int n_batches = static_cast<int>(batches.size()), n_jobs = static_cast<int>(jobs.size());
    multiply_batches(batches.data(), n_batches, jobs.data(), n_jobs, exact);
  }
};

}  // namespace

void multiply_gathered(const GatheredProduct *products, int n_products, const float *x, int64_t x_stride,
                       const int32_t *x_row, const uint32_t *expert, int rows, bool exact) {
  if (n_products == 0 || rows == 0) return;
  const auto source_of = [&](int i) { return x_row ? x_row[i] : i; };
  const int experts = products[0].matrix->experts;
  std::vector<int32_t> first(experts + 1, 0);
  int busy = 0;
  for (int i = 0; i < rows; i++) busy += first[expert[i] + 1]++ == 0;

  Work work(rows, rows * n_products);
  if (busy == rows) {
    // As for a single token: no expert has two rows, but experts may share one, which is then quantized once.
    for (int i = 0; i < rows; i++) {
      const float *row = x + source_of(i) * x_stride;
      if (i == 0 || row != work.batches.back().x) work.batches.push_back({row, x_stride, nullptr, nullptr, 1, 0});
      for (int p = 0; p < n_products; p++) {
        const GatheredProduct &product = products[p];
        float *y = product.y + i * product.y_stride;
        work.jobs.push_back({&work.batches.back(), product.matrix, static_cast<int>(expert[i]), y, product.y_stride});
      }
    }
    return work.run(exact);
  }
  // Rows of one expert together (a counting sort), so that its matrices are decoded once for all of them.
  for (int e = 0; e < experts; e++) first[e + 1] += first[e];
  std::vector<int32_t> source(rows), target(rows), next(first.begin(), first.end() - 1);
  for (int i = 0; i < rows; i++) {
    const int at = next[expert[i]]++;
    target[at] = i;
    source[at] = source_of(i);
  }
  for (int e = 0; e < experts; e++) {
    const int count = first[e + 1] - first[e];
    if (count == 0) continue;
    work.batches.push_back({x, x_stride, source.data() + first[e], target.data() + first[e], count, 0});
    for (int p = 0; p < n_products; p++) {
      work.jobs.push_back({&work.batches.back(), products[p].matrix, e, products[p].y, products[p].y_stride});
    }
  }
  work.run(exact);
}

}  // namespace tq

void tq_gather_matmul(const void *params, const tq_array *in, const tq_array *out) {
  const auto &p = *static_cast<const tq_gather_params *>(params);
  const int inputs = static_cast<int>(tq::size_of(in[0]) / p.matrix.columns);
  const int rows = static_cast<int>(tq::size_of(in[1]));
  if (inputs == 0) return;
  std::vector<int32_t> x_row(rows);
  for (int i = 0; i < rows; i++) x_row[i] = i / (rows / inputs);
  const tq::GatheredProduct product{&p.matrix, static_cast<float *>(out[0].data), p.matrix.rows};
  tq::multiply_gathered(&product, 1, static_cast<const float *>(in[0].data), p.matrix.columns, x_row.data(),
                        static_cast<const uint32_t *>(in[1].data), rows, p.exact);
}

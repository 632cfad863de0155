// Products of rows with the matrices of the experts they were sent to.
#include <vector>

#include "internal.h"
#include "product.h"

namespace tq {

void multiply_gathered(const GatheredProduct *products, int n_products, const float *x, int64_t x_stride,
                       const int32_t *x_row, const uint32_t *expert, int rows, bool exact) {
  if (n_products == 0 || rows == 0) return;
  // Rows of one expert together (a counting sort), so that its matrices are decoded once for all of them.
  const int experts = products[0].matrix->experts;
  std::vector<int32_t> first(experts + 1, 0), source(rows), target(rows);
  for (int i = 0; i < rows; i++) first[expert[i] + 1]++;
  int busy = 0;
  for (int e = 0; e < experts; e++) {
    busy += first[e + 1] > 0;
    first[e + 1] += first[e];
  }
  std::vector<int32_t> next(first.begin(), first.end() - 1);
  for (int i = 0; i < rows; i++) {
    const int at = next[expert[i]]++;
    target[at] = i;
    source[at] = x_row ? x_row[i] : i;
  }
  std::vector<Batch> batches;
  std::vector<Job> jobs;
  batches.reserve(busy);  // jobs point into it
  jobs.reserve(int64_t(busy) * n_products);
  for (int e = 0; e < experts; e++) {
    const int count = first[e + 1] - first[e];
    if (count == 0) continue;
    batches.push_back({x, x_stride, source.data() + first[e], target.data() + first[e], count, 0});
    for (int p = 0; p < n_products; p++) {
      jobs.push_back({&batches.back(), products[p].matrix, e, products[p].y, products[p].y_stride});
    }
  }
  multiply_batches(batches.data(), static_cast<int>(batches.size()), jobs.data(), static_cast<int>(jobs.size()), exact);
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

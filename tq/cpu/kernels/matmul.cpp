// Products of packed matrices with rows of activations, shared out over the threads.
#include <algorithm>

#include "activations.h"
#include "internal.h"
#include "product.h"

namespace tq {
namespace {

// Fewer multiplications than this are not worth waking other threads for.
constexpr int64_t ALONE = 1 << 16;

// Time of one tile in arbitrary units: reading the codes, and multiplying.
int64_t tile_cost(const Job &job) {
  return int64_t(blocks(job.matrix->columns)) * (8 * job.matrix->bits + 2 * job.batch->rows);
}

// The tiles of all jobs that are thread i's of n.
void run_share(const Job *jobs, int n_jobs, const Activations *activations, int i, int n) {
  int64_t total = 0;
  for (int j = 0; j < n_jobs; j++) total += tiles(jobs[j].matrix->rows) * tile_cost(jobs[j]);
  const int64_t begin = total * i / n, end = total * (i + 1) / n;
  int64_t start = 0;
  for (int j = 0; j < n_jobs && start < end; j++) {
    const int64_t cost = tile_cost(jobs[j]), count = tiles(jobs[j].matrix->rows);
    const auto first_from = [&](int64_t at) {
      return static_cast<int>(std::clamp((at - start + cost - 1) / cost, int64_t(0), count));
    };
    const int first = first_from(begin), last = first_from(end);
    start += cost * count;
    if (first >= last) continue;
    if (!activations) multiply_exact(jobs[j], first, last);
    else if (jobs[j].batch->rows > 1) multiply_rows(jobs[j], *activations, first, last);
    else multiply_row(jobs[j], *activations, first, last);
  }
}

void quantize(const Batch *batches, int n_batches, const Activations &activations, int columns, int first, int last) {
  for (int b = 0; b < n_batches; b++) {
    const Batch &batch = batches[b];
    const int from = std::max(first - batch.first, 0);
    const int to = std::min(last - batch.first, Activations::padded(batch.rows));
    for (int row = from; row < to; row++) {
      const int group = row / MAX_ROWS * MAX_ROWS;
      const RowGroup x = activations.group(batch.first + group, Activations::width(batch.rows - group));
      quantize_row(row < batch.rows ? batch.input(row) : nullptr, columns, x, row - group);
    }
  }
}

}  // namespace

void multiply_batches(Batch *batches, int n_batches, const Job *jobs, int n_jobs, bool exact) {
  int padded = 0;
  int64_t work = 0;
  for (int b = 0; b < n_batches; b++) {
    batches[b].first = padded;
    padded += Activations::padded(batches[b].rows);
  }
  for (int j = 0; j < n_jobs; j++) {
    work += int64_t(jobs[j].batch->rows) * jobs[j].matrix->rows * jobs[j].matrix->columns;
  }
  if (work == 0) return;
  const int columns = jobs[0].matrix->columns;
  const Activations activations(exact ? 0 : padded, columns);
  auto share = [&](int i, int n) { run_share(jobs, n_jobs, exact ? nullptr : &activations, i, n); };
  if (!exact) {
    auto quantize_share = [&](int i, int n) {
      const Share rows(padded, i, n);
      quantize(batches, n_batches, activations, columns, static_cast<int>(rows.first), static_cast<int>(rows.last));
    };
    if (int64_t(padded) * columns < ALONE) quantize_share(0, 1);
    else parallel(quantize_share);
  }
  if (work < ALONE) share(0, 1);
  else parallel(share);
}

void multiply(const Product *products, int n_products, const float *x, int64_t x_stride, int rows, bool exact) {
  constexpr int MAX_PRODUCTS = 16;
  Batch batch{x, x_stride, nullptr, nullptr, rows, 0};
  Job jobs[MAX_PRODUCTS];
  for (int first = 0; first < n_products; first += MAX_PRODUCTS) {
    const int n = std::min(MAX_PRODUCTS, n_products - first);
    for (int i = 0; i < n; i++) {
      const Product &p = products[first + i];
      jobs[i] = {&batch, p.matrix, p.expert, p.y, p.y_stride};
    }
    multiply_batches(&batch, 1, jobs, n, exact);
  }
}

}  // namespace tq

void tq_matmul(const void *params, const tq_array *in, const tq_array *out) {
  const auto &p = *static_cast<const tq_matmul_params *>(params);
  const tq::Product product{&p.matrix, 0, static_cast<float *>(out[0].data), p.matrix.rows};
  const int rows = static_cast<int>(tq::size_of(in[0]) / p.matrix.columns);
  tq::multiply(&product, 1, static_cast<const float *>(in[0].data), p.matrix.columns, rows, p.exact);
}

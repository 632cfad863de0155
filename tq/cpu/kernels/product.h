// Products of lists of rows with matrices: what tq_matmul, tq_gather_matmul and fused layers are made of.
#pragma once
#include <stdint.h>

#include "internal.h"

namespace tq {

// Rows of x that meet the same matrices. Row i is x + (x_row ? x_row[i] : i) * x_stride, and its product goes to row
// (y_row ? y_row[i] : i) of y.
struct Batch {
  const float *x;
  int64_t x_stride;
  const int32_t *x_row, *y_row;
  int rows;
  int first;  // its place in the quantized activations: set by multiply_batches

  const float *input(int i) const { return x + int64_t(x_row ? x_row[i] : i) * x_stride; }
  int64_t output(int i) const { return y_row ? y_row[i] : i; }
};

// One matrix for the rows of a batch.
struct Job {
  const Batch *batch;
  const tq_matrix *matrix;
  int expert;
  float *y;
  int64_t y_stride;
};

// All jobs as one parallel step. All matrices have the same columns.
void multiply_batches(Batch *batches, int n_batches, const Job *jobs, int n_jobs, bool exact);

// The tiles [first_tile, last_tile) of a job on the calling thread: matvec.cpp, for a batch of one row; panel.cpp, for
// more; exact.cpp, for any number of rows, in float32.
class Activations;
void multiply_row(const Job &job, const Activations &x, int first_tile, int last_tile);
void multiply_rows(const Job &job, const Activations &x, int first_tile, int last_tile);
void multiply_exact(const Job &job, int first_tile, int last_tile);

}  // namespace tq

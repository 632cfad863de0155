// Small operations with the signature of kernels, for the tests of how MLX calls them.
#include <unistd.h>

#include "tq_cpu.h"

namespace {

int64_t count(const tq_array &a) {
  int64_t n = 1;
  for (int d = 0; d < a.ndim; d++) n *= a.shape[d];
  return n;
}

}  // namespace

extern "C" {

struct add_params {
  float number;
  const float *numbers;  // or NULL
  int64_t *calls;        // or NULL
  int32_t wait_us;
};

// out = in + number + numbers[0].
TQ_API void add(const void *params, const tq_array *in, const tq_array *out) {
  const auto &p = *static_cast<const add_params *>(params);
  if (p.wait_us) usleep(p.wait_us);
  if (p.calls) ++*p.calls;
  const float number = p.number + (p.numbers ? p.numbers[0] : 0);
  for (int64_t i = 0; i < count(*out); i++)
    static_cast<float *>(out->data)[i] = static_cast<const float *>(in->data)[i] + number;
}

// out = the bytes of in, of any type. Types, shapes and strides of both must be what they seem.
TQ_API void copy(const void *params, const tq_array *in, const tq_array *out) {
  const int64_t bytes = count(*in) * *static_cast<const int32_t *>(params);
  for (int64_t i = 0; i < bytes; i++) static_cast<char *>(out->data)[i] = static_cast<const char *>(in->data)[i];
}

// out (3 + 2 * ndim): type and dimensions of in, whether it is at a null address, its shape, its strides.
TQ_API void describe(const void *, const tq_array *in, const tq_array *out) {
  auto *y = static_cast<int32_t *>(out->data);
  y[0] = in->dtype, y[1] = in->ndim, y[2] = in->data == nullptr;
  for (int d = 0; d < in->ndim; d++) y[3 + d] = in->shape[d], y[3 + in->ndim + d] = int32_t(in->strides[d]);
}

// out (rows, columns) = in (rows, columns) by its strides, the last axis contiguous.
TQ_API void read_rows(const void *, const tq_array *in, const tq_array *out) {
  for (int r = 0; r < in->shape[0]; r++)
    for (int c = 0; c < in->shape[1]; c++)
      static_cast<float *>(out->data)[r * in->shape[1] + c] =
          static_cast<const float *>(in->data)[r * in->strides[0] + c];
}

struct append_params {
  int32_t row, wait_us;
};

// in: value (1). out: caches (n), which hold earlier rows; cache[row] = value, 10 * value; then the sum of both so far.
TQ_API void append(const void *params, const tq_array *in, const tq_array *out) {
  const auto &p = *static_cast<const append_params *>(params);
  if (p.wait_us) usleep(p.wait_us);
  const float value = *static_cast<const float *>(in->data);
  float *first = static_cast<float *>(out[0].data), *second = static_cast<float *>(out[1].data), sum = 0;
  first[p.row] = value, second[p.row] = 10 * value;
  for (int i = 0; i <= p.row; i++) sum += first[i] + second[i];
  *static_cast<float *>(out[2].data) = sum;
}

struct token_params {
  float number;
  int32_t position, row, rows;
};

// in: x. out: y = x + number + position + row + rows, then caches; the first number of the first one's row = x + position.
TQ_API void token(const void *params, const tq_array *in, const tq_array *out) {
  const auto &p = *static_cast<const token_params *>(params);
  const float *x = static_cast<const float *>(in->data);
  for (int64_t i = 0; i < count(*out); i++)
    static_cast<float *>(out->data)[i] = x[i] + p.number + float(p.position + p.row + p.rows);
  static_cast<float *>(out[1].data)[p.row] = x[0] + float(p.position);
}

// in: value (1). out: cache (n); cache[row] = value.
TQ_API void put(const void *params, const tq_array *in, const tq_array *out) {
  const auto &p = *static_cast<const append_params *>(params);
  if (p.wait_us) usleep(p.wait_us);
  static_cast<float *>(out->data)[p.row] = *static_cast<const float *>(in->data);
}

}  // extern "C"

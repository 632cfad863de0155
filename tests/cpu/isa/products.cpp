// A program that checks tq_matmul and tq_gather_matmul against doubles: for sanitizers and emulators, where Python is in
// the way. Every array has exactly the size that the kernels may touch. Prints what is wrong, and then returns 1, and a
// digest of all results.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "layout.h"
#include "tq_cpu.h"

namespace {

std::mt19937 random_bits(1);
int failures = 0;
uint64_t digest = 14695981039346656037u;  // of all results, bit by bit (FNV-1a)

float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(random_bits); }
float normal() { return std::normal_distribution<float>()(random_bits); }

// Positive normal numbers are enough here.
uint16_t to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits >> 13) - (112 << 10));
}
float from_half(uint16_t half) {
  const uint32_t bits = half ? (uint32_t(half) + (112 << 10)) << 13 : 0;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

struct Kind {
  int bits, group;
  bool affine, low, bias;
};

struct Matrix {
  std::vector<uint8_t> codes, table, table_low;
  std::vector<uint16_t> scales, biases;
  std::vector<float> values, bias;
  std::vector<double> dense, dense_bytes;  // [experts][rows][columns]: of the codebook, and of the tables of bytes
  tq_matrix c{};

  Matrix(const Kind &kind, int rows, int columns, int experts) : table(256, 99), table_low(256, 99), values(1 << kind.bits) {
    const int tiles = tq::tiles(rows), groups = kind.group ? (columns + kind.group - 1) / kind.group : 1;
    codes.assign(experts * tiles * tq::tile_bytes(columns, kind.bits), 0);
    scales.assign(size_t(experts) * tiles * groups * 16, 0);
    biases.assign(kind.affine ? scales.size() : 0, 0);
    bias.assign(kind.bias ? experts * rows : 0, 0);
    for (float &b : bias) b = normal();
    float most = 0;
    for (float &v : values) most = std::max(most, std::fabs(v = normal()));
    c.table_scale = kind.affine ? 1 : most / 127;
    for (size_t i = 0; i < values.size(); i++) {
      const float exact = values[i] / c.table_scale, rounded = std::nearbyint(exact);
      if (kind.affine) values[i] = static_cast<float>(i);
      table[i] = static_cast<uint8_t>(kind.affine ? i : 128 + int(rounded));
      table_low[i] = static_cast<uint8_t>(128 + std::min(127.0f, std::nearbyint((exact - rounded) * 256)));
    }
    dense.resize(size_t(experts) * rows * columns);
    dense_bytes.resize(dense.size());
    for (int e = 0; e < experts; e++) {
      for (int r = 0; r < rows; r++) {
        const size_t tile = size_t(e) * tiles + r / 16;
        for (int g = 0; g < groups; g++) {
          const size_t at = (tile * groups + g) * 16 + r % 16;
          scales[at] = to_half(uniform(0.5, 2));
          if (kind.affine) biases[at] = to_half(uniform(0.5, 2));
        }
        for (int column = 0; column < columns; column++) {
          const int code = static_cast<int>(random_bits() & ((1u << kind.bits) - 1));
          put(kind.bits, tile * tq::tile_bytes(columns, kind.bits), r % 16, column, code);
          const size_t at = (tile * groups + (kind.group ? column / kind.group : 0)) * 16 + r % 16;
          double byte = table[code] - (kind.affine ? 0 : 128);
          if (kind.low) byte += (table_low[code] - 128) / 256.0;
          const double scale = from_half(scales[at]), shift = kind.affine ? from_half(biases[at]) : 0;
          const size_t weight = (size_t(e) * rows + r) * columns + column;
          dense[weight] = values[code] * scale + shift;
          dense_bytes[weight] = c.table_scale * byte * scale + shift;
        }
      }
    }
    c.codes = codes.data();
    c.scales = scales.data();
    c.biases = kind.affine ? biases.data() : nullptr;
    c.table = table.data();
    c.table_low = kind.low ? table_low.data() : nullptr;
    c.values = values.data();
    c.bias = kind.bias ? bias.data() : nullptr;
    c.offset = kind.affine ? 0 : 128;
    c.rows = rows, c.columns = columns, c.experts = experts, c.bits = kind.bits, c.group = kind.group;
  }

  // As layout.h describes it, bit by bit.
  void put(int bits, size_t tile, int row, int column, int code) {
    const int step = column % 64 / 4, lane = 4 * row + column % 4;
    uint8_t *block = &codes[tile + size_t(column / 64) * tq::block_bytes(bits)];
    if (bits == 3) {
      uint8_t *half = block + 192 * (step / 8) + lane;
      const int u = step % 8;
      if (u < 6) {
        half[64 * (u / 2)] |= code << 3 * (u % 2);
      } else {
        for (int v = 0, six = code << 3 * (u - 6); v < 3; v++) half[64 * v] |= (six >> 2 * v & 3) << 6;
      }
      return;
    }
    for (int width = 8; width; width /= 2) {
      if (!(bits & width)) continue;
      const int per_byte = 8 / width;
      block[64 * (step / per_byte) + lane] |= (code & ((1 << width) - 1)) << width * (step % per_byte);
      block += 64 * 16 / per_byte;
      code >>= width;
    }
  }
};

// What is left of x in 8 bits with one scale per 64 columns.
std::vector<double> quantized(const std::vector<float> &x, int columns) {
  std::vector<double> result(x.size());
  for (size_t row = 0; row < x.size(); row += columns) {
    for (int first = 0; first < columns; first += 64) {
      const int n = std::min(64, columns - first);
      float most = 0;
      for (int i = 0; i < n; i++) most = std::max(most, std::fabs(x[row + first + i]));
      for (int i = 0; i < n; i++) {
        const size_t at = row + first + i;
        result[at] = double(most / 127) * std::nearbyint(x[at] * (127 / most));
      }
    }
  }
  return result;
}

double relative_error(const Matrix &matrix, const std::vector<double> &dense, const std::vector<double> &x,
                      const std::vector<uint32_t> &expert, const std::vector<float> &y) {
  const int rows = matrix.c.rows, columns = matrix.c.columns, n = static_cast<int>(expert.size());
  const int inputs = static_cast<int>(x.size()) / columns;
  double error = 0, size = 0;
  for (int i = 0; i < n; i++) {
    const double *row = &x[size_t(i / (n / inputs)) * columns];
    for (int r = 0; r < rows; r++) {
      const double *w = &dense[(size_t(expert[i]) * rows + r) * columns];
      double sum = matrix.c.bias ? matrix.bias[expert[i] * rows + r] : 0;
      for (int k = 0; k < columns; k++) sum += w[k] * row[k];
      error += std::pow(y[size_t(i) * rows + r] - sum, 2);
      size += sum * sum;
    }
  }
  return std::sqrt(error / size);
}

void check(const Kind &kind, int rows, int columns, int inputs, int experts) {
  const Matrix matrix(kind, rows, columns, experts);
  std::vector<float> x(size_t(inputs) * columns);
  for (float &v : x) v = normal();
  const int n = inputs * (experts > 1 ? 2 : 1);
  std::vector<uint32_t> expert(n, 0);
  for (uint32_t &e : expert) e = random_bits() % experts;
  const int32_t x_shape[] = {inputs, columns}, y_shape[] = {n, rows}, expert_shape[] = {n};
  const int64_t x_strides[] = {columns, 1}, y_strides[] = {rows, 1}, expert_strides[] = {1};
  for (int exact = 0; exact < 2; exact++) {
    std::vector<float> y(size_t(n) * rows, NAN);
    const tq_array in[] = {{x.data(), x_shape, x_strides, 2, TQ_F32},
                           {expert.data(), expert_shape, expert_strides, 1, TQ_U32}};
    const tq_array out = {y.data(), y_shape, y_strides, 2, TQ_F32};
    if (experts == 1) {
      const tq_matmul_params params = {matrix.c, exact};
      tq_matmul(&params, in, &out);
    } else {
      const tq_gather_params params = {matrix.c, exact};
      tq_gather_matmul(&params, in, &out);
    }
    for (float value : y) {
      uint32_t bits;
      memcpy(&bits, &value, 4);
      digest = (digest ^ bits) * 1099511628211u;
    }
    const std::vector<double> seen = exact ? std::vector<double>(x.begin(), x.end()) : quantized(x, columns);
    const double error = relative_error(matrix, exact ? matrix.dense : matrix.dense_bytes, seen, expert, y);
    if (error <= (exact ? 1e-5 : 1e-3)) continue;  // a code on the edge may be rounded to the other side
    failures++;
    printf("%s: %d bits, group %d, affine %d, low %d: %d x %d times %d rows, exact %d: error %g\n",
           experts == 1 ? "matmul" : "gather", kind.bits, kind.group, kind.affine, kind.low, rows, columns, n, exact, error);
  }
}

}  // namespace

int main() {
  if (const char *why = tq_self_check()) {
    printf("%s\n", why);
    return 1;
  }
  tq_set_threads(2);
  for (int bits = 1; bits <= 8; bits++) {
    for (int group : {0, 32, 64, 128}) {
      for (int variant = 0; variant < 3; variant++) {
        const Kind kind = {bits, group, variant == 1, variant == 2 && bits >= 7, variant > 0};
        if (variant == 2 && !kind.low) continue;
        for (int inputs : {1, 2, 3, 9, 20}) check(kind, 33, 100, inputs, 1);
        check(kind, 1, 32, 5, 1);
        check(kind, 16, 64, 1, 1);
        check(kind, 47, 580, 18, 1);
        check(kind, 40, 96, 12, 5);
      }
    }
  }
  printf("results %016llx\n%d failures\n", static_cast<unsigned long long>(digest), failures);
  return failures > 0;
}

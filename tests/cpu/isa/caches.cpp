// A program that checks attention, appending and unpacking against doubles: for sanitizers and emulators, where Python is
// in the way. Every array has exactly the size that the kernels may touch. Prints what is wrong and returns 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "attention.h"
#include "kv_half.h"
#include "kv_layout.h"

namespace {

using tq::BLOCK_TOKENS;

std::mt19937 random_bits(1);
int failures = 0;

float normal() { return std::normal_distribution<float>()(random_bits); }

// Exactly as much memory as is asked for, of numbers that show when they are read.
template <class T>
std::unique_ptr<T[]> garbage(size_t n) {
  std::unique_ptr<T[]> memory(new T[n]);
  for (size_t i = 0; i < n; i++) memory[i] = static_cast<T>(sizeof(T) == 4 ? NAN : 0x7fff);
  return memory;
}

struct Shape {
  int heads, kv_heads, head_dim, value_dim, tokens, queries;
};

// Keys or values in an array of one sequence, [kv head][tokens][dim].
enum Form { VECTORS, GROUPS, AFFINE, OUTLIERS };

struct Side {
  int dim;
  std::vector<float> given;
  std::vector<float> levels[2];  // of each part
  std::vector<uint8_t> table[2];
  tq_kv_side code{};

  Side(int kv_heads, int tokens, int dim, int bits, Form form) : dim(dim), given(size_t(kv_heads) * tokens * dim) {
    for (float &x : given) x = normal();
    const int few = form == OUTLIERS ? dim / 4 : 0;
    if (few > 0) add(few, std::min(bits + 2, 8), form);
    add(dim - few, bits, form);
    code.ordered = form == OUTLIERS;
  }

  void add(int n_numbers, int bits, Form form) {
    const int i = code.n_parts++, n = 1 << bits;
    tq_kv_part &part = code.parts[i];
    part.dim = n_numbers;
    part.bits = bits;
    part.group = form != OUTLIERS && form != VECTORS && n_numbers % 32 == 0 ? 32 : 0;
    part.affine = form == AFFINE;
    levels[i].resize(n);
    table[i].assign(256, 99);
    for (int c = 0; c < n; c++) levels[i][c] = part.affine ? c - n / 2 : (c + 0.5f - n / 2) * 4.8f / float(n);
    part.table_scale = part.affine ? 1 : levels[i][n - 1] / 127;
    for (int c = 0; c < n; c++) table[i][c] = uint8_t(128 + std::lround(levels[i][c] / part.table_scale));
    part.table = table[i].data();
    part.values = levels[i].data();
  }
};

std::vector<double> attention(const tq_attend_params &p, const Shape &s, const std::vector<float> &q,
                              const std::vector<float> &keys, const std::vector<float> &values) {
  std::vector<double> result;
  for (int h = 0; h < s.heads; h++) {
    const size_t head = size_t(h / (s.heads / s.kv_heads)) * s.tokens;
    for (int i = 0; i < s.queries; i++) {
      std::vector<double> sum(s.value_dim);
      double total = 0;
      for (int t = 0; t < s.tokens; t++) {
        const int own = p.position + i;
        if (t > own || (p.window > 0 && t <= own - p.window)) continue;
        double score = 0;
        for (int d = 0; d < s.head_dim; d++) {
          score += double(q[(size_t(h) * s.queries + i) * s.head_dim + d]) * keys[(head + t) * s.head_dim + d];
        }
        const double weight = std::exp(score * p.scale);
        total += weight;
        for (int d = 0; d < s.value_dim; d++) sum[d] += weight * values[(head + t) * s.value_dim + d];
      }
      for (double x : sum) result.push_back(x / total);
    }
  }
  return result;
}

void compare(const char *what, const Shape &s, const std::vector<double> &want, const float *got, double limit) {
  double error = 0, size = 0;
  for (size_t i = 0; i < want.size(); i++) {
    error += std::pow(got[i] - want[i], 2);
    size += want[i] * want[i];
  }
  if (std::sqrt(error / size) <= limit) return;
  failures++;
  printf("%s: %d heads, %d kv heads, dimensions %d and %d, %d tokens, %d queries: error %g\n", what, s.heads, s.kv_heads,
         s.head_dim, s.value_dim, s.tokens, s.queries, std::sqrt(error / size));
}

// The tokens go in by two appends. Whole blocks are packed, the rest are rows of type T.
template <class T>
void check(const Shape &s, int key_bits, int value_bits, int window, Form form = VECTORS) {
  const Side keys(s.kv_heads, s.tokens, s.head_dim, key_bits, form);
  const Side values(s.kv_heads, s.tokens, s.value_dim, value_bits, form);
  const int blocks = s.tokens / BLOCK_TOKENS, packed = blocks * BLOCK_TOKENS, room = s.tokens - packed + BLOCK_TOKENS;
  tq_attend_params p{};
  p.n_heads = s.heads;
  p.n_kv_heads = s.kv_heads;
  p.head_dim = s.head_dim;
  p.value_dim = s.value_dim;
  p.scale = 1 / std::sqrt(float(s.head_dim));
  p.causal = 1;
  p.window = window;
  p.code = {keys.code, values.code};

  const int64_t key_bytes = tq::block_bytes_of(keys.code, false) * blocks;
  const int64_t value_bytes = tq::block_bytes_of(values.code, true) * blocks;
  const int64_t key_planes = tq::planes(keys.code) * packed, value_planes = tq::planes(values.code) * packed;
  const auto key_codes = garbage<uint8_t>(s.kv_heads * key_bytes), value_codes = garbage<uint8_t>(s.kv_heads * value_bytes);
  const auto key_scales = garbage<uint16_t>(s.kv_heads * key_planes);
  const auto value_scales = garbage<uint16_t>(s.kv_heads * value_planes);
  const auto key_order = garbage<int32_t>(s.kv_heads * s.head_dim), value_order = garbage<int32_t>(s.kv_heads * s.value_dim);
  const auto key_rows = garbage<T>(size_t(s.kv_heads) * room * s.head_dim);
  const auto value_rows = garbage<T>(size_t(s.kv_heads) * room * s.value_dim);
  tq_segment &codes = p.segments[0], &rows = p.segments[1];
  p.n_segments = 2;
  codes = {key_codes.get(), value_codes.get(), key_scales.get(), value_scales.get(), key_order.get(), value_order.get(),
           key_bytes, value_bytes, 0, 0, 0, 0, TQ_KV_PACKED, packed, 0, 0, 0};
  rows = {key_rows.get(), value_rows.get(), nullptr, nullptr, nullptr, nullptr, int64_t(room) * s.head_dim,
          int64_t(room) * s.value_dim, 0, 0, 0, 0, sizeof(T) == 2 ? TQ_KV_F16 : TQ_KV_F32, room, 0, 0, 0};
  const int cuts[] = {0, std::max(0, s.tokens - 40), s.tokens};
  for (int i = 0; i < 2; i++) {
    const int first = cuts[i], last = cuts[i + 1];
    codes.count = last / BLOCK_TOKENS * BLOCK_TOKENS;
    rows.position = codes.count;
    rows.count = last - codes.count;
    p.position = first;
    p.pack_from = first / BLOCK_TOKENS * BLOCK_TOKENS;
    const auto from = [&](const Side &side) {
      float *given = const_cast<float *>(side.given.data()) + size_t(first) * side.dim;
      return tq::Strided{given, int64_t(s.tokens) * side.dim, side.dim};
    };
    tq::append(p, from(keys), from(values), last - first);
  }

  // What is really there.
  std::vector<float> seen[2] = {keys.given, values.given};
  if (packed > 0) {
    std::vector<float> unpacked[2];
    tq_array out[2];
    int32_t shapes[2][4];
    int64_t strides[2][4];
    for (int side = 0; side < 2; side++) {
      const int dim = side ? s.value_dim : s.head_dim;
      unpacked[side].resize(size_t(s.kv_heads) * packed * dim);
      const int32_t shape[] = {1, s.kv_heads, packed, dim};
      const int64_t stride[] = {int64_t(s.kv_heads) * packed * dim, int64_t(packed) * dim, dim, 1};
      std::copy_n(shape, 4, shapes[side]);
      std::copy_n(stride, 4, strides[side]);
      out[side] = {unpacked[side].data(), shapes[side], strides[side], 4, TQ_F32};
    }
    const int32_t code_shape[] = {1, s.kv_heads, blocks, 1}, scale_shape[] = {1, s.kv_heads, packed};
    const int64_t key_strides[] = {0, key_bytes, 0, 1}, value_strides[] = {0, value_bytes, 0, 1}, other[] = {0, 0, 1};
    std::vector<tq_array> in;
    in.push_back({key_codes.get(), code_shape, key_strides, 4, TQ_U8});
    in.push_back({key_scales.get(), scale_shape, other, 3, TQ_F16});
    if (form == OUTLIERS) in.push_back({key_order.get(), scale_shape, other, 3, TQ_I32});
    in.push_back({value_codes.get(), code_shape, value_strides, 4, TQ_U8});
    in.push_back({value_scales.get(), scale_shape, other, 3, TQ_F16});
    if (form == OUTLIERS) in.push_back({value_order.get(), scale_shape, other, 3, TQ_I32});
    tq_attend_params one = p;
    one.n_segments = 1;
    tq_kv_unpack(&one, in.data(), out);
    for (int side = 0; side < 2; side++) {
      const int dim = side ? s.value_dim : s.head_dim;
      for (int h = 0; h < s.kv_heads; h++) {
        std::copy_n(&unpacked[side][size_t(h) * packed * dim], packed * dim, &seen[side][size_t(h) * s.tokens * dim]);
      }
    }
  }
  if (sizeof(T) == 2) {
    for (int side = 0; side < 2; side++) {
      const int dim = side ? s.value_dim : s.head_dim;
      for (size_t i = 0; i < seen[side].size(); i++) {
        if (int(i / dim % s.tokens) >= packed) seen[side][i] = tq::float_of(tq::half_of(seen[side][i]));
      }
    }
  }

  std::vector<float> q(size_t(s.heads) * s.queries * s.head_dim);
  for (float &x : q) x = normal();
  p.position = s.tokens - s.queries;
  const std::vector<double> want = attention(p, s, q, seen[0], seen[1]);
  for (int exact = 0; exact < 2; exact++) {
    p.exact = exact;
    std::vector<float> out(want.size(), NAN);
    tq::attend(p, {q.data(), int64_t(s.queries) * s.head_dim, s.head_dim}, s.queries,
               {out.data(), int64_t(s.queries) * s.value_dim, s.value_dim});
    const bool floats = exact || packed == 0;
    const std::string what = std::string(floats ? "exact" : "int8") + ", bits " + std::to_string(key_bits) + " and " + std::to_string(value_bits);
    compare(what.c_str(), s, want, out.data(), floats ? 1e-5 : 0.03);
  }
}

}  // namespace

int main() {
  tq_set_threads(3);
  const Shape shapes[] = {{3, 1, 64, 64, 200, 1}, {2, 2, 40, 56, 130, 2}, {5, 1, 128, 80, 64, 1},  {8, 2, 20, 7, 150, 3},
                          {4, 2, 64, 48, 33, 5},  {6, 2, 64, 64, 100, 33}, {1, 1, 130, 40, 128, 1}, {9, 1, 33, 64, 65, 1}};
  for (const Shape &shape : shapes) {
    for (int bits = 1; bits <= 8; bits++) {
      check<float>(shape, bits, 9 - bits, bits % 3 ? 0 : 50);
      check<uint16_t>(shape, bits == 1 ? 8 : bits, bits, 0);
    }
    for (const Form form : {GROUPS, AFFINE, OUTLIERS}) {
      if (form == OUTLIERS && std::min(shape.head_dim, shape.value_dim) < 8) continue;
      check<float>(shape, form == GROUPS ? 8 : 4, 5, 0, form);
      check<uint16_t>(shape, 3, 6, 40, form);
    }
  }
  printf("%d failures\n", failures);
  return failures > 0;
}

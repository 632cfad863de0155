// What the library says of itself and of the machine.
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>

#include "internal.h"
#include "tq_layer.h"

namespace tq {
namespace {

constexpr int READS = 5;

uint64_t sum(const uint64_t *words, int64_t n) {
  uint64_t result = 0;
#pragma omp simd reduction(+ : result)
  for (int64_t i = 0; i < n; i++) result += words[i];
  return result;
}

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace
}  // namespace tq

const char *tq_isa(void) {
#if defined(TQ_ISA_AVX512)
  return "avx512";
#elif defined(TQ_ISA_AVX2) && defined(__AVXVNNI__)
  return "avx2vnni";
#elif defined(TQ_ISA_AVX2)
  return "avx2";
#elif defined(TQ_ISA_NEON)
  return "neon";
#else
  return "generic";
#endif
}

double tq_read_bandwidth(int64_t bytes) {
  using namespace tq;
  const int64_t count = std::max<int64_t>(bytes, 1 << 12) / int64_t(sizeof(uint64_t));
  auto *words = static_cast<uint64_t *>(malloc(count * sizeof(uint64_t)));
  if (!words) return 0;
  parallel([&](int i, int n) {  // each thread has its share in its own node's memory
    const Share share(count, i, n);
    memset(words + share.first, 1, (share.last - share.first) * sizeof(uint64_t));
  });
  double best = 1e30;
  for (int read = 0; read < READS; read++) {
    const double begin = seconds();
    parallel([&](int i, int n) {
      const Share share(count, i, n);
      volatile uint64_t result = sum(words + share.first, share.last - share.first);
      (void)result;
    });
    best = std::min(best, seconds() - begin);
  }
  free(words);
  return double(count * sizeof(uint64_t)) / best;
}

int32_t tq_struct_size(const char *name) {
  static const struct {
    const char *name;
    size_t size;
  } STRUCTURES[] = {
#define TQ_STRUCTURE(name) {#name, sizeof(name)}
      TQ_STRUCTURE(tq_array),          TQ_STRUCTURE(tq_matrix),        TQ_STRUCTURE(tq_rotation),
      TQ_STRUCTURE(tq_matmul_params),  TQ_STRUCTURE(tq_gather_params), TQ_STRUCTURE(tq_experts_params),
      TQ_STRUCTURE(tq_embed_params),   TQ_STRUCTURE(tq_rotate_params), TQ_STRUCTURE(tq_segment),
      TQ_STRUCTURE(tq_kv_code),        TQ_STRUCTURE(tq_attend_params), TQ_STRUCTURE(tq_sample_params),
      TQ_STRUCTURE(tq_norm),           TQ_STRUCTURE(tq_projection),    TQ_STRUCTURE(tq_rope),
      TQ_STRUCTURE(tq_router),         TQ_STRUCTURE(tq_layer),         TQ_STRUCTURE(tq_layer_params),
      TQ_STRUCTURE(tq_nearest),        TQ_STRUCTURE(tq_scale_search),
#undef TQ_STRUCTURE
  };
  for (const auto &structure : STRUCTURES) {
    if (strcmp(structure.name, name) == 0) return int32_t(structure.size);
  }
  return -1;
}

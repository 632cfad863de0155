// What the library says of itself and of the machine.
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>

#include "internal.h"
#include "tq_layer.h"
#if defined(TQ_ISA_AMX)
#include <span>

#include "simd.h"
#endif

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

#if defined(TQ_ISA_AMX)
// Whether tiles of N_STEPS steps give what plain numbers give. Bytes and codes take all their values.
template <int N_STEPS>
bool tiles_multiply() {
  static uint8_t bytes[2][N_STEPS][TILE_ROWS][4];
  static int8_t codes[MAX_ROWS][BLOCK_COLUMNS];
  alignas(64) static int32_t sums[2][MAX_ROWS][TILE_ROWS];
  uint32_t state = 1;
  const auto next = [&] { return (state = state * 1664525 + 1013904223) >> 24; };
  for (auto &byte : std::span(&bytes[0][0][0][0], sizeof bytes)) byte = uint8_t(next());
  for (auto &code : std::span(&codes[0][0], sizeof codes)) code = int8_t(next());
  {
    const TileUnit unit;
    tile_products<2, N_STEPS>(bytes[0][0][0], sizeof bytes[0], codes[0], sums[0][0]);
  }
  for (int t = 0; t < 2; t++) {
    for (int r = 0; r < MAX_ROWS; r++) {
      for (int lane = 0; lane < TILE_ROWS; lane++) {
        int32_t sum = 0;
        for (int c = 0; c < 4 * N_STEPS; c++) sum += bytes[t][c / 4][lane][c % 4] * codes[r][c];
        if (sum != sums[t][r][lane]) return false;
      }
    }
  }
  return true;
}
#endif

}  // namespace
}  // namespace tq

const char *tq_self_check(void) {
#if defined(TQ_ISA_AMX)
  if (!tq::request_tiles()) return "the system does not let this process use the tile registers";
  if (!tq::tiles_multiply<tq::STEPS>() || !tq::tiles_multiply<tq::STEPS / 2>()) {
    return "the tile unit gives other products than plain arithmetic";
  }
#endif
  return nullptr;
}

const char *tq_isa(void) {
#if defined(TQ_ISA_AMX)
  return "amx";
#elif defined(TQ_ISA_AVX512)
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
      TQ_STRUCTURE(tq_kv_part),        TQ_STRUCTURE(tq_kv_side),
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

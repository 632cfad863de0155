// What tests need of the kernels that is not part of their interface: parallel regions, and functions of elementwise.h.
#include <time.h>

#include <atomic>
#include <vector>

#include "elementwise.h"
#include "internal.h"

namespace {

void sleep_microseconds(int64_t microseconds) {
  const timespec time = {microseconds / 1000000, microseconds % 1000000 * 1000};
  nanosleep(&time, nullptr);
}

}  // namespace

extern "C" {

// Runs regions whose parts write the region's number to their share of `items`; part i sleeps `pause` * i microseconds.
// Returns how many regions did not run each part once, or left an item out.
TQ_API int check_regions(int regions, int items, int pause) {
  int wrong = 0;
  std::vector<int> written(items, 0);
  for (int region = 1; region <= regions; region++) {
    std::vector<std::atomic<int>> runs(64);
    std::atomic<int> parts{0};
    tq::parallel([&](int i, int n) {
      parts = n;
      runs[i]++;
      if (pause) sleep_microseconds(int64_t(pause) * i);
      const tq::Share share(items, i, n);
      for (int64_t at = share.first; at < share.last; at++) written[at] += region;
    });
    bool good = true;
    for (int i = 0; i < 64; i++) good &= runs[i] == (i < parts ? 1 : 0);
    for (int &item : written) {
      good &= item == region;
      item = 0;
    }
    wrong += !good;
  }
  return wrong;
}

// Parts of one region, and the most parts of a region inside it.
TQ_API int region_parts() {
  std::atomic<int> parts{0};
  tq::parallel([&](int, int n) { parts = n; });
  return parts;
}

TQ_API int nested_parts() {
  std::atomic<int> most{0};
  tq::parallel([&](int, int) {
    tq::parallel([&](int, int n) {
      if (n > most) most = n;
    });
  });
  return most;
}

// A region that ends when all its parts have begun, which takes as many threads.
TQ_API void meet() {
  std::atomic<int> here{0};
  tq::parallel([&](int, int n) {
    here++;
    while (here < n) sleep_microseconds(10);
  });
}

TQ_API int scratch_is_aligned_and_kept(int64_t bytes) {
  auto *small = static_cast<uint8_t *>(tq::scratch_bytes(tq::SCORES, 16));
  small[15] = 1;
  auto *other = static_cast<uint8_t *>(tq::scratch_bytes(tq::PANEL, bytes));
  auto *large = static_cast<uint8_t *>(tq::scratch_bytes(tq::SCORES, bytes));
  large[bytes - 1] = other[bytes - 1] = 1;
  const bool aligned = (reinterpret_cast<uintptr_t>(large) | reinterpret_cast<uintptr_t>(other)) % 64 == 0;
  return aligned && large != other && tq::scratch_bytes(tq::SCORES, bytes / 2) == large;
}

TQ_API void exps(const float *x, float *y, int n) {
#pragma omp simd
  for (int i = 0; i < n; i++) y[i] = tq::fast_exp(x[i]);
}

TQ_API void gated(int activation, float alpha, float limit, const float *gate, const float *up, float *y, int n) {
  tq::gated(activation, alpha, limit, gate, up, y, n);
}

TQ_API void rms_norm(const float *x, const float *weight, float eps, int n, float *y) {
  tq::rms_norm(x, weight, eps, n, y);
}

TQ_API float softmax(float *x, int n) { return tq::exponentials(x, n, tq::largest(x, n)); }

}  // extern "C"

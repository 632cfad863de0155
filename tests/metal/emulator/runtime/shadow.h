// What the checker remembers about each byte of an output or of threadgroup memory.
#pragma once
#include <cstdint>

constexpr int LANES = 32;
constexpr int MAX_LANES = 1024;  // of a threadgroup

// A thread at a time: which lane, and how many barriers it had passed. `who` is 0 for nobody.
struct Stamp {
  uint32_t who = 0;  // 1 + threadgroup * MAX_LANES + lane
  uint32_t epoch = 0;
  uint32_t simdgroup_epoch = 0;

  uint32_t group() const { return (who - 1) / MAX_LANES; }
  int lane() const { return int((who - 1) % MAX_LANES); }
  int simdgroup() const { return lane() / LANES; }
};

// Threads whose accesses are not ordered among themselves: one of them, and how far they are spread.
enum Spread : uint8_t { ONE_LANE, ONE_SIMDGROUP, ONE_THREADGROUP, WHOLE_GRID };
struct Group {
  Stamp first;
  Spread spread = ONE_LANE;
};

struct Shadow {
  Stamp writer;   // the last plain write
  Group readers;  // plain reads since then
  Group atomics;  // and atomic accesses
  bool written = false;
};

// The emulated machine: lanes, SIMD-groups, memory regions, and the faults found so far.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "abi.h"
#include "shadow.h"

constexpr int SLOT_BYTES = 64;              // the widest value that lanes exchange
constexpr size_t STACK_BYTES = 256 << 10;   // of a lane

enum State { READY, IN_SIMDGROUP, IN_THREADGROUP, DONE };  // the second and third wait for others

struct Lane {
  void* stack;  // where it was left
  char* low;    // its stack memory
  char* high;
  State state;
  int index;      // in its SIMD-group
  int simdgroup;  // in its threadgroup
  int site;       // line and column of the call that it waits in
  int meeting;    // what for: msl_meeting
  int flags;      // mem_flags of a barrier
  int size;       // bytes of `value`
  const void* pc;
  alignas(16) char value[SLOT_BYTES];  // what it offers to the others
  msl_thread thread;
};

struct Simdgroup {
  int size;
  int alive;
  int waiting;
  uint32_t active;    // mask of the lanes that met last
  uint32_t epoch[2];  // barriers so far, for threadgroup and for device memory
  alignas(16) char slots[LANES][SLOT_BYTES];
};

// A buffer or a threadgroup variable.
struct Region {
  enum Kind { INPUT, OUTPUT, FILLED_OUTPUT, SHARED };
  char* low;
  char* high;
  std::string name;
  Kind kind;
  int element_bytes;
  std::vector<Shadow> shadow;  // one a byte; empty for inputs
};

struct Machine {
  std::vector<Lane> lanes;
  std::vector<Simdgroup> simdgroups;
  std::vector<Region> regions;
  Lane* current = nullptr;
  void* scheduler = nullptr;  // its stack
  void (*kernel)() = nullptr;
  char* constants = nullptr;  // what the kernel's library holds besides threadgroup memory
  char* constants_end = nullptr;
  uint32_t group = 0;     // serial number of the running threadgroup
  uint32_t epoch[2] = {}; // threadgroup barriers so far, for threadgroup and for device memory
  bool checking = false;
  bool stopped = false;  // a lane can't go on
  uint64_t accesses = 0;
  uint64_t random = 1;

  uint32_t next_random() {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return uint32_t(random >> 11);
  }
};

extern Machine machine;

// fiber.cpp
extern "C" void msl_switch(void** save, void* to);  // keeps what a called function must keep, then goes on at `to`
void* new_stack(char* top, void (*function)());
char* stacks(size_t count);

// faults.cpp
void report(const char* kind, const void* pc, const char* format, ...) __attribute__((format(printf, 3, 4)));
[[noreturn]] void stop_lane();
void forget_faults();
const char* faults();

// scheduler.cpp
void run_threadgroup(int lanes, int order);
void leave();  // from a lane to the scheduler

// checker.cpp
void prepare_shadow(Region& region);
void reset_shared_memory();
uint64_t unwritten_bytes(const Region& region);

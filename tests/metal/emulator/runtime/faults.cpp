// Collects what a kernel did wrong: each fault once for each place in its text, as lines that Python completes.
#include <cstdarg>
#include <cstdio>
#include <set>
#include <tuple>

#include "machine.h"

static std::string text;
static std::set<std::tuple<std::string, const void*, std::string>> seen;
constexpr size_t MOST = 20;

// One line a fault: kind, address in the code, where it happened, what happened, separated by tabs.
void report(const char* kind, const void* pc, const char* format, ...) {
  char what[600], where[200] = "";
  va_list values;
  va_start(values, format);
  vsnprintf(what, sizeof what, format, values);
  va_end(values);
  // Without an address, the text tells one place from another.
  if (seen.size() >= MOST || !seen.insert({kind, pc, pc ? "" : what}).second) return;
  if (const Lane* lane = machine.current) {
    const unsigned* group = lane->thread.threadgroup_position_in_grid;
    snprintf(where, sizeof where, "threadgroup (%u, %u, %u), SIMD-group %d, lane %d", group[0], group[1], group[2],
             lane->simdgroup, lane->index);
  }
  char line[1000];
  snprintf(line, sizeof line, "%s\t%lu\t%s\t%s\n", kind, (unsigned long)pc, where, what);
  text += line;
}

void stop_lane() {
  machine.stopped = true;
  machine.current->state = DONE;
  leave();
  __builtin_trap();
}

void forget_faults() {
  text.clear();
  seen.clear();
}

const char* faults() { return text.c_str(); }

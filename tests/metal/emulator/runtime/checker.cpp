// Checks every load and store of a kernel: bounds, races, uninitialised reads, alignment, writes to inputs.
//
// The kernel is compiled with -fsanitize=thread, whose calls end here instead of in ThreadSanitizer. Each byte of an
// output or of threadgroup memory has a shadow that says who touched it last, and between which barriers. Since that
// decides whether two accesses are ordered, a race is found in any one schedule.
#include <cstring>

#include "machine.h"

namespace {

enum Access { READ, WRITE, ATOMIC_READ, ATOMIC_WRITE, ATOMIC_MODIFY };

// Whether all that the threads of `before` did happens before what `now` does: they are the same lane, or have passed
// a barrier since that both take part in.
bool ordered(const Group& before, const Stamp& now) {
  const Stamp& first = before.first;
  if (!first.who || (first.who == now.who && before.spread == ONE_LANE)) return true;
  if (before.spread == WHOLE_GRID || first.group() != now.group()) return false;
  if (first.epoch != now.epoch) return true;
  return before.spread <= ONE_SIMDGROUP && first.simdgroup() == now.simdgroup() &&
         first.simdgroup_epoch != now.simdgroup_epoch;
}

// Adds a thread to those that a later access must be ordered after.
void add(Group& group, const Stamp& now) {
  if (ordered(group, now)) {
    group = Group{now, ONE_LANE};
  } else if (group.first.group() != now.group()) {
    group.spread = WHOLE_GRID;
  } else if (group.spread <= ONE_SIMDGROUP && group.first.simdgroup() == now.simdgroup()) {
    group.spread = ONE_SIMDGROUP;
  } else if (group.spread < WHOLE_GRID) {
    group.spread = ONE_THREADGROUP;
  }
}

Region* region_of(const char* address) {
  static Region* last = nullptr;
  std::vector<Region>& regions = machine.regions;
  if (last && last >= regions.data() && last < regions.data() + regions.size() && address >= last->low &&
      address < last->high)
    return last;
  for (Region& region : regions)
    if (address >= region.low && address < region.high) return last = &region;
  return nullptr;
}

// "name[5]", or with bytes where the element's size is unknown or the address is between two elements.
std::string place(const Region& region, const char* address) {
  const long offset = address - region.low;
  if (region.element_bytes && offset % region.element_bytes == 0)
    return region.name + "[" + std::to_string(offset / region.element_bytes) + "]";
  return region.name + " at byte " + std::to_string(offset);
}

std::string extent(const Region& region) {
  const long bytes = region.high - region.low;
  return region.element_bytes ? std::to_string(bytes / region.element_bytes) + " elements"
                              : std::to_string(bytes) + " bytes";
}

constexpr long GUARD_BYTES = 256;  // around every buffer and threadgroup variable at least; harmless to touch

// Reports an access outside of everything. The lane goes on if it hits the guard of what it meant.
void out_of_bounds(const char* address, int size, const char* verb, const void* pc) {
  const Region* nearest = nullptr;
  long distance = 1 << 20;
  for (const Region& region : machine.regions) {
    // What lies in the guard behind an array was meant for that, even if the next array is closer.
    const bool behind = address >= region.low && address - region.high < GUARD_BYTES;
    const long d = behind ? 0 : address < region.low ? region.low - address : address - region.high;
    if (d < distance) distance = d, nearest = &region;
  }
  if (!nearest) {
    report("out of bounds", pc, "%s of %d bytes, far from any buffer", verb, size);
    stop_lane();
  }
  report("out of bounds", pc, "%s of %d bytes at %s, which has %s", verb, size, place(*nearest, address).c_str(),
         extent(*nearest).c_str());
  const bool guarded = address >= nearest->low ? address + size <= nearest->high + GUARD_BYTES
                                               : nearest->kind != Region::SHARED && distance <= GUARD_BYTES;
  if (!guarded) stop_lane();
}

std::string whose(const Stamp& other, const Stamp& now) {
  if (other.who == now.who) return "other lanes";
  if (other.group() != now.group()) return "another threadgroup";
  return "lane " + std::to_string(other.lane() % LANES) + " of SIMD-group " + std::to_string(other.simdgroup());
}

void check(void* pointer, int size, Access access, const void* pc) {
  char* address = (char*)pointer;
  const Lane* lane = machine.current;
  if (!machine.checking || !lane || (address >= lane->low && address < lane->high)) return;
  machine.accesses++;
  const bool writes = access != READ && access != ATOMIC_READ;
  const bool reads = access != WRITE && access != ATOMIC_WRITE;
  const bool atomic = access >= ATOMIC_READ;
  const char* verb = atomic ? "atomic access" : writes ? "write" : "read";

  Region* region = region_of(address);
  if (!region || address + size > region->high) {
    const bool exchanged = address >= (char*)machine.simdgroups.data() &&
                           address < (char*)(machine.simdgroups.data() + machine.simdgroups.size());
    const bool attribute =
        address >= (char*)machine.lanes.data() && address < (char*)(machine.lanes.data() + machine.lanes.size());
    const bool table = !writes && address >= machine.constants && address < machine.constants_end;
    if (!exchanged && !attribute && !table) out_of_bounds(address, size, verb, pc);
    return;
  }
  if (region->kind == Region::INPUT) {
    if (writes) report("write to input", pc, "%s of %s", verb, place(*region, address).c_str());
    return;
  }

  const int space = region->kind == Region::SHARED ? 0 : 1;
  const uint32_t who = 1 + machine.group * MAX_LANES + lane->thread.thread_index_in_threadgroup;
  const Stamp now{who, machine.epoch[space], machine.simdgroups[lane->simdgroup].epoch[space]};
  for (int i = 0; i < size; i++) {
    Shadow& shadow = region->shadow[address - region->low + i];
    const char* fault = nullptr;
    Stamp other;
    if (!ordered({shadow.writer, ONE_LANE}, now)) {
      fault = "write";
      other = shadow.writer;
    } else if (writes && !ordered(shadow.readers, now)) {
      fault = "read";
      other = shadow.readers.first;
    } else if (!atomic && !ordered(shadow.atomics, now)) {
      fault = "atomic access";
      other = shadow.atomics.first;
    }
    if (fault) {
      report("race", pc, "%s of %s is not ordered after the %s by %s", verb, place(*region, address).c_str(), fault,
             whose(other, now).c_str());
    } else if (reads && !shadow.written) {
      report("uninitialised", pc, "%s of %s, which nothing has written", verb, place(*region, address).c_str());
    }
    if (atomic) {
      add(shadow.atomics, now);
    } else if (writes) {
      shadow.writer = now;
      shadow.readers.first.who = shadow.atomics.first.who = 0;
    } else {
      add(shadow.readers, now);
    }
    shadow.written |= writes;
  }
}

void check_aligned(void* pointer, int size, Access access, const void* pc) {
  if (machine.checking && machine.current && (uintptr_t)pointer & (size - 1)) {
    const Region* region = region_of((char*)pointer);
    report("misaligned", pc, "%s of %d bytes at %s, whose address is not a multiple of %d",
           access == READ ? "read" : "write", size, region ? place(*region, (char*)pointer).c_str() : "a thread array",
           size);
  }
  check(pointer, size, access, pc);
}

}  // namespace

void reset_shared_memory() {
  for (Region& region : machine.regions)
    if (region.kind == Region::SHARED) region.shadow.assign(region.high - region.low, Shadow{});
}

void prepare_shadow(Region& region) {
  if (region.kind == Region::INPUT) return;
  Shadow fresh;
  fresh.written = region.kind == Region::FILLED_OUTPUT;
  region.shadow.assign(region.high - region.low, fresh);
}

uint64_t unwritten_bytes(const Region& region) {
  uint64_t count = 0;
  for (const Shadow& shadow : region.shadow) count += !shadow.written;
  return count;
}

// ---- the calls that -fsanitize=thread, -fsanitize=undefined and the lowered shifts make --------------------------
#define PC __builtin_return_address(0)
#define HOOKS(n)                                                                      \
  void __tsan_read##n(void* p) { check_aligned(p, n, READ, PC); }                     \
  void __tsan_write##n(void* p) { check_aligned(p, n, WRITE, PC); }                   \
  void __tsan_unaligned_read##n(void* p) { check(p, n, READ, PC); }                   \
  void __tsan_unaligned_write##n(void* p) { check(p, n, WRITE, PC); }                 \
  void __tsan_volatile_read##n(void* p) { check_aligned(p, n, READ, PC); }            \
  void __tsan_volatile_write##n(void* p) { check_aligned(p, n, WRITE, PC); }
#define UNDEFINED(name, text)                                                         \
  void __ubsan_handle_##name##_minimal() { report("undefined", PC, text); }           \
  void __ubsan_handle_##name##_minimal_abort() {                                      \
    report("undefined", PC, text);                                                    \
    stop_lane();                                                                      \
  }

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void* __tsan_memcpy(void* to, const void* from, size_t size) {
  for (size_t i = 0; i < size; i++) check((char*)from + i, 1, READ, PC), check((char*)to + i, 1, WRITE, PC);
  return memcpy(to, from, size);
}
void* __tsan_memmove(void* to, const void* from, size_t size) {
  for (size_t i = 0; i < size; i++) check((char*)from + i, 1, READ, PC), check((char*)to + i, 1, WRITE, PC);
  return memmove(to, from, size);
}
void* __tsan_memset(void* to, int value, size_t size) {
  for (size_t i = 0; i < size; i++) check((char*)to + i, 1, WRITE, PC);
  return memset(to, value, size);
}
UNDEFINED(out_of_bounds, "index outside of an array of constant size")
UNDEFINED(divrem_overflow, "integer division by zero, or of the least integer by -1")
UNDEFINED(float_cast_overflow, "float that does not fit the integer it is converted to")
UNDEFINED(builtin_unreachable, "code that cannot be reached")
UNDEFINED(missing_return, "function that ends without a value")

void msl_shift(unsigned long count, int bits) {
  if (machine.current && count >= (unsigned long)bits)
    report("undefined", PC, "shift of %d bits by %ld", bits, (long)(bits == 64 ? count : (int)count));
}

void msl_check_atomic(unsigned long address, int size, int kind, unsigned long caller) {
  const Access access = kind == MSL_LOAD ? ATOMIC_READ : kind == MSL_STORE ? ATOMIC_WRITE : ATOMIC_MODIFY;
  check((void*)address, size, access, (const void*)caller);
}
}

// Runs the lanes of one threadgroup as fibers, and lets them meet: in SIMD-group functions and at barriers.
//
// A lane runs until it ends or waits. When all living lanes of a SIMD-group wait in the same call, they have met and
// go on; when all living lanes of the threadgroup wait at a barrier, that is complete. Anything else is a fault.
#include <cstring>
#include <utility>

#include "machine.h"

Machine machine;

void leave() { msl_switch(&machine.current->stack, machine.scheduler); }

static void lane_main() {
  machine.kernel();
  machine.current->state = DONE;
  leave();
  __builtin_trap();  // nobody goes on with a lane that is done
}

// ---- what a kernel calls ------------------------------------------------------------------------------------------
static void wait_for_simdgroup(int site, int meeting, int flags, const void* pc) {
  Lane* lane = machine.current;
  lane->site = site;
  lane->meeting = meeting;
  lane->flags = flags;
  lane->pc = pc;
  lane->state = IN_SIMDGROUP;
  machine.simdgroups[lane->simdgroup].waiting++;
  leave();
}

extern "C" {
msl_thread* msl_current() { return &machine.current->thread; }
int msl_lane() { return machine.current->index; }

// Offers a value to the other lanes and waits for theirs. Returns the mask of the lanes that met.
unsigned msl_exchange(const void* value, int size, int site, int meeting) {
  Lane* lane = machine.current;
  memcpy(lane->value, value, size);
  lane->size = size;
  wait_for_simdgroup(site, meeting, 0, __builtin_return_address(0));
  return machine.simdgroups[lane->simdgroup].active;
}

// What a lane offered in the last exchange.
const void* msl_offered(int lane) { return machine.simdgroups[machine.current->simdgroup].slots[lane]; }

void msl_bad_source(int lane) {
  report("inactive lane", __builtin_return_address(0), "reads lane %d, which is inactive or out of range", lane);
}

void msl_simdgroup_barrier(int flags, int site) {
  machine.current->size = 0;
  wait_for_simdgroup(site, MSL_BARRIER, flags, __builtin_return_address(0));
}

void msl_threadgroup_barrier(int flags, int site) {
  Lane* lane = machine.current;
  lane->site = site;
  lane->flags = flags;
  lane->pc = __builtin_return_address(0);
  lane->state = IN_THREADGROUP;
  leave();
}
}

// ---- the scheduler ------------------------------------------------------------------------------------------------
static void pass_barrier(uint32_t* epoch, int flags) {
  if (flags & MSL_THREADGROUP) epoch[0]++;
  if (flags & MSL_DEVICE) epoch[1]++;
}

static void report_at(const char* kind, const Lane& lane, const char* format, int a, int b) {
  machine.current = const_cast<Lane*>(&lane);
  report(kind, lane.pc, format, a, b);
}

// Lets the lanes of a SIMD-group go on that wait where `first` does.
static void meet(Simdgroup& simdgroup, Lane* lanes, const Lane& first, std::vector<int>& ready) {
  const int site = first.site, meeting = first.meeting;
  simdgroup.active = 0;
  for (int i = 0; i < simdgroup.size; i++) {
    Lane& lane = lanes[i];
    if (lane.state != IN_SIMDGROUP || lane.site != site || lane.meeting != meeting) continue;
    simdgroup.active |= 1u << i;
    memcpy(simdgroup.slots[i], lane.value, lane.size);
    lane.state = READY;
    simdgroup.waiting--;
    ready.push_back(int(&lane - machine.lanes.data()));
  }
  if (meeting == MSL_BARRIER) pass_barrier(simdgroup.epoch, first.flags);
}

// The lane whose call all waiting lanes of the SIMD-group are in, or none.
static const Lane* common_call(const Simdgroup& simdgroup, const Lane* lanes) {
  const Lane* first = nullptr;
  for (int i = 0; i < simdgroup.size; i++) {
    const Lane& lane = lanes[i];
    if (lane.state != IN_SIMDGROUP) continue;
    if (!first) first = &lane;
    if (lane.site != first->site || lane.meeting != first->meeting) return nullptr;
  }
  return first;
}

// All lanes that live wait at a barrier of the threadgroup.
static void complete_barrier(int lanes, int alive, std::vector<int>& ready) {
  const Lane* first = nullptr;
  for (int i = 0; i < lanes; i++) {
    Lane& lane = machine.lanes[i];
    if (lane.state != IN_THREADGROUP) continue;
    if (!first) first = &lane;
    if (lane.site != first->site)
      report_at("divergence", lane, "waits at another threadgroup_barrier than lane %d of SIMD-group %d", first->index,
                first->simdgroup);
    lane.state = READY;
    ready.push_back(i);
  }
  if (alive != lanes)
    report_at("divergence", *first, "threadgroup_barrier is reached by %d of %d threads: the others have returned",
              alive, lanes);
  pass_barrier(machine.epoch, first->flags);
}

// Nobody can run: some lanes wait for others that wait for something else. Lets one group of them go on.
static void break_deadlock(int lanes, int alive, int at_barrier, std::vector<int>& ready) {
  const Lane* first = nullptr;
  for (int i = 0; i < lanes; i++) {
    const Lane& lane = machine.lanes[i];
    if (lane.state != IN_SIMDGROUP) continue;
    if (first && lane.simdgroup != first->simdgroup) break;
    if (!first || lane.site < first->site) first = &lane;
  }
  if (!first) {
    for (int i = 0; i < lanes && !first; i++)
      if (machine.lanes[i].state == IN_THREADGROUP) first = &machine.lanes[i];
    report_at("divergence", *first, "threadgroup_barrier is reached by %d of %d threads", at_barrier, alive);
    machine.stopped = true;
    return;
  }
  Simdgroup& simdgroup = machine.simdgroups[first->simdgroup];
  const Lane call = *first;
  meet(simdgroup, &machine.lanes[first->simdgroup * LANES], call, ready);
  machine.current = &machine.lanes[ready.front()];
  report("divergence", call.pc, "SIMD-group %s is reached by the lanes of mask %08x only, of %d that live",
         call.meeting == MSL_BARRIER ? "barrier" : "function", simdgroup.active, simdgroup.alive);
}

static void arrange(std::vector<int>& lanes, int order) {
  if (order == 1) {
    for (size_t i = 0; i < lanes.size() / 2; i++) std::swap(lanes[i], lanes[lanes.size() - 1 - i]);
  } else if (order == 2) {
    for (size_t i = lanes.size(); i > 1; i--) std::swap(lanes[i - 1], lanes[machine.next_random() % i]);
  }
}

// Runs `lanes` lanes to their ends; order: 0 is forward, 1 backward, 2 random in each round.
void run_threadgroup(int lanes, int order) {
  const int simdgroups = (lanes + LANES - 1) / LANES;
  for (int g = 0; g < simdgroups; g++) {
    Simdgroup& simdgroup = machine.simdgroups[g];
    simdgroup.size = simdgroup.alive = g == simdgroups - 1 ? lanes - g * LANES : LANES;
    simdgroup.waiting = 0;
    simdgroup.epoch[0] = simdgroup.epoch[1] = 0;
  }
  std::vector<int> ready(lanes), next;
  for (int i = 0; i < lanes; i++) {
    machine.lanes[i].state = READY;
    machine.lanes[i].stack = new_stack(machine.lanes[i].high, lane_main);
    ready[i] = i;
  }
  machine.epoch[0]++;
  machine.epoch[1]++;
  int alive = lanes, at_barrier = 0;
  while (alive) {
    arrange(ready, order);
    next.clear();
    for (const int i : ready) {
      Lane& lane = machine.lanes[i];
      machine.current = &lane;
      msl_switch(&machine.scheduler, lane.stack);
      if (machine.stopped) return;
      Simdgroup& simdgroup = machine.simdgroups[lane.simdgroup];
      if (lane.state == DONE) alive--, simdgroup.alive--;
      if (lane.state == IN_THREADGROUP) at_barrier++;
      if (simdgroup.waiting && simdgroup.waiting == simdgroup.alive) {
        Lane* members = &machine.lanes[lane.simdgroup * LANES];
        if (const Lane* first = common_call(simdgroup, members)) meet(simdgroup, members, *first, next);
      }
    }
    if (next.empty() && alive) {
      if (at_barrier == alive) {
        complete_barrier(lanes, alive, next);
        at_barrier = 0;
      } else {
        break_deadlock(lanes, alive, at_barrier, next);
        if (machine.stopped) return;
      }
    }
    ready.swap(next);
  }
}

// Runs a kernel over a grid: the entry that Python calls, and the attributes of each thread.
#include <algorithm>
#include <cstring>
#include <utility>

#include "machine.h"

static const msl_module& module_of(const msl_launch& launch) { return *(const msl_module*)launch.module; }

static void add_region(unsigned long address, long bytes, unsigned long name, Region::Kind kind, long element_bytes) {
  char* low = (char*)address;
  machine.regions.push_back({low, low + bytes, (const char*)name, kind, int(element_bytes), {}});
  prepare_shadow(machine.regions.back());
}

static void reset(const msl_launch& launch, int lanes) {
  const msl_module& module = module_of(launch);
  machine.kernel = (void (*)())module.entry;
  machine.constants = (char*)module.image;
  machine.constants_end = (char*)module.constants_end;
  machine.checking = launch.checking;
  machine.stopped = false;
  machine.current = nullptr;
  machine.accesses = 0;
  machine.group = 0;
  machine.random = launch.seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  forget_faults();
  machine.regions.clear();
  if (launch.checking) {
    for (int i = 0; i < launch.buffer_count; i++) {
      const msl_buffer& buffer = launch.buffers[i];
      add_region(buffer.address, buffer.bytes, buffer.name, Region::Kind(buffer.kind), buffer.element_bytes);
    }
    for (int i = 0; i < module.array_count; i++) {
      const msl_array& array = ((const msl_array*)module.arrays)[i];
      add_region(array.address, array.bytes, array.name, Region::SHARED, array.element_bytes);
    }
  }
  machine.lanes.resize(lanes);
  machine.simdgroups.resize((lanes + LANES - 1) / LANES);
  char* memory = stacks(lanes);
  for (int i = 0; i < lanes; i++) {
    Lane& lane = machine.lanes[i];
    lane.low = memory + i * STACK_BYTES;
    lane.high = lane.low + STACK_BYTES;
    lane.simdgroup = i / LANES;
    lane.index = i % LANES;
    for (int b = 0; b < launch.buffer_count; b++) lane.thread.buffers[b] = launch.buffers[b].address;
  }
}

// Attributes of the lane in position `in_group` of a threadgroup of `extent` threads; groups at the edge are smaller.
static void set_attributes(int lane, const int* in_group, const int* group, const int* extent, const int* groups,
                           const msl_launch& launch) {
  const int lanes = extent[0] * extent[1] * extent[2], full = int(machine.lanes.size());
  msl_thread& thread = machine.lanes[lane].thread;
  thread.dispatch_quadgroups_per_threadgroup = (full + 3) / 4;
  thread.dispatch_simdgroups_per_threadgroup = (full + LANES - 1) / LANES;
  thread.quadgroup_index_in_threadgroup = lane / 4;
  thread.quadgroups_per_threadgroup = (lanes + 3) / 4;
  thread.simdgroup_index_in_threadgroup = lane / LANES;
  thread.simdgroups_per_threadgroup = (lanes + LANES - 1) / LANES;
  thread.thread_execution_width = thread.threads_per_simdgroup = LANES;
  thread.thread_index_in_quadgroup = lane % 4;
  thread.thread_index_in_simdgroup = lane % LANES;
  thread.thread_index_in_threadgroup = lane;
  for (int d = 0; d < 3; d++) {
    const int whole = std::min(launch.threads[d], launch.grid[d]);
    thread.dispatch_threads_per_threadgroup[d] = whole;
    thread.grid_origin[d] = 0;
    thread.grid_size[d] = thread.threads_per_grid[d] = launch.grid[d];
    thread.thread_position_in_threadgroup[d] = in_group[d];
    thread.threadgroup_position_in_grid[d] = group[d];
    thread.thread_position_in_grid[d] = group[d] * whole + in_group[d];
    thread.threadgroups_per_grid[d] = groups[d];
    thread.threads_per_threadgroup[d] = extent[d];
  }
}

// Returns the faults as text, empty if there are none.
extern "C" const char* msl_run(msl_launch* launch) {
  int whole[3], groups[3];
  for (int d = 0; d < 3; d++) {
    whole[d] = std::min(launch->threads[d], launch->grid[d]);
    groups[d] = (launch->grid[d] + whole[d] - 1) / whole[d];
  }
  reset(*launch, whole[0] * whole[1] * whole[2]);

  std::vector<int> order(groups[0] * groups[1] * groups[2]);
  for (size_t i = 0; i < order.size(); i++) order[i] = launch->order == 1 ? int(order.size() - 1 - i) : int(i);
  if (launch->order == 2)
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[machine.next_random() % i]);

  for (const int serial : order) {
    const int group[3] = {serial % groups[0], serial / groups[0] % groups[1], serial / groups[0] / groups[1]};
    int extent[3], lane = 0;
    for (int d = 0; d < 3; d++) extent[d] = std::min(whole[d], launch->grid[d] - group[d] * whole[d]);
    for (int z = 0; z < extent[2]; z++)
      for (int y = 0; y < extent[1]; y++)
        for (int x = 0; x < extent[0]; x++) {
          const int in_group[3] = {x, y, z};
          set_attributes(lane++, in_group, group, extent, groups, *launch);
        }
    // Every bit set is NaN, so that what a kernel forgets to write shows in its results.
    const msl_module& module = module_of(*launch);
    for (int i = 0; i < module.array_count; i++) {
      const msl_array& array = ((const msl_array*)module.arrays)[i];
      memset((void*)array.address, 0xFF, array.bytes);
    }
    reset_shared_memory();
    run_threadgroup(lane, launch->order);
    if (machine.stopped) break;
    machine.group++;
  }
  machine.current = nullptr;
  launch->accesses = machine.accesses;
  for (int i = 0; i < launch->buffer_count; i++)
    launch->buffers[i].unwritten = launch->checking && !machine.stopped ? unwritten_bytes(machine.regions[i]) : 0;
  machine.regions.clear();
  return faults();
}

// What a compiled kernel, the runtime and Python agree on. Included by both compilers, so plain types only.
#pragma once

#define MSL_MAX_BUFFERS 31

// The attributes of the running thread, by their Metal names, and the addresses of the kernel's buffers.
struct msl_thread {
  unsigned long buffers[MSL_MAX_BUFFERS];
  unsigned dispatch_quadgroups_per_threadgroup;
  unsigned dispatch_simdgroups_per_threadgroup;
  unsigned dispatch_threads_per_threadgroup[3];
  unsigned grid_origin[3];
  unsigned grid_size[3];
  unsigned quadgroup_index_in_threadgroup;
  unsigned quadgroups_per_threadgroup;
  unsigned simdgroup_index_in_threadgroup;
  unsigned simdgroups_per_threadgroup;
  unsigned thread_execution_width;
  unsigned thread_index_in_quadgroup;
  unsigned thread_index_in_simdgroup;
  unsigned thread_index_in_threadgroup;
  unsigned thread_position_in_grid[3];
  unsigned thread_position_in_threadgroup[3];
  unsigned threadgroup_position_in_grid[3];
  unsigned threadgroups_per_grid[3];
  unsigned threads_per_grid[3];
  unsigned threads_per_simdgroup;
  unsigned threads_per_threadgroup[3];
};

// What a rendezvous of a SIMD-group is for: lanes that meet must have called the same function in the same place.
enum msl_meeting {
  MSL_BARRIER,
  MSL_SHUFFLE,
  MSL_BROADCAST,
  MSL_REDUCE,
  MSL_PREFIX,
  MSL_VOTE,
  MSL_FILL,
  MSL_QUAD,
  MSL_MATRIX,
};

enum msl_memory { MSL_DEVICE = 1, MSL_THREADGROUP = 2 };  // bits of mem_flags
enum msl_atomic { MSL_LOAD, MSL_STORE, MSL_MODIFY };

// The structures that library.py fills or reads.
struct msl_array {  // a threadgroup variable
  unsigned long address;
  long bytes;
  long element_bytes;  // 0 if it is a structure
  unsigned long name;
};
struct msl_module {  // what a kernel's library says of itself
  unsigned long entry;
  unsigned long image;  // where it is loaded: its constants are from here
  unsigned long constants_end;
  unsigned long arrays;
  long array_count;
};
struct msl_buffer {
  unsigned long address;
  long bytes;
  long element_bytes;
  unsigned long name;
  int kind;        // Region::Kind
  long unwritten;  // result: bytes of an output that nothing wrote
};
struct msl_launch {
  unsigned long module;
  int grid[3];
  int threads[3];  // of a threadgroup
  int order;  // 0 forward, 1 backward, 2 random
  int checking;
  unsigned long seed;
  long buffer_count;
  msl_buffer buffers[MSL_MAX_BUFFERS];
  unsigned long accesses;  // result: how many were checked
};

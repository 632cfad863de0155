// One stack for each lane of a threadgroup, and the switch between two stacks.
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#include "machine.h"


#if defined(__x86_64__)
asm(R"(
.text
.globl msl_switch
.hidden msl_switch
.type msl_switch, @function
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

// A stack whose first switch calls `function`: six registers, its address, and a return address for alignment.
void* new_stack(char* top, void (*function)()) {
  void** stack = (void**)((uintptr_t)top & ~uintptr_t(15));
  *--stack = nullptr;
  *--stack = (void*)function;
  for (int i = 0; i < 6; i++) *--stack = nullptr;
  return stack;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl msl_switch
.hidden msl_switch
.type msl_switch, %function
msl_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");

// A stack whose first switch returns to `function`: x30 is the twelfth of the saved registers.
void* new_stack(char* top, void (*function)()) {
  char* stack = (char*)((uintptr_t)top & ~uintptr_t(15)) - 160;
  memset(stack, 0, 160);
  ((void**)stack)[11] = (void*)function;
  return stack;
}
#else
#error "the Metal emulator knows x86-64 and aarch64"
#endif

// Stacks for `count` lanes. The memory is kept for later launches; pages that nobody touches cost nothing.
char* stacks(size_t count) {
  static char* memory = nullptr;
  static size_t room = 0;
  if (count > room) {
    if (memory) munmap(memory, room * STACK_BYTES);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* fresh = mmap(nullptr, count * STACK_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (fresh == MAP_FAILED) throw std::bad_alloc();
    memory = (char*)fresh;
    room = count;
  }
  return memory;
}

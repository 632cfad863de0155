// float to bfloat16, which clang calls on x86-64 and which libgcc has from version 13 on only.
#if defined(__x86_64__)
#include <cstdint>
#include <cstring>

extern "C" __attribute__((visibility("hidden"))) uint32_t msl_round_to_bfloat(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (bits >> 16) | 64;  // a quiet NaN
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// A bfloat16 is returned in the low half of xmm0.
asm(R"(
.text
.weak __truncsfbf2
.type __truncsfbf2, @function
__truncsfbf2:
  pushq %rax
  call msl_round_to_bfloat
  movzwl %ax, %eax
  movd %eax, %xmm0
  popq %rcx
  ret
)");
#endif

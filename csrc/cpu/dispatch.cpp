// Which instruction set this processor has, among those the library was built for.
#include "dispatch.h"

#if defined(ECHOLORA_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace echolora {
namespace {

// Whether there is a matrix unit for bfloat16, and the kernel lets this process use its registers.
bool may_use_amx() {
#if defined(ECHOLORA_X86)
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & AMX_BF16) == 0 || (edx & AMX_TILE) == 0) return false;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

const Kernels* best() {
  const char* insisted = std::getenv("ECHOLORA_CPU_ISA");
  for (const Kernels* kernels : runnable())
    if (!insisted || !*insisted || std::string(insisted) == kernels->name) return kernels;
  std::string known;
  for (const Kernels* kernels : runnable()) known += (known.empty() ? "" : ", ") + std::string(kernels->name);
  throw std::runtime_error(std::string("ECHOLORA_CPU_ISA: got ") + insisted + ", wants one of " + known);
}

}  // namespace

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
#if defined(ECHOLORA_X86)  // the library was built for its instruction sets
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && may_use_amx()) found.push_back(&amx::kernels);
  if (avx512) found.push_back(&avx512::kernels);
  if (avx2) found.push_back(&avx2::kernels);
#endif
  found.push_back(&baseline::kernels);
  return found;
}

const Kernels& kernels() {
  static const Kernels* chosen = best();
  return *chosen;
}

}  // namespace echolora

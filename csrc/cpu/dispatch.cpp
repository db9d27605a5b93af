// Which instruction set this processor has, among those the library was built for.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace echolora {
namespace {

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
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back(&avx512::kernels);
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

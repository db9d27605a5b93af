// The CPU kernels that this processor can run.
#pragma once

#include <vector>

#include "types.h"

namespace echolora {

namespace amx {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace baseline {
extern const Kernels kernels;
}

// Widest first.
std::vector<const Kernels*> runnable();

// The widest, or the one that the environment variable ECHOLORA_CPU_ISA names.
const Kernels& kernels();

}  // namespace echolora

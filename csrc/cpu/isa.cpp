// The CPU kernels as one instruction set has them; built once for each, with ECHOLORA_ISA as its name.
#include "backward.h"

namespace echolora {
namespace ECHOLORA_ISA {

// visit(E{}) with the element type that `type` names
template <class Visit>
inline auto with_element(Type type, const Visit& visit) {
  switch (type) {
    case Type::f32: return visit(float{});
    case Type::f64: return visit(double{});
    case Type::bf16: return visit(bf16{});
    default: return visit(f16{});
  }
}

#define ECHOLORA_BY_ELEMENT(result, kernel, Arguments, type)                                    \
  result kernel##_any(const Arguments& p) {                                                     \
    return with_element(type, [&](auto element) { return kernel<decltype(element)>(p); });      \
  }
#define ECHOLORA_RUN_BY_ELEMENT(kernel, Arguments, type)                                        \
  void kernel##_any(const Arguments& p, Parallel parallel) {                                    \
    with_element(type, [&](auto element) { kernel<decltype(element)>(p, parallel); });          \
  }

namespace {
ECHOLORA_BY_ELEMENT(int64_t, shrink_work, Shrink, p.x.type)
ECHOLORA_RUN_BY_ELEMENT(shrink, Shrink, p.x.type)
ECHOLORA_BY_ELEMENT(int64_t, linear_epilogue_work, LinearEpilogue, p.type)
ECHOLORA_RUN_BY_ELEMENT(linear_epilogue, LinearEpilogue, p.type)
ECHOLORA_BY_ELEMENT(int64_t, adapter_backward_work, AdapterBackward, p.dy.type)
ECHOLORA_RUN_BY_ELEMENT(adapter_backward, AdapterBackward, p.dy.type)
ECHOLORA_RUN_BY_ELEMENT(lora_a_backward, LoraABackward, p.x.type)
ECHOLORA_BY_ELEMENT(int64_t, input_epilogue_work, InputEpilogue, p.type)
ECHOLORA_RUN_BY_ELEMENT(input_epilogue, InputEpilogue, p.type)
ECHOLORA_RUN_BY_ELEMENT(drop, Drop, p.x.type)

int64_t dora_norm_work_any(const DoraNorm& p) { return p.wide ? dora_norm_work<double>(p) : dora_norm_work<float>(p); }
void dora_norm_any(const DoraNorm& p, Parallel parallel) {
  p.wide ? dora_norm<double>(p, parallel) : dora_norm<float>(p, parallel);
}
}  // namespace

#define ECHOLORA_TEXT_OF(name) #name
#define ECHOLORA_TEXT(name) ECHOLORA_TEXT_OF(name)

extern const Kernels kernels;
const Kernels kernels = {
    ECHOLORA_TEXT(ECHOLORA_ISA), shrink_work_any,          shrink_any,          linear_epilogue_work_any, linear_epilogue_any,
    adapter_backward_work_any,   adapter_backward_any,     lora_a_backward_any, input_epilogue_work_any,  input_epilogue_any,
    dora_norm_work_any,          dora_norm_any,            drop_any,
};

}  // namespace ECHOLORA_ISA
}  // namespace echolora

// The CPU kernels as one instruction set has them; built once for each, with ECHOLORA_ISA as its name.
#if defined(__AMX_BF16__)
#include "amx.h"
#endif
#include "backward.h"
#include "distillation.h"
#include "network.h"

namespace echolora {
namespace ECHOLORA_ISA {

// for bfloat16 with bfloat16 adapters
#if defined(__AMX_BF16__)
using HalfProducts = Amx;
#else
using HalfProducts = Vectors<bf16>;
#endif

// visit(P{}) with the products for elements of `type` and adapters of `thin`
template <class Visit>
inline auto with_products(Type type, Type thin, const Visit& visit) {
  switch (type) {
    case Type::f32: return visit(Vectors<float>{});
    case Type::f64: return visit(Vectors<double>{});
    case Type::bf16: return thin == Type::bf16 ? visit(HalfProducts{}) : visit(Vectors<bf16>{});
    default: return visit(Vectors<f16>{});
  }
}

#define ECHOLORA_BY_TYPES(result, kernel, Arguments, type, thin)                             \
  result kernel##_any(const Arguments& p) {                                                  \
    return with_products(type, thin, [&](auto with) { return kernel<decltype(with)>(p); });  \
  }
#define ECHOLORA_RUN_BY_TYPES(kernel, Arguments, type, thin)                                 \
  ECHOLORA_BY_TYPES(int64_t, kernel##_work, Arguments, type, thin)                           \
  void kernel##_any(const Arguments& p, Parallel parallel) {                                 \
    with_products(type, thin, [&](auto with) { kernel<decltype(with)>(p, parallel); });      \
  }

namespace {
ECHOLORA_RUN_BY_TYPES(shrink, Shrink, p.x.type, p.a.type)
ECHOLORA_RUN_BY_TYPES(linear_epilogue, LinearEpilogue, p.type, p.b.type)
ECHOLORA_RUN_BY_TYPES(adapter_backward, AdapterBackward, p.dy.type, p.b.type)
ECHOLORA_RUN_BY_TYPES(lora_a_backward, LoraABackward, p.x.type, p.ds.type)
ECHOLORA_RUN_BY_TYPES(input_epilogue, InputEpilogue, p.type, p.a.type)
ECHOLORA_RUN_BY_TYPES(linear_forward, LinearForward, p.shrink.x.type, p.shrink.a.type)
ECHOLORA_RUN_BY_TYPES(linear_backward, LinearBackward, p.adapter.dy.type, p.adapter.b.type)

int64_t dora_norm_work_any(const DoraNorm& p) {
  return p.wide ? dora_norm_work<Vectors<double>>(p) : dora_norm_work<Vectors<float>>(p);
}
void dora_norm_any(const DoraNorm& p, Parallel parallel) {
  p.wide ? dora_norm<Vectors<double>>(p, parallel) : dora_norm<Vectors<float>>(p, parallel);
}
void drop_any(const Drop& p, Parallel parallel) {
  with_products(p.x.type, Type::f32, [&](auto with) { drop<typename decltype(with)::Element>(p, parallel); });
}
int64_t distillation_work_any(const Distillation& p) { return distillation_work(p); }
void distillation_any(const Distillation& p, Parallel parallel) {
  with_products(p.off.type, Type::f32, [&](auto with) { distillation<typename decltype(with)::Element>(p, parallel); });
}
void distillation_backward_any(const Distillation& p, Parallel parallel) {
  with_products(p.off.type, Type::f32,
                [&](auto with) { distillation_backward<typename decltype(with)::Element>(p, parallel); });
}

// visit(E{}) with the element type
template <class Visit>
auto with_element(Type type, const Visit& visit) {
  return with_products(type, Type::f32, [&](auto with) { return visit(typename decltype(with)::Element{}); });
}
void networks_forward_any(const NetworksForward& p, Parallel parallel) {
  with_element(p.networks.type, [&](auto e) { networks_forward<decltype(e)>(p, parallel); });
}
int64_t networks_backward_work_any(const NetworksBackward& p) {
  return with_element(p.networks.type, [&](auto e) { return networks_backward_work<decltype(e)>(p); });
}
void networks_backward_any(const NetworksBackward& p, Parallel parallel) {
  with_element(p.networks.type, [&](auto e) { networks_backward<decltype(e)>(p, parallel); });
}
}  // namespace

#define ECHOLORA_TEXT_OF(name) #name
#define ECHOLORA_TEXT(name) ECHOLORA_TEXT_OF(name)

extern const Kernels kernels;
const Kernels kernels = {
    ECHOLORA_TEXT(ECHOLORA_ISA),
    shrink_work_any,
    shrink_any,
    linear_epilogue_work_any,
    linear_epilogue_any,
    adapter_backward_work_any,
    adapter_backward_any,
    lora_a_backward_work_any,
    lora_a_backward_any,
    input_epilogue_work_any,
    input_epilogue_any,
    linear_forward_work_any,
    linear_forward_any,
    linear_backward_work_any,
    linear_backward_any,
    dora_norm_work_any,
    dora_norm_any,
    drop_any,
    distillation_work_any,
    distillation_any,
    distillation_backward_any,
    networks_forward_any,
    networks_backward_work_any,
    networks_backward_any,
};

}  // namespace ECHOLORA_ISA
}  // namespace echolora

// The CPU implementations of the losses' operators in csrc/library.cpp.
#include <limits>
#include <tuple>

#include "bind.h"

namespace echolora {
namespace {

Distillation distillation_of(const Tensor& off, const Optional& on, const Tensor& targets, double temperature,
                             const Optional& scales, bool off_learns, bool on_learns, const Optional& d_off,
                             const Optional& d_on) {
  Distillation p{};
  p.off = rows_of(off, "off");
  const auto like_off = [&](const Optional& tensor, const char* name) {
    if (!tensor) return Rows{};
    want_rows_like(*tensor, name, off, "off");
    want_shape(*tensor, name, {p.off.samples, p.off.per_sample, p.off.width});
    return rows_of(*tensor, name);
  };
  p.on = like_off(on, "on");
  p.d_off = like_off(d_off, "d_off");
  p.d_on = like_off(d_on, "d_on");
  want(on || !d_on, "on", "None", "a tensor where d_on is given");
  want(temperature > 0 && temperature < std::numeric_limits<double>::infinity(), "temperature",
       temperature, "more than 0 and finite");
  want_dense(targets, "targets", ScalarType::Long, p.off.total(), off);
  p.targets = static_cast<const int64_t*>(targets.data_ptr());
  for (int64_t m = 0; m < p.off.total(); m++)
    want(p.targets[m] == IGNORED_TARGET || (p.targets[m] >= 0 && p.targets[m] < p.off.width), "targets",
         p.targets[m], IGNORED_TARGET, " or a column of ", p.off.width);
  p.temperature = temperature;
  p.off_learns = off_learns;
  p.on_learns = on_learns;
  p.scales = data_of(scales, "scales", accumulator_of(off.scalar_type()), 3, off);
  return p;
}

std::tuple<Tensor, Tensor> distillation(const Tensor& off, const Optional& on, const Tensor& targets,
                                        double temperature, const Optional& scales, bool off_learns, bool on_learns,
                                        const Optional& d_off, const Optional& d_on) {
  Distillation p = distillation_of(off, on, targets, temperature, scales, off_learns, on_learns, d_off, d_on);
  want(scales || !(d_off || d_on), "scales", "None", "a tensor where d_off or d_on is given");
  const ScalarType wide = accumulator_of(off.scalar_type());
  const Tensor sums = empty({3}, wide), stats = empty({p.off.total(), DISTILLATION_STATS}, wide);
  p.sums = sums.data_ptr();
  p.stats = stats.data_ptr();
  const Tensor work = work_for(kernels().distillation_work(p), off);
  p.work = work.data_ptr();
  kernels().distillation(p, parallel);
  return {sums, stats};
}

void distillation_backward(const Tensor& off, const Optional& on, const Tensor& targets, const Tensor& stats,
                           double temperature, const Tensor& scales, bool off_learns, bool on_learns,
                           const Optional& d_off, const Optional& d_on) {
  Distillation p = distillation_of(off, on, targets, temperature, scales, off_learns, on_learns, d_off, d_on);
  const ScalarType wide = accumulator_of(off.scalar_type());
  want_dense(stats, "stats", wide, p.off.total() * DISTILLATION_STATS, off);
  p.stats = stats.data_ptr();
  kernels().distillation_backward(p, parallel);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(echolora, CPU, m) {
  m.impl("distillation", TORCH_BOX(&distillation));
  m.impl("distillation_backward", TORCH_BOX(&distillation_backward));
}

}  // namespace echolora

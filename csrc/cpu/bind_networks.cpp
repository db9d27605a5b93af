// The CPU implementations of the echo networks' operators in csrc/library.cpp.
#include <tuple>
#include <vector>

#include "bind.h"

namespace echolora {
namespace {

// The up-projections of `samples` samples, and how many rows they have, in proj_up's dtype.
Networks networks_of(const Tensor& proj_up, const Tensor& gate_up, const Tensor& gate_bias, const Tensor& scale,
                     const std::vector<int64_t>& widths, int64_t samples, const Tensor& first) {
  const ScalarType element = proj_up.scalar_type();
  want(proj_up.dim() == 2, "proj_up", shape_of(proj_up), "2 dimensions");
  want_element(proj_up, "proj_up");
  Networks p{};
  p.samples = samples;
  p.m = proj_up.size(1);
  p.count = static_cast<int64_t>(widths.size());
  p.widths = widths.data();
  p.type = type_of(proj_up);
  int64_t rows = 0;
  for (const int64_t width : widths) {
    want(width >= 0, "widths", width, "at least 0");
    rows += width;
  }
  want_shape(proj_up, "proj_up", {rows, p.m});
  want_dense(proj_up, "proj_up", element, rows * p.m, first);
  want_shape(gate_up, "gate_up", {rows, p.m});
  want_dense(gate_up, "gate_up", element, rows * p.m, first);
  want_shape(gate_bias, "gate_bias", {rows});
  want_dense(gate_bias, "gate_bias", element, rows, first);
  want_shape(scale, "scale", {p.count});
  want_dense(scale, "scale", element, p.count, first);
  p.proj_up = proj_up.data_ptr();
  p.gate_up = gate_up.data_ptr();
  p.gate_bias = gate_bias.data_ptr();
  p.scale = scale.data_ptr();
  return p;
}

std::tuple<Tensor, Tensor> networks_forward(const Tensor& u, const Tensor& down, const Tensor& proj_up,
                                            const Tensor& gate_up, const Tensor& gate_bias, const Tensor& scale,
                                            const std::vector<int64_t> widths) {
  const ScalarType element = u.scalar_type();
  want(u.dim() == 2, "u", shape_of(u), "2 dimensions");
  want_element(u, "u");
  NetworksForward p{};
  p.networks = networks_of(proj_up, gate_up, gate_bias, scale, widths, u.size(0), u);
  p.d = u.size(1);
  want_dtype(proj_up, "proj_up", element);
  want_dense(u, "u", element, p.networks.samples * p.d, u);
  want_shape(down, "down", {p.networks.hidden(), p.d});
  want_dense(down, "down", element, p.networks.hidden() * p.d, u);
  const Tensor delta = empty({p.networks.samples * proj_up.size(0)}, element);
  const Tensor h = empty({p.networks.samples, p.networks.hidden()}, accumulator_of(element));
  p.u = u.data_ptr();
  p.down = down.data_ptr();
  p.h = h.data_ptr();
  p.delta = delta.data_ptr();
  kernels().networks_forward(p, parallel);
  return {delta, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> networks_backward(
    const Tensor& ddelta, const Tensor& h, const Tensor& proj_up, const Tensor& gate_up, const Tensor& gate_bias,
    const Tensor& scale, const std::vector<int64_t> widths) {
  const ScalarType element = ddelta.scalar_type();
  want_element(ddelta, "ddelta");
  want(h.dim() == 2, "h", shape_of(h), "2 dimensions");
  NetworksBackward p{};
  p.networks = networks_of(proj_up, gate_up, gate_bias, scale, widths, h.size(0), ddelta);
  const int64_t samples = p.networks.samples, hidden = p.networks.hidden();
  want_dtype(proj_up, "proj_up", element);
  want_shape(ddelta, "ddelta", {samples * proj_up.size(0)});
  want_dense(ddelta, "ddelta", element, samples * proj_up.size(0), ddelta);
  want_shape(h, "h", {samples, hidden});
  want_dense(h, "h", accumulator_of(element), samples * hidden, ddelta);
  const Tensor da = empty({samples, hidden}, element);
  const Tensor dproj_up = torch::stable::empty_like(proj_up), dgate_up = torch::stable::empty_like(gate_up);
  const Tensor dgate_bias = torch::stable::empty_like(gate_bias), dscale = torch::stable::empty_like(scale);
  p.ddelta = ddelta.data_ptr();
  p.h = h.data_ptr();
  p.da = da.data_ptr();
  p.dproj_up = dproj_up.data_ptr();
  p.dgate_up = dgate_up.data_ptr();
  p.dgate_bias = dgate_bias.data_ptr();
  p.dscale = dscale.data_ptr();
  const Tensor work = work_for(kernels().networks_backward_work(p), ddelta);
  p.work = work.data_ptr();
  kernels().networks_backward(p, parallel);
  return {da, dproj_up, dgate_up, dgate_bias, dscale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(echolora, CPU, m) {
  m.impl("networks_forward", TORCH_BOX(&networks_forward));
  m.impl("networks_backward", TORCH_BOX(&networks_backward));
}

}  // namespace echolora

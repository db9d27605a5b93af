// The CPU implementations of the adapted linear's operators in csrc/library.cpp.
#include <array>
#include <limits>
#include <tuple>

#include "bind.h"

namespace echolora {
namespace {

Dropout dropout_of(const Optional& seed, int64_t below, double keep_scale) {
  want(below >= 0 && below <= int64_t{1} << 24, "drop_below", below, "0 to 2^24");
  if (below == 0) return {};
  want(seed.has_value(), "seed", "None", "a tensor where drop_below is not 0");
  want(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "seed", dtype_of(*seed), "one Long element");
  return {static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr())), below, keep_scale};
}

Shrink shrink_of(const Tensor& x, const Tensor& a, double scaling, const Dropout& dropout, const Optional& gain,
                 int64_t site, const Optional& delta, const Optional& mask) {
  const ScalarType element = x.scalar_type(), wide = accumulator_of(element);
  want(a.dim() == 2, "a", shape_of(a), "2 dimensions");
  Shrink p{};
  p.rank = a.size(0);
  want_rank(a, "a", p.rank);
  p.x = rows_of(x, "x");
  p.a = thin_of(a, "a", element, p.rank, p.x.width, x);
  p.scaling = scaling;
  p.dropout = dropout;
  p.gain = data_of(gain, "gain", wide, p.x.width, x);
  want(site >= 0 && site <= 2, "site", site, "0, 1 or 2");
  want(site == 0 || (delta && mask), "delta and mask", "None", "tensors for an echo inside the adapter");
  p.site = static_cast<Site>(site);
  if (site == 0) return p;
  p.delta = data_of(delta, "delta", wide, p.x.samples * (site == 2 ? p.rank : p.x.width), x);
  p.mask = data_of(mask, "mask", wide, p.x.total(), x);
  return p;
}

Tensor shrink(const Tensor& x, const Tensor& a, double scaling, const Optional& seed, int64_t drop_below,
              double keep_scale, const Optional& gain, int64_t site, const Optional& delta, const Optional& mask) {
  Shrink p = shrink_of(x, a, scaling, dropout_of(seed, drop_below, keep_scale), gain, site, delta, mask);
  const Tensor s = empty({p.x.total(), p.rank}, a.scalar_type());
  p.s = s.data_ptr();
  p.s_type = type_of(a);
  if (p.x.total() == 0) return s;
  const Tensor work = work_for(kernels().shrink_work(p), x);
  p.work = work.data_ptr();
  kernels().shrink(p, parallel);
  return s;
}

LinearEpilogue epilogue_of(const Tensor& s, const Tensor& b, const Optional& z, const Optional& base,
                           const Optional& gain, const Optional& bias, const Optional& delta, const Optional& mask,
                           const Tensor& y) {
  const Rows of_y = rows_of(y, "y");
  const ScalarType element = y.scalar_type(), wide = accumulator_of(element);
  const int64_t rows = of_y.total(), width = of_y.width;
  want(s.dim() == 2, "s", shape_of(s), "2 dimensions");
  LinearEpilogue p{};
  p.rank = s.size(1);
  want_rank(s, "s", p.rank);
  want_dense(y, "y", element, rows * width, s);
  p.samples = of_y.samples;
  p.per_sample = of_y.per_sample;
  p.width = width;
  p.type = type_of(y);
  p.s = thin_of(s, "s", element, rows, p.rank, y);
  p.b = thin_of(b, "b", element, width, p.rank, y);
  p.z = data_of(z, "z", element, rows * width, y);
  p.base = data_of(base, "base", element, rows * width, y);
  p.gain = data_of(gain, "gain", wide, width, y);
  p.bias = data_of(bias, "bias", wide, width, y);
  want(!delta || mask, "mask", "None", "a tensor where delta is given");
  p.delta = data_of(delta, "delta", wide, p.samples * width, y);
  if (delta) p.mask = data_of(mask, "mask", wide, rows, y);
  want(z || !base, "z", "None", "a tensor where base is given");
  p.y = y.data_ptr();
  return p;
}

void linear_epilogue(const Tensor& s, const Tensor& b, const Optional& z, const Optional& base, const Optional& gain,
                     const Optional& bias, const Optional& delta, const Optional& mask, const Tensor& y, bool store_z) {
  want(!store_z, "store_z", "True", "False for CPU tensors");
  LinearEpilogue p = epilogue_of(s, b, z, base, gain, bias, delta, mask, y);
  if (y.numel() == 0) return;
  const Tensor work = work_for(kernels().linear_epilogue_work(p), y);
  p.work = work.data_ptr();
  kernels().linear_epilogue(p, parallel);
}

Tensor linear_forward(const Tensor& x, const Tensor& a, const Tensor& b, double scaling, const Optional& seed,
                      int64_t drop_below, double keep_scale, int64_t site, const Optional& delta, const Optional& mask,
                      const Optional& z, const Optional& base, const Optional& gain, const Optional& bias,
                      const Tensor& y) {
  const Dropout dropout = dropout_of(seed, drop_below, keep_scale);
  want_rows_like(x, "x", y, "y");
  const Optional inner = site == 3 ? std::nullopt : delta, outer = site == 3 ? delta : std::nullopt;
  LinearForward p{};
  p.shrink = shrink_of(x, a, scaling, dropout, std::nullopt, site == 3 ? 0 : site, inner, mask);
  const Tensor s = empty({p.shrink.x.total(), p.shrink.rank}, a.scalar_type());
  p.shrink.s = s.data_ptr();
  p.shrink.s_type = type_of(a);
  p.epilogue = epilogue_of(s, b, z, base, gain, bias, outer, mask, y);
  if (y.numel() == 0) return shrink(x, a, scaling, seed, drop_below, keep_scale, std::nullopt, site % 3, inner, mask);
  const Tensor work = work_for(kernels().linear_forward_work(p), x);
  p.shrink.work = work.data_ptr();
  kernels().linear_forward(p, parallel);
  return s;
}

// What one pass over dy yields, [rows, r], [N, r], [N], [N], [n, N]; those that are not needed are empty.
struct AdapterResults {
  Tensor ds, db, dbias, dgain, ddelta;
  void clear() {
    for (Tensor* tensor : {&ds, &db, &dbias, &dgain, &ddelta}) torch::stable::zero_(*tensor);
  }
};

AdapterBackward adapter_of(const Tensor& dy, const Optional& s, const Tensor& b, double scaling, const Optional& gain,
                           const Optional& z, const Optional& mask, const std::array<bool, 5>& needs,
                           bool add_low_rank, AdapterResults* results) {
  const auto [need_ds, need_db, need_dbias, need_dgain, need_ddelta] = needs;
  const ScalarType element = dy.scalar_type(), wide = accumulator_of(element);
  AdapterBackward p{};
  p.dy = rows_of(dy, "dy");
  want(b.dim() == 2, "b", shape_of(b), "2 dimensions");
  p.rank = b.size(1);
  want_rank(b, "b", p.rank);
  const int64_t rows = p.dy.total(), width = p.dy.width;
  p.b = thin_of(b, "b", element, width, p.rank, dy);
  want(s || !(need_db || (need_dgain && add_low_rank)), "s", "None", "a tensor where need_db or add_low_rank is set");
  want(z || !need_dgain, "z", "None", "a tensor where need_dgain is set");
  want(mask || !need_ddelta, "mask", "None", "a tensor where need_ddelta is set");
  if (s) p.s = thin_of(*s, "s", element, rows, p.rank, dy);
  p.scaling = scaling;
  p.add_low_rank = add_low_rank;
  p.gain = data_of(gain, "gain", wide, width, dy);
  p.z = data_of(z, "z", element, rows * width, dy);
  p.mask = data_of(mask, "mask", wide, rows, dy);
  const Tensor none = empty({0}, wide);
  const auto result = [&](bool needed, Tensor* to, std::initializer_list<int64_t> shape, ScalarType dtype) {
    *to = needed ? empty(shape, dtype) : none;
    return needed ? to->data_ptr() : nullptr;
  };
  p.ds = result(need_ds, &results->ds, {rows, p.rank}, b.scalar_type());
  p.ds_type = type_of(b);
  p.db = result(need_db, &results->db, {width, p.rank}, wide);
  p.dbias = result(need_dbias, &results->dbias, {width}, wide);
  p.dgain = result(need_dgain, &results->dgain, {width}, wide);
  p.ddelta = result(need_ddelta, &results->ddelta, {p.dy.samples, width}, wide);
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adapter_backward(
    const Tensor& dy, const Optional& s, const Tensor& b, double scaling, const Optional& gain, const Optional& z,
    const Optional& mask, bool need_ds, bool need_db, bool need_dbias, bool need_dgain, bool need_ddelta,
    bool add_low_rank) {
  AdapterResults results;
  AdapterBackward p = adapter_of(dy, s, b, scaling, gain, z, mask,
                                 {need_ds, need_db, need_dbias, need_dgain, need_ddelta}, add_low_rank, &results);
  if (dy.numel() == 0) {
    results.clear();
  } else if (need_ds || need_db || need_dbias || need_dgain || need_ddelta) {
    const Tensor work = work_for(kernels().adapter_backward_work(p), dy);
    p.work = work.data_ptr();
    kernels().adapter_backward(p, parallel);
  }
  return {results.ds, results.db, results.dbias, results.dgain, results.ddelta};
}

LoraABackward lora_a_of(const Tensor& x, const Tensor& ds, const Dropout& dropout, const Optional& delta,
                        const Optional& mask, Tensor* da) {
  const ScalarType element = x.scalar_type(), wide = accumulator_of(element);
  LoraABackward p{};
  p.x = rows_of(x, "x");
  want(ds.dim() == 2, "ds", shape_of(ds), "2 dimensions");
  p.rank = ds.size(1);
  want_rank(ds, "ds", p.rank);
  p.ds = thin_of(ds, "ds", element, p.x.total(), p.rank, x);
  p.dropout = dropout;
  want(!delta || mask, "mask", "None", "a tensor where delta is given");
  p.delta = data_of(delta, "delta", wide, p.x.samples * p.x.width, x);
  if (delta) p.mask = data_of(mask, "mask", wide, p.x.total(), x);
  *da = empty({p.rank, p.x.width}, wide);
  p.da = da->data_ptr();
  return p;
}

Tensor lora_a_backward(const Tensor& x, const Tensor& ds, const Optional& seed, int64_t drop_below, double keep_scale,
                       const Optional& delta, const Optional& mask) {
  Tensor da;
  LoraABackward p = lora_a_of(x, ds, dropout_of(seed, drop_below, keep_scale), delta, mask, &da);
  if (x.numel() == 0) return torch::stable::zero_(da);
  const Tensor work = work_for(kernels().lora_a_backward_work(p), x);
  p.work = work.data_ptr();
  kernels().lora_a_backward(p, parallel);
  return da;
}

InputEpilogue input_of(const Tensor& ds, const Tensor& a, const Optional& product, const Dropout& dropout,
                       bool accumulate, const Tensor& dx) {
  const Rows of_dx = rows_of(dx, "dx");
  want(ds.dim() == 2, "ds", shape_of(ds), "2 dimensions");
  const ScalarType element = dx.scalar_type();
  InputEpilogue p{};
  p.total = of_dx.total();
  p.width = of_dx.width;
  p.rank = ds.size(1);
  want_rank(ds, "ds", p.rank);
  want_dense(dx, "dx", element, p.total * p.width, ds);
  p.type = type_of(dx);
  p.ds = thin_of(ds, "ds", element, p.total, p.rank, dx);
  p.a = thin_of(a, "a", element, p.rank, p.width, dx);
  p.product = data_of(product, "product", element, p.total * p.width, dx);
  p.dropout = dropout;
  p.accumulate = accumulate;
  p.dx = dx.data_ptr();
  return p;
}

void input_epilogue(const Tensor& ds, const Tensor& a, const Optional& product, const Optional& seed,
                    int64_t drop_below, double keep_scale, bool accumulate, const Tensor& dx) {
  InputEpilogue p = input_of(ds, a, product, dropout_of(seed, drop_below, keep_scale), accumulate, dx);
  if (dx.numel() == 0) return;
  const Tensor work = work_for(kernels().input_epilogue_work(p), dx);
  p.work = work.data_ptr();
  kernels().input_epilogue(p, parallel);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_backward(
    const Tensor& dy, const Optional& s, const Tensor& b, double scaling, const Optional& gain, const Optional& z,
    const Optional& mask, const Optional& x, const Optional& a, const Optional& seed, int64_t drop_below,
    double keep_scale, const Optional& delta, const Optional& product, const Optional& dx, bool need_ds, bool need_db,
    bool need_dbias, bool need_dgain, bool need_ddelta) {
  const Dropout dropout = dropout_of(seed, drop_below, keep_scale);
  AdapterResults results;
  LinearBackward p{};
  p.need_a = x.has_value();
  p.need_x = dx.has_value();
  want(a || !dx, "a", "None", "a tensor where dx is given");
  if (x) want_rows_like(*x, "x", dy, "dy");
  if (dx) want_dtype(*dx, "dx", dy.scalar_type());
  if (dx) want(rows_of(*dx, "dx").total() == rows_of(dy, "dy").total(), "dx", shape_of(*dx), "as many rows as dy");
  p.adapter = adapter_of(dy, s, b, scaling, gain, z, mask,
                         {need_ds || p.need_a || p.need_x, need_db, need_dbias, need_dgain, need_ddelta}, true, &results);
  Tensor da = empty({0}, accumulator_of(dy.scalar_type()));
  if (x) p.lora_a = lora_a_of(*x, results.ds, dropout, delta, mask, &da);
  if (dx) p.input = input_of(results.ds, *a, product, dropout, true, *dx);
  if (dy.numel() == 0) {
    results.clear();
    torch::stable::zero_(da);
  } else {
    const Tensor work = work_for(kernels().linear_backward_work(p), dy);
    p.adapter.work = work.data_ptr();
    kernels().linear_backward(p, parallel);
  }
  return {results.ds, results.db, results.dbias, results.dgain, results.ddelta, da};
}

std::tuple<Tensor, Tensor> dora_norm(const Tensor& weight, const Tensor& a, const Tensor& b, double scaling,
                                     const Optional& magnitude) {
  want(weight.dim() == 2, "weight", shape_of(weight), "2 dimensions");
  want_element(weight, "weight");
  want(a.dim() == 2, "a", shape_of(a), "2 dimensions");
  DoraNorm p{};
  p.wide = weight.scalar_type() == ScalarType::Double || a.scalar_type() == ScalarType::Double;
  const ScalarType wide = p.wide ? ScalarType::Double : ScalarType::Float;
  p.d_out = weight.size(0);
  p.d_in = weight.size(1);
  p.rank = a.size(0);
  want_rank(a, "a", p.rank);
  p.weight = {weight.data_ptr(), type_of(weight), weight.stride(0), weight.stride(1)};
  want_element(a, "a");
  want_shape(a, "a", {p.rank, p.d_in});
  want_element(b, "b");
  want_shape(b, "b", {p.d_out, p.rank});
  want_same_device(a, "a", weight);
  want_same_device(b, "b", weight);
  p.a = {a.data_ptr(), type_of(a), a.stride(0), a.stride(1)};
  p.b = {b.data_ptr(), type_of(b), b.stride(0), b.stride(1)};
  p.scaling = scaling;
  p.floor = p.wide ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  p.magnitude = data_of(magnitude, "magnitude", wide, p.d_out, weight);
  const Tensor norm = empty({p.d_out}, wide), gain = empty({magnitude ? p.d_out : 0}, wide);
  p.norm = norm.data_ptr();
  p.gain = gain.data_ptr();
  const Tensor work = empty({kernels().dora_norm_work(p)}, wide);
  p.work = work.data_ptr();
  kernels().dora_norm(p, parallel);
  return {norm, gain};
}

Tensor drop(const Tensor& x, const Tensor& seed, int64_t drop_below, double keep_scale) {
  Drop p{};
  p.x = rows_of(x, "x");
  p.dropout = dropout_of(seed, drop_below, keep_scale);
  const Tensor out = empty({p.x.total(), p.x.width}, x.scalar_type());
  p.out = out.data_ptr();
  kernels().drop(p, parallel);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(echolora, CPU, m) {
  m.impl("shrink", TORCH_BOX(&shrink));
  m.impl("linear_epilogue", TORCH_BOX(&linear_epilogue));
  m.impl("adapter_backward", TORCH_BOX(&adapter_backward));
  m.impl("lora_a_backward", TORCH_BOX(&lora_a_backward));
  m.impl("input_epilogue", TORCH_BOX(&input_epilogue));
  m.impl("linear_forward", TORCH_BOX(&linear_forward));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
  m.impl("dora_norm", TORCH_BOX(&dora_norm));
  m.impl("drop", TORCH_BOX(&drop));
}

}  // namespace echolora

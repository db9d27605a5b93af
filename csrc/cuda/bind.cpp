// The CUDA implementations of the echolora operators: checks, outputs and workspaces around the C interface.
//
// Only torch's stable ABI is used, so that one build serves every torch from 2.11 on, with or without CUDA.

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../check.h"
#include "echolora_cuda.h"

// What setup.py built the kernels for, for echolora::cuda_architectures.
extern "C" const char* echolora_cuda_architectures() { return ECHOLORA_CUDA_ARCHS; }

namespace {

using namespace echolora;
using Maybe = Optional;
using Shape = std::vector<int64_t>;

// Rows and columns are counted in 32 bits, with room for one tile past the end; elements in 64.
constexpr int64_t MAX_SIZE = (int64_t{1} << 31) - 1024;
// Above this rank, partial sums of dS would move more bytes than a second read of dY.
constexpr int64_t ONE_PASS_RANK = 32;

int code_of(const Tensor& t, const char* name) {
  want_element(t, name);
  switch (t.scalar_type()) {
    case ScalarType::Half: return ECHOLORA_FLOAT16;
    case ScalarType::BFloat16: return ECHOLORA_BFLOAT16;
    case ScalarType::Float: return ECHOLORA_FLOAT32;
    default: return ECHOLORA_FLOAT64;
  }
}

Shape sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

// a contiguous tensor of this shape and dtype, on the device of `like`
void* dense(const Tensor& t, const char* name, const Shape& shape, ScalarType type, const Tensor& like) {
  want_shape(t, name, shape);
  want_dtype(t, name, type);
  want_same_device(t, name, like);
  want(t.is_contiguous(), name, strides_of(t), "a contiguous tensor");
  return t.data_ptr();
}

void* dense(const Maybe& t, const char* name, const Shape& shape, ScalarType type, const Tensor& like) {
  return t ? dense(*t, name, shape, type, like) : nullptr;
}

echolora_rows rows(const Tensor& t, const char* name) {
  want(t.dim() == 3, name, shape_of(t), "[n, T, width]");
  const int64_t n = t.size(0), length = t.size(1), width = t.size(2);
  want(n >= 1 && length >= 1 && width >= 1 && n * length <= MAX_SIZE && width <= MAX_SIZE, name, shape_of(t),
       "at least one element, and n * T and width up to ", MAX_SIZE);
  return {t.data_ptr(), code_of(t, name), n, length, width, t.stride(0), t.stride(1), t.stride(2)};
}

void want_matrix(const Tensor& t, const char* name, const char* shape) {
  want(t.dim() == 2 && t.size(0) >= 1 && t.size(1) >= 1 && t.size(0) <= MAX_SIZE && t.size(1) <= MAX_SIZE, name,
       shape_of(t), shape, " with at least one element and sizes up to ", MAX_SIZE);
}

// the same rows as one sample, where the strides allow it
echolora_rows one_sample(echolora_rows r) {
  if (r.samples > 1 && r.stride_n == r.length * r.stride_t) {
    r.length *= r.samples;
    r.samples = 1;
  }
  return r;
}

// [rows, cols] of the layer's dtype or its accumulator's
echolora_matrix matrix(const Tensor& t, const char* name, int64_t rows, int64_t cols, const Tensor& like) {
  want_thin(t, name, like.scalar_type(), rows, cols, like);
  return {t.data_ptr(), code_of(t, name), t.stride(0), t.stride(1)};
}

int64_t rank_of(const Tensor& t, const char* name, int64_t dim) {
  want(t.dim() == 2, name, shape_of(t), "2 dimensions");
  want_rank(t, name, t.size(dim));
  return t.size(dim);
}

echolora_dropout dropout(const Maybe& seed, int64_t drop_below, double keep_scale, const Tensor& like) {
  want(drop_below >= 0 && drop_below <= 1 << 24, "drop_below", drop_below, "0 to 2^24");
  const void* p = dense(seed, "seed", {1}, ScalarType::Long, like);
  return {static_cast<const int64_t*>(p), static_cast<uint32_t>(drop_below), keep_scale};
}

void want_mask(const Maybe& delta, const Maybe& mask) {
  want(delta.has_value() == mask.has_value(), "mask", mask ? "a tensor without delta" : "None beside delta",
       "both or neither");
}

Tensor output(const Tensor& like, const Shape& shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

using StreamOf = AOTITorchError (*)(int32_t device_index, void** stream);

// Looked up, since a CPU build of torch has no such function, and Python loads torch's libraries each for itself.
StreamOf stream_of() {
  static const StreamOf found = [] {
    const char* name = "aoti_torch_get_current_cuda_stream";
    void* function = dlsym(RTLD_DEFAULT, name);
    void* library = function ? nullptr : dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<StreamOf>(library ? dlsym(library, name) : function);
  }();
  return found;
}

// The device and the stream that an operator runs on.
class Launch {
 public:
  explicit Launch(const Tensor& like) : like_(like), guard_(like.get_device_index()) {
    want(stream_of() != nullptr, "torch", "a build without CUDA", "one with it");
    TORCH_ERROR_CODE_CHECK(stream_of()(like.get_device_index(), &stream_));
  }

  // memory for partial sums; freed in stream order when this object goes
  void* workspace(int64_t bytes) {
    if (bytes == 0) return nullptr;
    workspace_ = output(like_, {bytes}, ScalarType::Byte);
    return workspace_->data_ptr();
  }

  void* stream() const { return stream_; }

  static void check(int error, const char* name) {
    if (error != 0) throw std::runtime_error(std::string("echolora::") + name + ": " + echolora_cuda_error(error));
  }

 private:
  const Tensor& like_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
  Maybe workspace_;
};

void run_shrink(echolora_shrink_args& args, const Tensor& like) {
  Launch launch(like);
  args.workspace = launch.workspace(echolora_cuda_shrink_workspace(&args));
  Launch::check(echolora_cuda_shrink(&args, launch.stream()), "shrink");
}

Tensor shrink(Tensor x, Tensor a, double scaling, Maybe seed, int64_t drop_below, double keep_scale, Maybe gain,
              int64_t site, Maybe delta, Maybe mask) {
  const ScalarType type = x.scalar_type(), acc = accumulator_of(type);
  echolora_shrink_args args = {};
  args.x = rows(x, "x");
  const int64_t total = args.x.samples * args.x.length;
  args.rank = rank_of(a, "a", 0);
  args.a = matrix(a, "a", args.rank, args.x.width, x);
  args.scaling = scaling;
  args.dropout = dropout(seed, drop_below, keep_scale, x);
  args.gain = dense(gain, "gain", {args.x.width}, acc, x);
  want(site >= 0 && site <= 2, "site", site, "0, 1 or 2");
  want((site > 0) == delta.has_value(), "delta", delta ? "a tensor" : "None", "a tensor at site 1 or 2, None at site 0");
  want_mask(delta, mask);
  args.site = static_cast<int>(site);
  args.delta = dense(delta, "delta", {args.x.samples, site == 1 ? args.x.width : args.rank}, acc, x);
  args.mask = dense(mask, "mask", {args.x.samples, args.x.length}, acc, x);
  Tensor out = output(x, {total, args.rank}, type);
  args.out = out.data_ptr();
  run_shrink(args, x);
  return out;
}

void linear_epilogue(Tensor s, Tensor b, Maybe z, Maybe base, Maybe gain, Maybe bias, Maybe delta, Maybe mask, Tensor y,
                     bool store_z) {
  const ScalarType type = y.scalar_type(), acc = accumulator_of(type);
  const echolora_rows shape = rows(y, "y");
  echolora_linear_epilogue_args args = {};
  args.dtype = shape.dtype;
  args.samples = shape.samples;
  args.length = shape.length;
  args.width = shape.width;
  args.rank = rank_of(b, "b", 1);
  const int64_t total = shape.samples * shape.length;
  args.s = matrix(s, "s", total, args.rank, y);
  args.b = matrix(b, "b", shape.width, args.rank, y);
  want(!store_z || z, "z", "None", "memory where store_z is True");
  want(!base || (z && gain), "base", "a tensor", "one with z and gain only");
  want_mask(delta, mask);
  args.z = dense(z, "z", {total, shape.width}, type, y);
  args.base = dense(base, "base", {total, shape.width}, type, y);
  args.gain = dense(gain, "gain", {shape.width}, acc, y);
  args.bias = dense(bias, "bias", {shape.width}, acc, y);
  args.delta = dense(delta, "delta", {shape.samples, shape.width}, acc, y);
  args.mask = dense(mask, "mask", {shape.samples, shape.length}, acc, y);
  args.store_z = store_z;
  args.y = dense(y, "y", sizes_of(y), type, y);
  want(!store_z || args.z != args.y || (!gain && !bias && !delta), "store_z", "True for a z that is y",
       "memory apart from y where the two differ");
  Launch launch(y);
  Launch::check(echolora_cuda_linear_epilogue(&args, launch.stream()), "linear_epilogue");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adapter_backward(Tensor dy, Maybe s, Tensor b, double scaling,
                                                                    Maybe gain, Maybe z, Maybe mask, bool need_ds,
                                                                    bool need_db, bool need_dbias, bool need_dgain,
                                                                    bool need_ddelta, bool add_low_rank) {
  want(!add_low_rank, "add_low_rank", "True", "False for CUDA tensors");
  const ScalarType type = dy.scalar_type(), acc = accumulator_of(type);
  echolora_adapter_backward_args args = {};
  args.dy = rows(dy, "dy");
  const int64_t total = args.dy.samples * args.dy.length, width = args.dy.width;
  args.rank = rank_of(b, "b", 1);
  args.b = matrix(b, "b", width, args.rank, dy);
  args.scaling = scaling;
  args.gain = dense(gain, "gain", {width}, acc, dy);
  want(!need_db || s, "s", "None", "a tensor for need_db");
  want(!need_dgain || z, "z", "None", "a tensor for need_dgain");
  want(!need_ddelta || mask, "mask", "None", "a tensor for need_ddelta");
  if (s) args.s = matrix(*s, "s", total, args.rank, dy);
  args.z = dense(z, "z", {total, width}, type, dy);
  args.mask = dense(mask, "mask", {args.dy.samples, args.dy.length}, acc, dy);

  const auto wanted = [&](bool need, const Shape& shape) { return output(dy, need ? shape : Shape{0}, acc); };
  Tensor ds = wanted(need_ds, {total, args.rank}), db = wanted(need_db, {width, args.rank});
  Tensor dbias = wanted(need_dbias, {width}), dgain = wanted(need_dgain, {width});
  Tensor ddelta = wanted(need_ddelta, {args.dy.samples, width});

  const bool ds_apart = need_ds && args.rank > ONE_PASS_RANK;
  if (ds_apart) {
    echolora_shrink_args apart = {};
    apart.x = args.dy;
    apart.a = {args.b.data, args.b.dtype, args.b.stride_col, args.b.stride_row};
    apart.rank = args.rank;
    apart.scaling = scaling;
    apart.gain = args.gain;
    apart.out = ds.data_ptr();
    apart.out_wide = 1;
    run_shrink(apart, dy);
  }
  if (need_ds && !ds_apart) args.ds = ds.data_ptr();
  if (need_db) args.db = db.data_ptr();
  if (need_dbias) args.dbias = dbias.data_ptr();
  if (need_dgain) args.dgain = dgain.data_ptr();
  if (need_ddelta) args.ddelta = ddelta.data_ptr();
  if (args.ds || args.db || args.dbias || args.dgain || args.ddelta) {
    // fewer, fuller tiles where no sum belongs to one sample
    if (!need_ddelta) args.dy = one_sample(args.dy);
    Launch launch(dy);
    args.workspace = launch.workspace(echolora_cuda_adapter_backward_workspace(&args));
    Launch::check(echolora_cuda_adapter_backward(&args, launch.stream()), "adapter_backward");
  }
  return {ds, db, dbias, dgain, ddelta};
}

Tensor lora_a_backward(Tensor x, Tensor ds, Maybe seed, int64_t drop_below, double keep_scale, Maybe delta,
                       Maybe mask) {
  const ScalarType acc = accumulator_of(x.scalar_type());
  echolora_lora_a_backward_args args = {};
  args.x = rows(x, "x");
  const int64_t total = args.x.samples * args.x.length, width = args.x.width;
  args.rank = rank_of(ds, "ds", 1);
  args.ds = matrix(ds, "ds", total, args.rank, x);
  args.dropout = dropout(seed, drop_below, keep_scale, x);
  want_mask(delta, mask);
  args.delta = dense(delta, "delta", {args.x.samples, width}, acc, x);
  args.mask = dense(mask, "mask", {args.x.samples, args.x.length}, acc, x);
  Tensor da = output(x, {args.rank, width}, acc);
  args.da = da.data_ptr();
  if (!delta) args.x = one_sample(args.x);
  Launch launch(x);
  args.workspace = launch.workspace(echolora_cuda_lora_a_backward_workspace(&args));
  Launch::check(echolora_cuda_lora_a_backward(&args, launch.stream()), "lora_a_backward");
  return da;
}

void input_epilogue(Tensor ds, Tensor a, Maybe product, Maybe seed, int64_t drop_below, double keep_scale,
                    bool accumulate, Tensor dx) {
  want_matrix(dx, "dx", "[M, K]");
  const ScalarType type = dx.scalar_type();
  echolora_input_epilogue_args args = {};
  args.dtype = code_of(dx, "dx");
  args.rows = dx.size(0);
  args.width = dx.size(1);
  args.rank = rank_of(a, "a", 0);
  args.ds = matrix(ds, "ds", args.rows, args.rank, dx);
  args.a = matrix(a, "a", args.rank, args.width, dx);
  args.product = dense(product, "product", {args.rows, args.width}, type, dx);
  args.dropout = dropout(seed, drop_below, keep_scale, dx);
  args.accumulate = accumulate;
  args.dx = dense(dx, "dx", {args.rows, args.width}, type, dx);
  Launch launch(dx);
  Launch::check(echolora_cuda_input_epilogue(&args, launch.stream()), "input_epilogue");
}

std::tuple<Tensor, Tensor> dora_norm(Tensor weight, Tensor a, Tensor b, double scaling, Maybe magnitude) {
  want_matrix(weight, "weight", "[N, K]");
  const ScalarType acc = accumulator_of(weight.scalar_type());
  echolora_dora_norm_args args = {};
  args.dtype = code_of(weight, "weight");
  args.rows = weight.size(0);
  args.width = weight.size(1);
  args.rank = rank_of(a, "a", 0);
  args.weight = dense(weight, "weight", sizes_of(weight), weight.scalar_type(), weight);
  args.a = matrix(a, "a", args.rank, args.width, weight);
  want_dtype(b, "b", a.scalar_type());
  args.b = matrix(b, "b", args.rows, args.rank, weight);
  args.scaling = scaling;
  args.magnitude = dense(magnitude, "magnitude", {args.rows}, acc, weight);
  Tensor norm = output(weight, {args.rows}, acc), gain = output(weight, {magnitude ? args.rows : 0}, acc);
  args.norm = norm.data_ptr();
  args.gain = gain.data_ptr();
  Launch launch(weight);
  args.workspace = launch.workspace(echolora_cuda_dora_norm_workspace(&args));
  Launch::check(echolora_cuda_dora_norm(&args, launch.stream()), "dora_norm");
  return {norm, gain};
}

Tensor drop(Tensor x, Tensor seed, int64_t drop_below, double keep_scale) {
  echolora_drop_args args = {};
  args.x = rows(x, "x");
  args.dropout = dropout(seed, drop_below, keep_scale, x);
  Tensor out = output(x, {args.x.samples * args.x.length, args.x.width}, x.scalar_type());
  args.out = out.data_ptr();
  Launch launch(x);
  Launch::check(echolora_cuda_drop(&args, launch.stream()), "drop");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(echolora, CUDA, m) {
  m.impl("shrink", TORCH_BOX(&shrink));
  m.impl("linear_epilogue", TORCH_BOX(&linear_epilogue));
  m.impl("adapter_backward", TORCH_BOX(&adapter_backward));
  m.impl("lora_a_backward", TORCH_BOX(&lora_a_backward));
  m.impl("input_epilogue", TORCH_BOX(&input_epilogue));
  m.impl("dora_norm", TORCH_BOX(&dora_norm));
  m.impl("drop", TORCH_BOX(&drop));
}

// What the bindings share: tensors in, plain arguments out to the kernels.
#pragma once

#include <torch/csrc/stable/library.h>

#include "../check.h"
#include "dispatch.h"

namespace echolora {

inline void parallel(int64_t count, void (*task)(int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) task(i, context);
  });
}

inline Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Double: return Type::f64;
    case ScalarType::BFloat16: return Type::bf16;
    default: return Type::f16;
  }
}

inline Rows rows_of(const Tensor& tensor, const char* name) {
  want_rows(tensor, name);
  const bool samples = tensor.dim() == 3;
  const int64_t t = samples, w = t + 1;
  return {tensor.data_ptr(), type_of(tensor),  samples ? tensor.size(0) : 1,   tensor.size(t),
          tensor.size(w),    samples ? tensor.stride(0) : 0, tensor.stride(t), tensor.stride(w)};
}

inline Thin thin_of(const Tensor& tensor, const char* name, ScalarType element, int64_t rows, int64_t cols, const Tensor& first) {
  want_thin(tensor, name, element, rows, cols, first);
  return {tensor.data_ptr(), type_of(tensor), tensor.stride(0), tensor.stride(1)};
}

// A contiguous optional argument's data.
inline void* data_of(const Optional& tensor, const char* name, ScalarType dtype, int64_t numel, const Tensor& first) {
  if (!tensor) return nullptr;
  want_dense(*tensor, name, dtype, numel, first);
  return tensor->data_ptr();
}

// Uninitialised, of one or two dimensions; not by torch::stable::new_empty, which looks its operator up by name.
inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype) {
  const int64_t* sizes = shape.begin();
  const int64_t strides[] = {shape.size() == 2 ? sizes[1] : 1, 1};
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), sizes, strides, type, aoti_torch_device_type_cpu(), -1,
                                                  &made));
  return Tensor(made);
}

// Scratch of `size` accumulators of `like`'s elements.
inline Tensor work_for(int64_t size, const Tensor& like) { return empty({size}, accumulator_of(like.scalar_type())); }

}  // namespace echolora

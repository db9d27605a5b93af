// Argument checks that the CPU and the CUDA bindings share: each names the argument, what it got and what it wants.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace echolora {

using Tensor = torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// Throws "name: got ..., wants ..." where `fits` is false.
template <class... Wanted>
inline void want(bool fits, const char* name, const std::string& got, const Wanted&... wanted) {
  if (fits) return;
  std::ostringstream message;
  message << name << ": got " << got << ", wants ";
  (message << ... << wanted);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "shape [";
  for (int64_t i = 0; i < tensor.dim(); i++) text << (i ? ", " : "") << tensor.size(i);
  text << "]";
  return text.str();
}

inline std::string dtype_of(const Tensor& tensor) { return std::string("dtype ") + toString(tensor.scalar_type()); }

inline ScalarType accumulator_of(ScalarType element) {
  return element == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void want_element(const Tensor& tensor, const char* name) {
  const ScalarType t = tensor.scalar_type();
  want(t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::BFloat16 || t == ScalarType::Half, name,
       dtype_of(tensor), "Float, Double, BFloat16 or Half");
}

inline void want_shape(const Tensor& tensor, const char* name, const std::vector<int64_t>& shape) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  std::ostringstream wanted;
  wanted << "[";
  for (size_t i = 0; i < shape.size(); i++) {
    fits = fits && tensor.size(static_cast<int64_t>(i)) == shape[i];
    wanted << (i ? ", " : "") << shape[i];
  }
  want(fits, name, shape_of(tensor), wanted.str(), "]");
}

inline void want_same_device(const Tensor& tensor, const char* name, const Tensor& first) {
  want(tensor.is_cuda() == first.is_cuda() && tensor.get_device_index() == first.get_device_index(), name,
       tensor.is_cuda() ? "a CUDA tensor" : "a CPU tensor", "the device of the other arguments");
}

// A contiguous tensor of one dtype and a number of elements.
inline void want_dense(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel, const Tensor& first) {
  want_same_device(tensor, name, first);
  want(tensor.scalar_type() == dtype, name, dtype_of(tensor), toString(dtype));
  want(tensor.numel() == numel && tensor.is_contiguous(), name, shape_of(tensor), numel, " contiguous elements");
}

// [rows, cols] with any strides, in the element's or the accumulator's dtype.
inline void want_thin(const Tensor& tensor, const char* name, ScalarType element, int64_t rows, int64_t cols,
                      const Tensor& first) {
  want_same_device(tensor, name, first);
  want_shape(tensor, name, {rows, cols});
  const ScalarType t = tensor.scalar_type();
  want(t == element || t == accumulator_of(element), name, dtype_of(tensor), toString(element), " or ",
       toString(accumulator_of(element)));
}

inline void want_rank(const Tensor& tensor, const char* name, int64_t rank) {
  want(rank >= 1 && rank <= 256, name, shape_of(tensor), "a rank from 1 to 256");
}

inline void want_rows(const Tensor& tensor, const char* name) {
  want(tensor.dim() == 3, name, shape_of(tensor), "3 dimensions: samples, positions, width");
  want_element(tensor, name);
}

inline void want_same_dtype(const Tensor& tensor, const char* name, const Tensor& first) {
  want(tensor.scalar_type() == first.scalar_type(), name, dtype_of(tensor), toString(first.scalar_type()));
}

// The samples, positions and dtype of another tensor of rows.
inline void want_rows_like(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  want_rows(tensor, name);
  want_rows(other, other_name);
  want_same_device(tensor, name, other);
  want_same_dtype(tensor, name, other);
  want(tensor.size(0) == other.size(0) && tensor.size(1) == other.size(1), name, shape_of(tensor), "[", other.size(0),
       ", ", other.size(1), ", width], the rows of ", other_name);
}

}  // namespace echolora

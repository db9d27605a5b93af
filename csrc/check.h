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

// "[2, 3]"
template <class Sizes>
inline std::string text_of(const Sizes& sizes) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < sizes.size(); i++) text << (i ? ", " : "") << sizes[i];
  text << "]";
  return text.str();
}

inline std::string shape_of(const Tensor& tensor) { return "shape " + text_of(tensor.sizes()); }

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
  const auto sizes = tensor.sizes();
  want(std::vector<int64_t>(sizes.begin(), sizes.end()) == shape, name, shape_of(tensor), text_of(shape));
}

inline void want_same_device(const Tensor& tensor, const char* name, const Tensor& first) {
  want(tensor.is_cuda() == first.is_cuda() && tensor.get_device_index() == first.get_device_index(), name,
       tensor.is_cuda() ? "a CUDA tensor" : "a CPU tensor", "the device of the other arguments");
}

inline void want_dtype(const Tensor& tensor, const char* name, ScalarType dtype) {
  want(tensor.scalar_type() == dtype, name, dtype_of(tensor), toString(dtype));
}

// A contiguous tensor of one dtype and a number of elements.
inline void want_dense(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel, const Tensor& first) {
  want_same_device(tensor, name, first);
  want_dtype(tensor, name, dtype);
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

constexpr int64_t LARGEST_RANK = 256;

inline void want_rank(const Tensor& tensor, const char* name, int64_t rank) {
  want(rank >= 1 && rank <= LARGEST_RANK, name, shape_of(tensor), "a rank from 1 to ", LARGEST_RANK);
}

inline void want_rows(const Tensor& tensor, const char* name) {
  want(tensor.dim() == 3, name, shape_of(tensor), "3 dimensions: samples, positions, width");
  want_element(tensor, name);
}

// The samples, positions and dtype of another tensor of rows.
inline void want_rows_like(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  want_rows(tensor, name);
  want_rows(other, other_name);
  want_same_device(tensor, name, other);
  want_dtype(tensor, name, other.scalar_type());
  want(tensor.size(0) == other.size(0) && tensor.size(1) == other.size(1), name, shape_of(tensor), "[", other.size(0),
       ", ", other.size(1), ", width], the rows of ", other_name);
}

}  // namespace echolora

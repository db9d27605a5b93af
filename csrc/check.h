// Argument checks that the CPU and the CUDA bindings share: each names the argument, what it got and what it wants.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>  // TORCH_ERROR_CODE_CHECK: torch 2.11 has none with STABLE_ before it

#include <algorithm>
#include <cstdio>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace echolora {

using Tensor = torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// What a message says of a tensor, made to text only where a check fails.
template <class Sizes>
struct Listed {  // "[2, 3]"
  const char* before;
  Sizes sizes;
};
struct DtypeOf {
  ScalarType type;
};
inline auto shape_of(const Tensor& tensor) { return Listed<decltype(tensor.sizes())>{"shape ", tensor.sizes()}; }
inline auto strides_of(const Tensor& tensor) { return Listed<decltype(tensor.strides())>{"strides ", tensor.strides()}; }
inline DtypeOf dtype_of(const Tensor& tensor) { return {tensor.scalar_type()}; }

// Not by a stream: one that mixes two copies of the C++ library, as a linked-in one and torch's, crashes at a number.
inline void add_text(std::string& text, const char* part) { text += part; }
inline void add_text(std::string& text, DtypeOf of) { text.append("dtype ").append(toString(of.type)); }

template <class Number, std::enable_if_t<std::is_arithmetic_v<Number>, int> = 0>
inline void add_text(std::string& text, Number number) {
  if constexpr (std::is_integral_v<Number>) {
    text += std::to_string(number);
  } else {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%g", number);
    text += digits;
  }
}

template <class Sizes>
inline void add_text(std::string& text, const Listed<Sizes>& listed) {
  text.append(listed.before).append("[");
  const char* comma = "";
  for (const int64_t size : listed.sizes) {
    text.append(comma).append(std::to_string(size));
    comma = ", ";
  }
  text += "]";
}

template <class Got, class... Wanted>
[[noreturn, gnu::noinline, gnu::cold]] void refuse(const char* name, const Got& got, const Wanted&... wanted) {
  std::string message = name;
  message += ": got ";
  add_text(message, got);
  message += ", wants ";
  (add_text(message, wanted), ...);
  throw std::runtime_error(message);
}

// Throws "name: got ..., wants ..." where `fits` is false.
template <class Got, class... Wanted>
inline void want(bool fits, const char* name, const Got& got, const Wanted&... wanted) {
  if (!fits) refuse(name, got, wanted...);
}

inline ScalarType accumulator_of(ScalarType element) {
  return element == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void want_element(const Tensor& tensor, const char* name) {
  const ScalarType t = tensor.scalar_type();
  want(t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::BFloat16 || t == ScalarType::Half, name,
       dtype_of(tensor), "Float, Double, BFloat16 or Half");
}

template <class Sizes = std::initializer_list<int64_t>>
inline void want_shape(const Tensor& tensor, const char* name, const Sizes& shape) {
  const auto sizes = tensor.sizes();
  want(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), name, shape_of(tensor),
       Listed<const Sizes&>{"", shape});
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
  want(tensor.dim() == 2 || tensor.dim() == 3, name, shape_of(tensor), "[rows, width] or [samples, positions, width]");
  want_element(tensor, name);
}

// The samples, positions and dtype of another tensor of rows.
inline void want_rows_like(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  want_rows(tensor, name);
  want_rows(other, other_name);
  want_same_device(tensor, name, other);
  want_dtype(tensor, name, other.scalar_type());
  const auto sizes = tensor.sizes(), wanted = other.sizes();
  want(std::equal(sizes.begin(), sizes.end() - 1, wanted.begin(), wanted.end() - 1), name, shape_of(tensor),
       "the rows of ", other_name, ", ", shape_of(other));
}

}  // namespace echolora

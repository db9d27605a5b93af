// What every kernel shares: element types, loads of eight neighbours, rows of a tensor, dropout, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "echolora_cuda.h"
#include "philox.cuh"

namespace echolora {

constexpr int WARP = 32;
// Threads load, mask and store eight neighbouring columns at a time: 16 bytes of a 16-bit type, two Philox quads.
constexpr int CHUNK = 8;

template <typename E>
using Acc = std::conditional_t<std::is_same_v<E, double>, double, float>;

// Rows of a shared-memory tile are 16 bytes longer than their content, so that eight rows lie in different banks.
template <typename E>
constexpr int PAD = 16 / sizeof(E);

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__host__ __device__ __forceinline__ bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(uint4) == 0;
}

// Eight neighbours as they lie in memory. Kept as words: in variables of their own, 16-bit elements take twice the
// registers.
template <typename T>
struct alignas(16) Chunk {
  static constexpr int WORDS = CHUNK * sizeof(T) / sizeof(uint32_t);
  uint32_t w[WORDS];
};

// Eight neighbours to compute with.
template <typename A>
struct Values {
  A v[CHUNK];
};

template <typename T>
__device__ __forceinline__ Values<Acc<T>> widen(const Chunk<T>& c) {
  Values<Acc<T>> wide;
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) {
    T element;
    if constexpr (sizeof(T) == 2) {
      const uint16_t bits = static_cast<uint16_t>(c.w[i / 2] >> 16 * (i % 2));
      memcpy(&element, &bits, sizeof(T));
    } else {
      memcpy(&element, &c.w[i * sizeof(T) / sizeof(uint32_t)], sizeof(T));
    }
    wide.v[i] = static_cast<Acc<T>>(element);
  }
  return wide;
}

template <typename T>
__device__ __forceinline__ uint32_t pack(T low, T high) {
  uint16_t bits[2];
  memcpy(&bits[0], &low, sizeof(T));
  memcpy(&bits[1], &high, sizeof(T));
  return bits[0] | static_cast<uint32_t>(bits[1]) << 16;
}

template <typename T>
__device__ __forceinline__ Chunk<T> narrow(const Values<Acc<T>>& wide) {
  Chunk<T> c;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < CHUNK / 2; ++i) c.w[i] = pack(static_cast<T>(wide.v[2 * i]), static_cast<T>(wide.v[2 * i + 1]));
  } else {
    memcpy(&c, &wide, sizeof(c));
  }
  return c;
}

// All eight at once, 16 bytes at a time; `p` is aligned.
template <typename T>
__device__ __forceinline__ Chunk<T> read_chunk(const T* p) {
  Chunk<T> c;
#pragma unroll
  for (int i = 0; i < Chunk<T>::WORDS / 4; ++i) {
    const uint4 w = reinterpret_cast<const uint4*>(p)[i];
    c.w[4 * i] = w.x, c.w[4 * i + 1] = w.y, c.w[4 * i + 2] = w.z, c.w[4 * i + 3] = w.w;
  }
  return c;
}

template <typename T>
__device__ __forceinline__ void write_chunk(T* p, const Chunk<T>& c) {
#pragma unroll
  for (int i = 0; i < Chunk<T>::WORDS / 4; ++i)
    reinterpret_cast<uint4*>(p)[i] = {c.w[4 * i], c.w[4 * i + 1], c.w[4 * i + 2], c.w[4 * i + 3]};
}

// The first `valid` elements of p[0], p[stride], ..., p[7 stride], and zeros; `vector` promises stride 1 and alignment.
template <typename T>
__device__ __forceinline__ Chunk<T> load_chunk(const T* p, int64_t stride, int valid, bool vector) {
  if (vector && valid >= CHUNK) return read_chunk(p);
  Chunk<T> c = {};
  if constexpr (sizeof(T) == 2) {
    const T zero = static_cast<T>(0.0f);
#pragma unroll
    for (int i = 0; i < CHUNK; i += 2)
      c.w[i / 2] = pack(i < valid ? p[i * stride] : zero, i + 1 < valid ? p[(i + 1) * stride] : zero);
  } else {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i)
      if (i < valid) memcpy(&c.w[i * sizeof(T) / sizeof(uint32_t)], &p[i * stride], sizeof(T));
  }
  return c;
}

template <typename T>
__device__ __forceinline__ void store_chunk(T* p, const Values<Acc<T>>& wide, int valid, bool vector) {
  if (vector && valid >= CHUNK) {
    write_chunk(p, narrow<T>(wide));
  } else {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i)
      if (i < valid) p[i] = static_cast<T>(wide.v[i]);
  }
}

template <typename E>
constexpr int TYPE_ID = std::is_same_v<E, __half>          ? ECHOLORA_FLOAT16
                        : std::is_same_v<E, __nv_bfloat16> ? ECHOLORA_BFLOAT16
                        : std::is_same_v<E, float>         ? ECHOLORA_FLOAT32
                                                           : ECHOLORA_FLOAT64;

// A matrix whose elements become E on their way into registers; adapters are often wider than the layer.
template <typename E>
struct Matrix {
  const void* data;
  int64_t stride_row, stride_col;
  bool wide, vector;

  __device__ explicit Matrix(const echolora_matrix& m)
      : data(m.data),
        stride_row(m.stride_row),
        stride_col(m.stride_col),
        wide(m.dtype != TYPE_ID<E>),
        vector(m.stride_col == 1 && m.stride_row % CHUNK == 0 && aligned(m.data)) {}

  // eight neighbours of one row, `valid` of which exist
  __device__ __forceinline__ Chunk<E> load(int row, int col, int valid) const {
    const int64_t offset = row * stride_row + col * stride_col;
    if constexpr (!std::is_same_v<E, Acc<E>>)
      if (wide)
        return narrow<E>(widen(load_chunk(static_cast<const Acc<E>*>(data) + offset, stride_col, valid, vector)));
    return load_chunk(static_cast<const E*>(data) + offset, stride_col, valid, vector);
  }
};

// Contiguous [rows, width]; the element at (row, col) and those after it.
template <typename T>
struct Dense {
  const T* data;
  int width;
  bool vector;

  __device__ Dense(const void* p, int64_t columns)
      : data(static_cast<const T*>(p)), width(static_cast<int>(columns)), vector(columns % CHUNK == 0 && aligned(p)) {}

  __device__ __forceinline__ Values<Acc<T>> load(int row, int col) const {
    return widen(load_chunk(data + static_cast<int64_t>(row) * width + col, 1, width - col, vector));
  }
};

// [samples, length, width] with any strides.
template <typename E>
struct Rows {
  const E* data;
  int length, width;
  int64_t stride_n, stride_t, stride_c;
  bool single, vector;

  __device__ explicit Rows(const echolora_rows& r)
      : data(static_cast<const E*>(r.data)),
        length(static_cast<int>(r.length)),
        width(static_cast<int>(r.width)),
        stride_n(r.stride_n),
        stride_t(r.stride_t),
        stride_c(r.stride_c),
        single(r.samples == 1),
        vector(r.stride_c == 1 && r.stride_t % CHUNK == 0 && (single || r.stride_n % CHUNK == 0) && aligned(data)) {}

  __device__ __forceinline__ int sample(int row) const { return single ? 0 : row / length; }
  __device__ __forceinline__ int64_t offset(int sample, int t) const { return sample * stride_n + t * stride_t; }
  __device__ __forceinline__ int64_t offset(int row) const {
    const int n = sample(row);
    return offset(n, row - n * length);
  }
  // `exists` is false for rows past the end, which read as zeros
  __device__ __forceinline__ Chunk<E> load(int64_t row_offset, int col, bool exists) const {
    return load_chunk(data + row_offset + col * stride_c, stride_c, exists ? width - col : 0, vector);
  }
};

template <typename E>
struct Dropout {
  bool active;
  uint64_t seed;
  uint32_t drop_below;
  Acc<E> keep_scale;
  int quads;

  __device__ Dropout(const echolora_dropout& d, int width)
      : active(d.seed != nullptr),
        seed(active ? static_cast<uint64_t>(*d.seed) : 0),
        drop_below(d.drop_below),
        keep_scale(static_cast<Acc<E>>(d.keep_scale)),
        quads((width - 1) / QUAD + 1) {}

  __device__ __forceinline__ void apply(Values<Acc<E>>& c, int row, int col) const {
    const uint32_t keep = keep_bits<CHUNK>(seed, drop_below, row, col, quads);
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) c.v[i] = keep >> i & 1 ? c.v[i] * keep_scale : Acc<E>(0);
  }
};

// c += mask[row] delta[sample, :]
template <typename A>
__device__ __forceinline__ void add_echo(Values<A>& c, const Dense<A>& delta, const A* mask, int row, int sample,
                                         int col) {
  const A weight = mask[row];
  const Values<A> d = delta.load(sample, col);
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) c.v[i] += weight * d.v[i];
}

// ---- host side

template <typename E>
struct Type {
  using type = E;
};

template <typename F>
int with_type(int dtype, F&& body) {
  switch (dtype) {
    case ECHOLORA_FLOAT16:
      return body(Type<__half>());
    case ECHOLORA_BFLOAT16:
      return body(Type<__nv_bfloat16>());
    case ECHOLORA_FLOAT32:
      return body(Type<float>());
    case ECHOLORA_FLOAT64:
      return body(Type<double>());
    default:
      return cudaErrorInvalidValue;
  }
}

inline int64_t acc_size(int dtype) { return dtype == ECHOLORA_FLOAT64 ? sizeof(double) : sizeof(float); }

inline int64_t processors() {
  int device = 0, count = 1;  // one where there is no device to ask
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, void* stream,
           Parameters... arguments) {
  constexpr size_t WITHOUT_ASKING = 48 * 1024;
  if (shared > WITHOUT_ASKING) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Sums [outer, count, inner] over its middle dimension in a fixed order, into [outer, inner] of any E.
int sum_partials(const void* partials, int acc_dtype, void* out, int out_dtype, int64_t outer, int64_t count,
                 int64_t inner, void* stream);

}  // namespace echolora

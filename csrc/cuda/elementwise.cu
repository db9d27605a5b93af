// The small kernels around the products: sums of partial sums, and dropout by itself.

#include "common.cuh"

namespace echolora {
namespace {

constexpr int THREADS = 256;
constexpr int64_t MOST_BLOCKS_Y = 65535;
constexpr int AT_A_TIME = 8;  // partial sums

template <typename A, typename Out>
__global__ void __launch_bounds__(THREADS)
    sum_partials_kernel(const A* partials, Out* out, int64_t outer, int64_t count, int64_t inner) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= inner) return;
  for (int64_t o = blockIdx.y; o < outer; o += gridDim.y) {
    const A* first = partials + o * count * inner + i;
    A sum = 0;
    for (int64_t part = 0; part < count; part += AT_A_TIME) {  // one chain over many parts would lose digits
      A several = 0;
#pragma unroll
      for (int i = 0; i < AT_A_TIME; ++i)
        if (part + i < count) several += first[(part + i) * inner];
      sum += several;
    }
    out[o * inner + i] = static_cast<Out>(sum);
  }
}

template <typename E>
__global__ void __launch_bounds__(THREADS) drop_kernel(const echolora_drop_args p) {
  const Rows<E> x(p.x);
  const Dropout<E> dropout(p.dropout, x.width);
  E* out = static_cast<E*>(p.out);
  const bool vector = x.width % CHUNK == 0 && aligned(out);
  const int col = static_cast<int>((static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * CHUNK);
  if (col >= x.width) return;
  const int64_t rows = p.x.samples * p.x.length;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    Values<Acc<E>> wide = widen(x.load(x.offset(static_cast<int>(row)), col, true));
    dropout.apply(wide, static_cast<int>(row), col);
    store_chunk(out + row * x.width + col, wide, x.width - col, vector);
  }
}

}  // namespace

int sum_partials(const void* partials, int acc_dtype, void* out, int out_dtype, int64_t outer, int64_t count,
                 int64_t inner, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(inner, THREADS)),
                  static_cast<unsigned>(outer < MOST_BLOCKS_Y ? outer : MOST_BLOCKS_Y));
  const auto run = [&](auto acc, auto result) {
    using A = typename decltype(acc)::type;
    using Out = typename decltype(result)::type;
    return launch(sum_partials_kernel<A, Out>, grid, THREADS, 0, stream, static_cast<const A*>(partials),
                  static_cast<Out*>(out), outer, count, inner);
  };
  if (acc_dtype == ECHOLORA_FLOAT64) return run(Type<double>(), Type<double>());
  if (out_dtype == ECHOLORA_FLOAT16) return run(Type<float>(), Type<__half>());
  if (out_dtype == ECHOLORA_BFLOAT16) return run(Type<float>(), Type<__nv_bfloat16>());
  return run(Type<float>(), Type<float>());
}

}  // namespace echolora

int echolora_cuda_drop(const echolora_drop_args* args, void* stream) {
  using namespace echolora;
  const int64_t rows = args->x.samples * args->x.length;
  const dim3 grid(static_cast<unsigned>(ceil_div(args->x.width, THREADS * CHUNK)),
                  static_cast<unsigned>(rows < MOST_BLOCKS_Y ? rows : MOST_BLOCKS_Y));
  return with_type(args->x.dtype, [&](auto type) {
    return launch(drop_kernel<typename decltype(type)::type>, grid, THREADS, 0, stream, *args);
  });
}

const char* echolora_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

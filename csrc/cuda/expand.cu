// The products that contract over the rank, added to or measured with a wide tensor: S B^T, dS A and B A.
//
// F2  y  = gain (z + S B^T) + bias + mask Delta      linear_epilogue
// B3  dx = drop'(dS A + product)                     input_epilogue
// D0  squares of the rows of W + scaling B A         dora_norm
// A block takes 256 columns, whose factor stays in shared memory, and walks over rows. A lane owns eight neighbouring
// columns of the product, so that the wide tensors stream through registers 16 bytes at a time.

#include "product.cuh"

namespace echolora {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int COLS = THREADS;  // each thread fetches the factor of one column
constexpr int ROWS = 16;       // at a time

enum class Epilogue { LINEAR, INPUT, SQUARES };

struct ExpandParams {
  int64_t rows, width, rank, length;
  int rank_step;          // how much of the rank is in shared memory, a multiple of 16
  int64_t block_rows;     // a multiple of a tile's rows
  echolora_matrix left;   // [rows, rank]
  echolora_matrix right;  // [width, rank]
  const void* added;      // z, the product, or W
  const void* other;      // base, or what dx accumulates to
  const void *gain, *bias, *delta, *mask;
  echolora_dropout dropout;
  double scaling;
  void *z, *out;
};

// Blocks per processor: while one waits for memory, another multiplies. More would not fit in registers.
template <typename C, bool VECTOR>
constexpr int BLOCKS = VECTOR && sizeof(C) < 8 ? (sizeof(C) == 2 ? 3 : 2) : 1;

template <typename C>
size_t shared_bytes(int rank_step) {
  return ((COLS + ROWS) * (rank_step + PAD<C>)+COLS / 8 * 2 * PAD<C>)*sizeof(C);
}

// To an accumulator that may be wider than the element's own.
template <typename A, typename E>
__device__ __forceinline__ Values<A> widened(const Chunk<E>& c) {
  const Values<Acc<E>> wide = widen(c);
  Values<A> v;
#pragma unroll
  for (int q = 0; q < CHUNK; ++q) v.v[q] = static_cast<A>(wide.v[q]);
  return v;
}

// C is the type that the product is computed in, E that of the wide tensors.
// VECTOR: all of the wide tensors and per-column vectors can be read 16 bytes at a time.
template <Epilogue EPILOGUE, bool VECTOR, typename E, typename C>
__global__ void __launch_bounds__(THREADS, BLOCKS<C, VECTOR>) expand_kernel(const ExpandParams p) {
  using A = Acc<C>;
  constexpr bool SQUARES = EPILOGUE == Epilogue::SQUARES;
  extern __shared__ uint4 shared[];
  __shared__ A squares[SQUARES ? WARPS * ROWS : 1];
  const int stride = p.rank_step + PAD<C>;
  C* right_tile = reinterpret_cast<C*>(shared);
  C* left_tile = right_tile + packed_offset<C>(COLS, stride);

  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int rank = static_cast<int>(p.rank), width = static_cast<int>(p.width), rows = static_cast<int>(p.rows);
  const int col0 = blockIdx.x * COLS, col = col0 + WARP * warp + CHUNK * (lane % 4);
  const Matrix<C> left(p.left), right(p.right);
  const A *gain = static_cast<const A*>(p.gain), *bias = static_cast<const A*>(p.bias);
  const E *added = static_cast<const E*>(p.added), *other = static_cast<const E*>(p.other);
  E *z = static_cast<E*>(p.z), *out = static_cast<E*>(p.out);
  const A* delta = static_cast<const A*>(p.delta);
  const int here = VECTOR ? (col < width ? CHUNK : 0) : width - col;  // columns of the lane that exist

  const int rank_chunks = p.rank_step / CHUNK;
  const int left_row = threadIdx.x / rank_chunks, left_rank = threadIdx.x % rank_chunks * CHUNK;
  const int begin = static_cast<int>(blockIdx.y * p.block_rows);
  const int end = static_cast<int>(begin + p.block_rows < rows ? begin + p.block_rows : rows);
  for (int row0 = begin; row0 < end; row0 += ROWS) {
    // on their way while the factors are fetched and multiplied; registers for one tensor, and seldom are there two
    const E* early = added != nullptr ? added : other;
    Chunk<E> v_early[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + 8 * half + lane / 4;
      const int64_t at = static_cast<int64_t>(row) * width + col;
      if (early != nullptr) v_early[half] = load_chunk(early + at, 1, row < rows ? here : 0, VECTOR);
    }

    A acc[1][4][4] = {};
    for (int rank0 = 0; rank0 < rank; rank0 += p.rank_step) {
      __syncthreads();  // every warp is done with the previous tiles
      if (left_row < ROWS) {
        const int row = row0 + left_row, r = rank0 + left_rank;
        const Chunk<C> c = left.load(row, r, row < rows ? rank - r : 0);
        write_chunk(left_tile + left_row * stride + left_rank, c);
      }
      if (row0 == begin || rank > p.rank_step) {
        const int right_row = col0 + threadIdx.x;
#pragma unroll 1
        for (int r = 0; r < p.rank_step; r += CHUNK) {
          const Chunk<C> c = right.load(right_row, rank0 + r, right_row < width ? rank - rank0 - r : 0);
          write_chunk(right_tile + packed_offset<C>(threadIdx.x, stride) + r, c);
        }
      }
      __syncthreads();
      multiply_tiles<C, false, true>(acc, left_tile, stride, right_tile + packed_offset<C>(WARP * warp, stride), stride,
                                     p.rank_step);
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int local = 8 * half + lane / 4, row = row0 + local;
      Values<A> v, before = {};
#pragma unroll
      for (int q = 0; q < CHUNK; ++q) v.v[q] = acc[0][q / 2][2 * half + q % 2];
      if (added != nullptr) before = widened<A>(v_early[half]);
      if constexpr (SQUARES) {
        A sum = 0;
#pragma unroll
        for (int q = 0; q < CHUNK; ++q) {
          const A element = before.v[q] + static_cast<A>(p.scaling) * v.v[q];  // zero past the end
          sum += element * element;
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (lane % 4 == 0) squares[warp * ROWS + local] = sum;
        continue;
      }
      if (row >= rows) continue;
      const int64_t at = static_cast<int64_t>(row) * width + col;
#pragma unroll
      for (int q = 0; q < CHUNK; ++q) v.v[q] += before.v[q];
      Values<A> rest = {};
      if (other != nullptr)
        rest = widened<A>(added != nullptr ? load_chunk(other + at, 1, here, VECTOR) : v_early[half]);
      if (EPILOGUE == Epilogue::LINEAR) {
        if (z != nullptr) store_chunk(z + at, v, here, VECTOR);
        if (gain != nullptr) {
          const Values<A> g = widen(load_chunk(gain + col, 1, here, VECTOR));
#pragma unroll
          for (int q = 0; q < CHUNK; ++q) v.v[q] *= g.v[q];
        }
        if (other != nullptr)
#pragma unroll
          for (int q = 0; q < CHUNK; ++q) rest.v[q] -= before.v[q];
        if (bias != nullptr) {
          const Values<A> c = widen(load_chunk(bias + col, 1, here, VECTOR));
#pragma unroll
          for (int q = 0; q < CHUNK; ++q) rest.v[q] += c.v[q];
        }
        if (delta != nullptr) {
          const int sample = p.length == p.rows ? 0 : row / static_cast<int>(p.length);
          const A weight = static_cast<const A*>(p.mask)[row];
          const Values<A> d = widen(load_chunk(delta + static_cast<int64_t>(sample) * width + col, 1, here, VECTOR));
#pragma unroll
          for (int q = 0; q < CHUNK; ++q) rest.v[q] += weight * d.v[q];
        }
      } else if (p.dropout.seed != nullptr) {
        Dropout<C>(p.dropout, width).apply(v, row, col);  // read here: the seed would take registers until now
      }
#pragma unroll
      for (int q = 0; q < CHUNK; ++q) v.v[q] += rest.v[q];
      store_chunk(out + at, v, here, VECTOR);
    }

    if constexpr (SQUARES) {
      __syncthreads();
      if (threadIdx.x < ROWS && row0 + threadIdx.x < rows) {
        A sum = 0;
        for (int w = 0; w < WARPS; ++w) sum += squares[w * ROWS + threadIdx.x];
        static_cast<A*>(p.out)[blockIdx.x * p.rows + row0 + threadIdx.x] = sum;
      }
    }
  }
}

// From the partial sums of squares [tiles, rows].
template <typename A>
__global__ void __launch_bounds__(THREADS)
    norm_kernel(const A* partials, int64_t tiles, int64_t rows, const A* magnitude, A tiny, A* norm, A* gain) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (row >= rows) return;
  A sum = 0;
  for (int64_t i = 0; i < tiles; ++i) sum += partials[i * rows + row];
  const A length = sqrt(sum);
  norm[row] = length;
  // a row whose norm is zero has nothing to scale; its gain stays finite
  if (magnitude != nullptr) gain[row] = magnitude[row] / (length > tiny ? length : tiny);
}

template <Epilogue EPILOGUE, typename E, typename C>
int launch_expand(ExpandParams p, void* stream) {
  // wider elements leave room for less of the rank
  const int64_t most = 128 / static_cast<int64_t>(sizeof(C)), rank = ceil_div(p.rank, 16) * 16;
  p.rank_step = static_cast<int>(rank < most ? rank : most);
  // a few tiles of rows share what a block fetches of the right factor, if all processors still have work
  constexpr int64_t MOST_TILES = 8;
  const int64_t col_tiles = ceil_div(p.width, COLS), row_tiles = ceil_div(p.rows, ROWS);
  const int64_t tiles = col_tiles * row_tiles / (8 * processors());
  p.block_rows = (tiles < 1 ? 1 : tiles < MOST_TILES ? tiles : MOST_TILES) * ROWS;
  constexpr int64_t MOST_BLOCKS = 65535;
  if (ceil_div(p.rows, p.block_rows) > MOST_BLOCKS) p.block_rows = ceil_div(ceil_div(p.rows, MOST_BLOCKS), ROWS) * ROWS;
  const dim3 grid(static_cast<unsigned>(col_tiles), static_cast<unsigned>(ceil_div(p.rows, p.block_rows)));
  bool vector = p.width % CHUNK == 0;
  for (const void* tensor : {p.added, p.other, p.gain, p.bias, p.delta, static_cast<const void*>(p.z)})
    vector = vector && aligned(tensor);
  if (EPILOGUE != Epilogue::SQUARES) vector = vector && aligned(p.out);
  return launch(vector ? expand_kernel<EPILOGUE, true, E, C> : expand_kernel<EPILOGUE, false, E, C>, grid, THREADS,
                shared_bytes<C>(p.rank_step), stream, p);
}

template <typename E, typename C>
int launch_norm(const echolora_dora_norm_args& args, const ExpandParams& p, void* stream) {
  using A = Acc<C>;
  const int error = launch_expand<Epilogue::SQUARES, E, C>(p, stream);
  if (error != 0) return error;
  const A tiny = sizeof(A) == 8 ? static_cast<A>(2.2250738585072014e-308) : static_cast<A>(1.1754943508222875e-38);
  return launch(norm_kernel<A>, dim3(static_cast<unsigned>(ceil_div(p.rows, THREADS))), THREADS, 0, stream,
                static_cast<const A*>(args.workspace), ceil_div(p.width, COLS), p.rows,
                static_cast<const A*>(args.magnitude), tiny, static_cast<A*>(args.norm), static_cast<A*>(args.gain));
}

}  // namespace
}  // namespace echolora

int echolora_cuda_linear_epilogue(const echolora_linear_epilogue_args* args, void* stream) {
  using namespace echolora;
  ExpandParams p = {};
  p.rows = args->samples * args->length;
  p.width = args->width;
  p.rank = args->rank;
  p.length = args->length;
  p.left = args->s;
  p.right = args->b;
  p.added = args->z;
  p.other = args->base;
  p.gain = args->gain;
  p.bias = args->bias;
  p.delta = args->delta;
  p.mask = args->mask;
  p.z = args->store_z ? args->z : nullptr;
  p.out = args->y;
  return with_type(args->dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    return launch_expand<Epilogue::LINEAR, E, E>(p, stream);
  });
}

int echolora_cuda_input_epilogue(const echolora_input_epilogue_args* args, void* stream) {
  using namespace echolora;
  ExpandParams p = {};
  p.rows = p.length = args->rows;
  p.width = args->width;
  p.rank = args->rank;
  p.left = args->ds;
  p.right = {args->a.data, args->a.dtype, args->a.stride_col, args->a.stride_row};
  p.added = args->product;
  p.other = args->accumulate ? args->dx : nullptr;
  p.dropout = args->dropout;
  p.out = args->dx;
  return with_type(args->dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    return launch_expand<Epilogue::INPUT, E, E>(p, stream);
  });
}

int64_t echolora_cuda_dora_norm_workspace(const echolora_dora_norm_args* args) {
  return echolora::ceil_div(args->width, echolora::COLS) * args->rows * static_cast<int64_t>(sizeof(double));
}

int echolora_cuda_dora_norm(const echolora_dora_norm_args* args, void* stream) {
  using namespace echolora;
  ExpandParams p = {};
  p.rows = p.length = args->rows;
  p.width = args->width;
  p.rank = args->rank;
  p.left = args->b;
  p.right = {args->a.data, args->a.dtype, args->a.stride_col, args->a.stride_row};
  p.added = args->weight;
  p.scaling = args->scaling;
  p.out = args->workspace;
  return with_type(args->dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    // adapters wider than W0 are not rounded to its type: the norm is theirs, too
    if (args->a.dtype == TYPE_ID<E>) return launch_norm<E, E>(*args, p, stream);
    if (args->a.dtype == TYPE_ID<Acc<E>>) return launch_norm<E, Acc<E>>(*args, p, stream);
    return static_cast<int>(cudaErrorInvalidValue);
  });
}

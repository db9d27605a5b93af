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

// In 16 rows the lane owns two; fewer of them at a time where their elements take more registers.
template <typename C>
constexpr int MT = sizeof(C) == 8 ? 1 : 2;

template <typename C>
size_t shared_bytes(int rank_step) {
  return ((COLS + 16 * MT<C>) * (rank_step + PAD<C>) + COLS / 8 * 2 * PAD<C>) * sizeof(C);
}

// C is the type that the product is computed in, E that of the wide tensors.
template <Epilogue EPILOGUE, typename E, typename C>
__global__ void __launch_bounds__(THREADS, 2) expand_kernel(const ExpandParams p) {
  using A = Acc<C>;
  constexpr int ROWS = 16 * MT<C>;
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
  const Dense<const E> added(static_cast<const E*>(p.added), width), other(static_cast<const E*>(p.other), width);
  const Dense<E> z(static_cast<E*>(p.z), width), out(static_cast<E*>(p.out), width);
  const Dropout<C> dropout(p.dropout, width);
  Chunk<A> gain, bias;
  if constexpr (EPILOGUE == Epilogue::LINEAR) {
    if (p.gain != nullptr) gain = Dense<const A>(static_cast<const A*>(p.gain), width).load(0, col);
    if (p.bias != nullptr) bias = Dense<const A>(static_cast<const A*>(p.bias), width).load(0, col);
  }

  const int rank_chunks = p.rank_step / CHUNK;
  const int left_row = threadIdx.x / rank_chunks, left_rank = threadIdx.x % rank_chunks * CHUNK;
  const int begin = static_cast<int>(blockIdx.y * p.block_rows);
  const int end = static_cast<int>(begin + p.block_rows < rows ? begin + p.block_rows : rows);
  for (int row0 = begin; row0 < end; row0 += ROWS) {
    // on their way while the factors are fetched and multiplied
    Chunk<E> v_added[MT<C>][2], v_other[MT<C>][2];
#pragma unroll
    for (int i = 0; i < MT<C>; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + 16 * i + 8 * half + lane / 4;
        if (row >= rows) continue;
        if (p.added != nullptr) v_added[i][half] = added.load(row, col);
        if (!SQUARES && p.other != nullptr) v_other[i][half] = other.load(row, col);
      }

    A acc[MT<C>][4][4] = {};
    for (int rank0 = 0; rank0 < rank; rank0 += p.rank_step) {
      __syncthreads();  // every warp is done with the previous tiles
      if (left_row < ROWS) {
        const int row = row0 + left_row, r = rank0 + left_rank;
        const Chunk<C> c = left.load(row, r, row < rows ? rank - r : 0);
        copy_words(reinterpret_cast<Chunk<C>*>(left_tile + left_row * stride + left_rank), &c);
      }
      if (row0 == begin || rank > p.rank_step) {
        const int right_row = col0 + threadIdx.x;
        for (int r = 0; r < p.rank_step; r += CHUNK) {
          const Chunk<C> c = right.load(right_row, rank0 + r, right_row < width ? rank - rank0 - r : 0);
          copy_words(reinterpret_cast<Chunk<C>*>(right_tile + packed_offset<C>(threadIdx.x, stride) + r), &c);
        }
      }
      __syncthreads();
      multiply_tiles<C, false, true>(acc, left_tile, stride, right_tile + packed_offset<C>(WARP * warp, stride), stride,
                                     p.rank_step);
    }

#pragma unroll
    for (int i = 0; i < MT<C>; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int local = 16 * i + 8 * half + lane / 4, row = row0 + local;
        Chunk<A> v;
#pragma unroll
        for (int q = 0; q < CHUNK; ++q) v.v[q] = acc[i][q / 2][2 * half + q % 2];
        if constexpr (SQUARES) {
          A sum = 0;
#pragma unroll
          for (int q = 0; q < CHUNK; ++q) {
            // columns and rows past the end are zero in both terms
            const A w = row < rows ? static_cast<A>(v_added[i][half].v[q]) : A(0);
            const A element = w + static_cast<A>(p.scaling) * v.v[q];
            sum += element * element;
          }
          sum += __shfl_xor_sync(0xffffffffu, sum, 1);
          sum += __shfl_xor_sync(0xffffffffu, sum, 2);
          if (lane % 4 == 0) squares[warp * ROWS + local] = sum;
          continue;
        }
        if (row >= rows) continue;
        if (EPILOGUE == Epilogue::LINEAR) {
          Chunk<A> rest = {};  // what neither the gain nor z contains
#pragma unroll
          for (int q = 0; q < CHUNK; ++q) {
            const A before = p.added != nullptr ? static_cast<A>(v_added[i][half].v[q]) : A(0);
            v.v[q] += before;
            if (p.other != nullptr) rest.v[q] = static_cast<A>(v_other[i][half].v[q]) - before;
            if (p.bias != nullptr) rest.v[q] += bias.v[q];
          }
          if (p.delta != nullptr)
            add_echo(rest, Dense<const A>(static_cast<const A*>(p.delta), width), static_cast<const A*>(p.mask), row,
                     p.length == p.rows ? 0 : row / static_cast<int>(p.length), col);
          if (p.z != nullptr) z.store(row, col, convert<E>(v));
#pragma unroll
          for (int q = 0; q < CHUNK; ++q) v.v[q] = (p.gain != nullptr ? gain.v[q] * v.v[q] : v.v[q]) + rest.v[q];
        } else {
#pragma unroll
          for (int q = 0; q < CHUNK; ++q)
            if (p.added != nullptr) v.v[q] += static_cast<A>(v_added[i][half].v[q]);
          if (dropout.active) dropout.apply(v, row, col);
#pragma unroll
          for (int q = 0; q < CHUNK; ++q)
            if (p.other != nullptr) v.v[q] += static_cast<A>(v_other[i][half].v[q]);
        }
        out.store(row, col, convert<E>(v));
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
  constexpr int ROWS = 16 * MT<C>;
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
  return launch(expand_kernel<EPILOGUE, E, C>, grid, THREADS, shared_bytes<C>(p.rank_step), stream, p);
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

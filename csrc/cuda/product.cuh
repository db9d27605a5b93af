// One warp's matrix product of two tiles in shared memory, for every element type.
#pragma once

#include "common.cuh"
#include "ptx.cuh"

namespace echolora {

// Where row `row` of the B of a PACKED product begins: groups of eight rows lie 32 bytes further apart than their rows
// need, because the lanes read rows that are eight apart at the same time.
template <typename E>
__device__ __forceinline__ int packed_offset(int row, int stride) {
  return row * stride + row / 8 * 2 * PAD<E>;
}

// acc[i][j] += A B^T over `depth` (a multiple of 16), for 16 MT rows of A and 8 NT rows of B.
//
// BY_DEPTH: tiles are stored [depth][row], else [row][depth]; strides count elements. Lane 4 g + t owns acc[i][j][e] at
// row 16 i + g + 8 (e / 2) and at column 8 j + 2 t + e % 2, or with PACKED (NT is 4; B as `packed_offset` says) at
// column 8 t + 2 j + e % 2: then the lane's columns are eight neighbours, which it can load and store as a chunk. The
// lanes agree on that for 16-bit types on matrix units and for float and double on ordinary ones, so kernels need not
// care.
template <typename E, bool BY_DEPTH, bool PACKED, int MT, int NT>
__device__ __forceinline__ void multiply_tiles(Acc<E> (&acc)[MT][NT][4], const E* a, int a_stride, const E* b,
                                               int b_stride, int depth) {
  static_assert(!PACKED || (NT == 4 && !BY_DEPTH), "PACKED is for 32 columns stored by row");
  const int lane = threadIdx.x % WARP;
  if constexpr (sizeof(E) == 2) {
    const int low = lane % 8, middle = lane / 8 % 2, high = lane / 16;
#pragma unroll 1
    for (int k = 0; k < depth; k += 16) {
      uint32_t f_a[MT][4];
#pragma unroll
      for (int i = 0; i < MT; ++i)
        load_blocks<BY_DEPTH>(f_a[i], BY_DEPTH ? a + (k + 8 * high + low) * a_stride + 16 * i + 8 * middle
                                               : a + (16 * i + 8 * middle + low) * a_stride + k + 8 * high);
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        uint32_t f_b[2];
        const E* row =
            PACKED ? b + packed_offset<E>(low / 2 * 8 + 2 * j + low % 2, b_stride) : b + (8 * j + low) * b_stride;
        load_blocks<BY_DEPTH>(f_b, BY_DEPTH ? b + (k + 8 * middle + low) * b_stride + 8 * j : row + k + 8 * middle);
#pragma unroll
        for (int i = 0; i < MT; ++i) multiply_blocks<E>(acc[i][j], f_a[i], f_b);
      }
    }
  } else {
    const int g = lane / 4, t = lane % 4;
    // Along a row, four elements come in one load. Their products are summed before they join the sum, and where
    // registers have room those of a block are: one chain of FMAs over the whole depth loses more digits than the
    // vendor's GEMM does.
    constexpr int STEP = 4, BLOCK = 32;
    constexpr bool BY_BLOCK = !BY_DEPTH && !PACKED;
    struct alignas(16) Step {
      E v[4];
    };
#pragma unroll 1
    for (int begin = 0; begin < depth; begin += BY_BLOCK ? BLOCK : depth) {
      const int end = BY_BLOCK && begin + BLOCK < depth ? begin + BLOCK : depth;
      E block[MT][NT][4] = {};
      E(&sums)[MT][NT][4] = BY_BLOCK ? block : acc;
#pragma unroll 1
      for (int k = begin; k < end; k += STEP) {
        E v_a[MT][2][STEP];
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = 16 * i + 8 * half + g;
            if constexpr (BY_DEPTH) {
#pragma unroll
              for (int q = 0; q < STEP; ++q) v_a[i][half][q] = a[(k + q) * a_stride + row];
            } else {
              const Step s = *reinterpret_cast<const Step*>(a + row * a_stride + k);
#pragma unroll
              for (int q = 0; q < STEP; ++q) v_a[i][half][q] = s.v[q];
            }
          }
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
            E v_b[STEP];
            if constexpr (BY_DEPTH) {
#pragma unroll
              for (int q = 0; q < STEP; ++q) v_b[q] = b[(k + q) * b_stride + 8 * j + 2 * t + odd];
            } else {
              const E* row =
                  PACKED ? b + packed_offset<E>(8 * t + 2 * j + odd, b_stride) : b + (8 * j + 2 * t + odd) * b_stride;
              const Step s = *reinterpret_cast<const Step*>(row + k);
#pragma unroll
              for (int q = 0; q < STEP; ++q) v_b[q] = s.v[q];
            }
#pragma unroll
            for (int i = 0; i < MT; ++i)
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                E step = 0;
#pragma unroll
                for (int q = 0; q < STEP; ++q) step += v_a[i][half][q] * v_b[q];
                sums[i][j][2 * half + odd] += step;
              }
          }
      }
      if constexpr (BY_BLOCK)
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
          for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[i][j][e] += block[i][j][e];
    }
  }
}

}  // namespace echolora

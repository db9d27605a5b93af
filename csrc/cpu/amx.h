// The products that adapters need by Intel's matrix unit: bfloat16 elements and adapters, sums in float32.
#pragma once

#include "products.h"

namespace echolora {
namespace ECHOLORA_ISA {

// Tiles are 16 rows of 64 bytes: 16 x 32 bfloat16, or 16 x 16 sums. The right-hand operand of a product interleaves
// pairs of rows. Tile registers 0-3 hold sums, 4 and 5 left-hand operands, 6 and 7 right-hand ones.
struct Amx {
  using A = float;
  using Packed = bf16;
  using Element = bf16;

  static constexpr int64_t SIDE = 16, DEPTH = 32, TILE = SIDE * DEPTH;

  struct Session {
    Session() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      _tile_loadconfig(&config);
    }
    ~Session() { _tile_release(); }
  };

  static int64_t padded_rank(int64_t rank) { return round_up(rank, SIDE); }
  static int64_t packed_size(int64_t width, int64_t rank) { return round_up(width, BLOCK_COLS) * padded_rank(rank) / 2; }
  static int64_t wide_size(int64_t rank, int64_t width) { return round_up(width, BLOCK_COLS) * round_up(rank, DEPTH) / 2; }
  static int64_t wide_at(int64_t col, int64_t rank) { return col * round_up(rank, DEPTH); }
  // `gather_cols` leaves sums transposed, in tiles whose columns unpacking has permuted
  static int64_t sum_at(int64_t col, int64_t r, int64_t padded) {
    const int64_t lane = col % DEPTH / 8, word = col % 8;
    return col / DEPTH * DEPTH * padded + ((r / SIDE * 2 + word / 4) * SIDE + r % SIDE) * SIDE + lane * 4 + word % 4;
  }

  // As `read_block`, with zeros up to whole tiles.
  static void read(const Rows& x, const Reading<A>& reading, int64_t first, int64_t count, int64_t first_col,
                   int64_t cols, Packed* block, Ahead<bf16>* ahead) {
    const int64_t padded = round_up(cols, DEPTH);
    if (x.stride_w == 1 && !reading.dropout.below && !reading.delta) {
      for (int64_t i = 0; i < count; i++) {
        const bf16* from = row_start<bf16>(x, first + i) + first_col;
        const bf16* next = first_col + cols < x.width ? from + cols
                                                      : row_start<bf16>(x, at_most(first + i + count, x.total() - 1));
        for (int64_t col = 0; col < cols; col += DEPTH) __builtin_prefetch(next + col);
        if (cols == BLOCK_COLS) std::memcpy(block + i * BLOCK_COLS, from, sizeof(bf16) * BLOCK_COLS);
        else std::memcpy(block + i * BLOCK_COLS, from, sizeof(bf16) * cols);
      }
    } else {
      alignas(64) A wide[BLOCK_ROWS * BLOCK_COLS];
      read_block<bf16>(x, reading, first, count, first_col, cols, wide, ahead);
      for (int64_t i = 0; i < count; i++)
        for (int64_t col = 0; col < cols; col += LANES<A>)
          store(block + i * BLOCK_COLS + col, load(wide + i * BLOCK_COLS + col));
    }
    if (padded > cols)
      for (int64_t i = 0; i < count; i++) std::memset(block + i * BLOCK_COLS + cols, 0, sizeof(bf16) * (padded - cols));
    for (int64_t i = count; i < BLOCK_ROWS; i++) std::memset(block + i * BLOCK_COLS, 0, sizeof(bf16) * padded);
  }

  static void pack(const Thin& thin, int64_t first, int64_t count, int64_t rank, int64_t padded, const A* factor,
                   Packed* packed) {
    for (int64_t j = 0; j < count; j += DEPTH)
      for (int64_t r = 0; r < padded; r += SIDE)
        pack_tile(thin, first + j, at_most(DEPTH, count - j), r, at_most(SIDE, rank - r), factor,
                  packed + j * padded + r * DEPTH);
  }

  static void pack_rows(const Thin& thin, int64_t first, int64_t count, int64_t rank, int64_t padded, Packed* packed) {
    std::memset(packed, 0, sizeof(bf16) * BLOCK_ROWS * padded);
    if (thin.type == Type::bf16) {  // nothing to round
      const bf16* from = static_cast<const bf16*>(thin.data) + first * thin.stride_row;
      for (int64_t i = 0; i < count; i++)
        for (int64_t r = 0; r < rank; r++) packed[r * DEPTH + i] = from[i * thin.stride_row + r * thin.stride_col];
      return;
    }
    each_element<A>(thin, first, count, rank, [&](int64_t i, int64_t r, A value) { narrow(value, packed + r * DEPTH + i); });
  }

  static void pack_spread(const Thin& thin, int64_t first, int64_t count, int64_t rank, A factor, Packed* packed) {
    const int64_t depth = round_up(rank, DEPTH);
    std::memset(packed, 0, sizeof(bf16) * BLOCK_ROWS * depth);
    if (thin.type == Type::bf16 && thin.stride_col == 1 && factor == 1) {
      const bf16* from = static_cast<const bf16*>(thin.data) + first * thin.stride_row;
      for (int64_t i = 0; i < count; i++) std::memcpy(packed + i * depth, from + i * thin.stride_row, sizeof(bf16) * rank);
      return;
    }
    each_element<A>(thin, first, count, rank,
                    [&](int64_t i, int64_t r, A value) { narrow(factor * value, packed + i * depth + r); });
  }

  static void pack_wide(const Thin& thin, int64_t first, int64_t width, int64_t rank, Packed* wide) {
    const int64_t depth = round_up(rank, DEPTH);
    for (int64_t n = first; n < first + BLOCK_COLS; n += SIDE)
      for (int64_t r = 0; r < depth; r += DEPTH)
        pack_tile(transposed(thin), r, at_most(DEPTH, rank - r), n, at_most(SIDE, width - n), nullptr,
                  wide + n * depth + r * SIDE);
  }

  static void gather_rows(const Packed* block, int64_t, int64_t cols, const Packed* packed, int64_t padded, A* sums,
                          Ahead<bf16>*) {
    before_loading();
    const int64_t stride = padded * sizeof(A);
    for (int64_t r = 0; r < padded; r += SIDE) {
      A *upper = sums + r, *lower = sums + SIDE * padded + r;
      _tile_loadd(0, upper, stride);
      _tile_loadd(1, lower, stride);
      for (int64_t j = 0; j < cols; j += DEPTH) {
        _tile_loadd(6, packed + j * padded + r / SIDE * TILE, 64);
        _tile_loadd(4, block + j, sizeof(bf16) * BLOCK_COLS);
        _tile_loadd(5, block + SIDE * BLOCK_COLS + j, sizeof(bf16) * BLOCK_COLS);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
      }
      _tile_stored(0, upper, stride);
      _tile_stored(1, lower, stride);
    }
  }

  static void gather_cols(const Packed* block, int64_t, int64_t cols, const Packed* thin, int64_t padded, A* sums,
                          Ahead<bf16>*) {
    for (int64_t col = 0; col < cols; col += DEPTH) {
      alignas(64) bf16 pairs[2 * TILE];
      for (int64_t i = 0; i < SIDE; i++) {
        const __m512i even = _mm512_loadu_si512(block + 2 * i * BLOCK_COLS + col);
        const __m512i odd = _mm512_loadu_si512(block + (2 * i + 1) * BLOCK_COLS + col);
        _mm512_store_si512(pairs + i * DEPTH, _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(pairs + TILE + i * DEPTH, _mm512_unpackhi_epi16(even, odd));
      }
      before_loading();
      _tile_loadd(6, pairs, 64);
      _tile_loadd(7, pairs + TILE, 64);
      for (int64_t r = 0; r < padded; r += SIDE) {
        A* to = sums + col * padded + r * DEPTH;
        _tile_loadd(0, to, 64);
        _tile_loadd(1, to + SIDE * SIDE, 64);
        _tile_loadd(4, thin + r * DEPTH, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_stored(0, to, 64);
        _tile_stored(1, to + SIDE * SIDE, 64);
      }
    }
  }

  template <class Finish>
  static void spread(const Packed* thin, int64_t rank, const Packed* wide, int64_t, int64_t rows, int64_t cols,
                     const Finish& finish) {
    const int64_t depth = round_up(rank, DEPTH), stride = depth * sizeof(bf16);
    alignas(64) A sums[BLOCK_ROWS * BLOCK_COLS];  // finished when the tiles have long been stored
    constexpr int64_t LD = BLOCK_COLS, BELOW = SIDE * BLOCK_COLS;
    for (int64_t block = 0; block < cols; block += BLOCK_COLS) {
      const int64_t here = at_most(BLOCK_COLS, cols - block);
      before_loading();
      for (int64_t col = 0; col < here; col += DEPTH) {
        const bf16 *left = wide + (block + col) * depth, *right = left + SIDE * depth;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t r = 0; r < depth; r += DEPTH) {
          _tile_loadd(4, thin + r, stride);
          _tile_loadd(5, thin + SIDE * depth + r, stride);
          _tile_loadd(6, left + r * SIDE, 64);
          _tile_loadd(7, right + r * SIDE, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, sums + col, sizeof(A) * LD);
        _tile_stored(1, sums + col + SIDE, sizeof(A) * LD);
        _tile_stored(2, sums + BELOW + col, sizeof(A) * LD);
        _tile_stored(3, sums + BELOW + col + SIDE, sizeof(A) * LD);
      }
      for (int64_t i = 0; i < rows; i++) {
        for (int64_t col = 0; col < BLOCK_COLS; col += DEPTH) finish.ahead(i, block + BLOCK_COLS + col);
        for (int64_t col = 0; col < here; col += SIDE)
          finish(i, block + col, static_cast<int>(at_most(SIDE, here - col)), load(sums + i * LD + col));
      }
    }
  }

 private:
  // A right-hand operand: tile[d / 2][s][d % 2] = thin[d0 + d, s0 + s] * factor[d0 + d], zeros where there is no element.
  static void pack_tile(const Thin& thin, int64_t d0, int64_t depths, int64_t s0, int64_t sides, const A* factor,
                        bf16* tile) {
    const bf16* from = static_cast<const bf16*>(thin.data) + d0 * thin.stride_row + s0 * thin.stride_col;
    const bool raw = thin.type == Type::bf16 && !factor && depths % 2 == 0;
    if (depths < DEPTH || sides < SIDE) std::memset(tile, 0, sizeof(bf16) * TILE);
    if (raw && thin.stride_row == 1) {  // pairs lie side by side
      for (int64_t s = 0; s < sides; s++)
        for (int64_t d = 0; d < depths; d += 2) std::memcpy(tile + d * SIDE + 2 * s, from + s * thin.stride_col + d, 4);
    } else if (raw && thin.stride_col == 1 && sides == SIDE) {  // pairs are two rows
      for (int64_t d = 0; d < depths; d += 2) {
        const bf16 *even = from + d * thin.stride_row, *odd = even + thin.stride_row;
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
        _mm512_storeu_si512(tile + d * SIDE, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    } else {
      Thin part = thin;
      with_data(thin, [&](const auto* data) { part.data = data + s0 * thin.stride_col; });
      each_element<A>(part, d0, depths, sides, [&](int64_t d, int64_t s, A value) {
        narrow(factor ? value * factor[d0 + d] : value, tile + d / 2 * DEPTH + 2 * s + d % 2);
      });
    }
  }

  // the compiler does not know that tile loads read memory
  static void before_loading() { asm volatile("" ::: "memory"); }
};

}  // namespace ECHOLORA_ISA
}  // namespace echolora

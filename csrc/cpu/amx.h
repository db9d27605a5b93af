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
                   int64_t cols, Packed* block, Ahead* ahead) {
    const int64_t padded = round_up(cols, DEPTH);
    if (x.stride_w == 1 && !reading.dropout.below && !reading.delta) {
      for (int64_t i = 0; i < count; i++) {
        const bf16* from = row_start<bf16>(x, first + i) + first_col;
        const bf16* next = first_col + cols < x.width ? from + cols
                                                      : row_start<bf16>(x, at_most(first + i + count, x.total() - 1));
        for (int64_t col = 0; col < cols; col += DEPTH) __builtin_prefetch(next + col);
        std::memcpy(block + i * BLOCK_COLS, from, sizeof(bf16) * cols);
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
    std::memset(packed, 0, sizeof(bf16) * round_up(count, DEPTH) * padded);
    each_element<A>(thin, first, count, rank, [&](int64_t j, int64_t r, A value) {
      bf16* to = packed + j / DEPTH * DEPTH * padded + r / SIDE * TILE + j % DEPTH / 2 * DEPTH + r % SIDE * 2 + j % 2;
      narrow(factor ? value * factor[first + j] : value, to);
    });
  }

  static void pack_rows(const Thin& thin, int64_t first, int64_t count, int64_t rank, int64_t padded, Packed* packed) {
    std::memset(packed, 0, sizeof(bf16) * BLOCK_ROWS * padded);
    each_element<A>(thin, first, count, rank, [&](int64_t i, int64_t r, A value) { narrow(value, packed + r * DEPTH + i); });
  }

  static void pack_spread(const Thin& thin, int64_t first, int64_t count, int64_t rank, A factor, Packed* packed) {
    const int64_t depth = round_up(rank, DEPTH);
    std::memset(packed, 0, sizeof(bf16) * BLOCK_ROWS * depth);
    each_element<A>(thin, first, count, rank,
                    [&](int64_t i, int64_t r, A value) { narrow(factor * value, packed + i * depth + r); });
  }

  static void pack_wide(const Thin& thin, int64_t first, int64_t width, int64_t rank, Packed* wide) {
    const int64_t depth = round_up(rank, DEPTH);
    std::memset(wide + first * depth, 0, sizeof(bf16) * BLOCK_COLS * depth);
    each_element<A>(thin, first, at_most(BLOCK_COLS, width - first), rank, [&](int64_t at, int64_t r, A value) {
      const int64_t n = first + at;
      narrow(value, wide + n / SIDE * SIDE * depth + r / DEPTH * TILE + r % DEPTH / 2 * DEPTH + n % SIDE * 2 + r % 2);
    });
  }

  static void gather_rows(const Packed* block, int64_t, int64_t cols, const Packed* packed, int64_t padded, A* sums,
                          Ahead*) {
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
                          Ahead*) {
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
    alignas(64) A sums[BLOCK_ROWS * DEPTH];  // 32 columns at a time
    before_loading();
    for (int64_t col = 0; col < cols; col += DEPTH) {
      const bf16 *left = wide + col * depth, *right = left + SIDE * depth;
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
      _tile_stored(0, sums, sizeof(A) * DEPTH);
      _tile_stored(1, sums + SIDE, sizeof(A) * DEPTH);
      _tile_stored(2, sums + SIDE * DEPTH, sizeof(A) * DEPTH);
      _tile_stored(3, sums + SIDE * DEPTH + SIDE, sizeof(A) * DEPTH);
      for (int64_t i = 0; i < rows; i++)
        for (int64_t at = 0; at < at_most(DEPTH, cols - col); at += SIDE)
          finish(i, col + at, static_cast<int>(at_most(SIDE, cols - col - at)), load(sums + i * DEPTH + at));
    }
  }

 private:
  // the compiler does not know that tile loads read memory
  static void before_loading() { asm volatile("" ::: "memory"); }
};

}  // namespace ECHOLORA_ISA
}  // namespace echolora

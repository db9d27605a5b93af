// Philox4x32 with seven rounds, and the dropout mask that comes from it: a function of (seed, row, column) alone.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ECHOLORA_BOTH __host__ __device__ __forceinline__
#else
#define ECHOLORA_BOTH inline
#endif

namespace echolora {

// passes BigCrush from 7 rounds on; 10 would cost more than the matrix product of a thin adapter
constexpr int PHILOX_ROUNDS = 7;
constexpr int QUAD = 4;  // neighbouring columns that one call serves

struct Philox {
  uint32_t v[QUAD];
};

ECHOLORA_BOTH Philox philox(uint64_t seed, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t key_low = static_cast<uint32_t>(seed), key_high = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key_low;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key_high;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Bit i says whether dropout keeps x[row, column + i]; column is a multiple of 4, quads is ceil(width / 4).
template <int COLUMNS>
ECHOLORA_BOTH uint32_t keep_bits(uint64_t seed, uint32_t drop_below, int64_t row, int column, int quads) {
  uint32_t bits = 0;
  for (int q = 0; q < COLUMNS / QUAD; ++q) {
    const Philox random = philox(seed, static_cast<uint64_t>(row * quads + column / QUAD + q));
    for (int i = 0; i < QUAD; ++i) bits |= ((random.v[i] >> 8) >= drop_below ? 1u : 0u) << (QUAD * q + i);
  }
  return bits;
}

}  // namespace echolora

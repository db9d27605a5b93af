// All echo networks of a step: each weight is read once for the forward pass and once for the backward pass.
#pragma once

#include "block.h"
#include "functions.h"

namespace echolora {
namespace ECHOLORA_ISA {

constexpr int64_t NETWORK_ROWS = 256;   // rows of the up-projections that a task has: many times its own sums
constexpr int64_t NETWORK_SAMPLES = 8;  // samples that a row of weights is multiplied with while it is in the cache
// columns at a time: a vector's worth of rows fits the L1 cache, and sums of few products are as exact as torch's
template <class A>
constexpr int64_t NETWORK_COLS = 16 * LANES<A>;
template <class A>
constexpr int TOGETHER = LANES<A> < 4 ? LANES<A> : 4;  // sums that are independent of each other

// Rows of the up-projections that belong to one module.
struct Part {
  int64_t module, width;
  int64_t start;  // the module's first row
  int64_t col, rows;
};

inline int64_t parts_of(int64_t width) { return (width + NETWORK_ROWS - 1) / NETWORK_ROWS; }

inline int64_t parts_before(const Networks& p, int64_t module) {
  int64_t count = 0;
  for (int64_t i = 0; i < module; i++) count += parts_of(p.widths[i]);
  return count;
}

inline Part part_at(const Networks& p, int64_t index) {
  int64_t module = 0, start = 0;
  for (; index >= parts_of(p.widths[module]); start += p.widths[module++]) index -= parts_of(p.widths[module]);
  const int64_t col = index * NETWORK_ROWS, width = p.widths[module];
  return {module, width, start, col, at_most(NETWORK_ROWS, width - col)};
}

template <class A>
struct LaneNumbers {
  using type = UintVec;
};
template <>
struct LaneNumbers<double> {
  using type = LongVec;
};

// Lane i: the sum over the lanes of vector i, of LANES vectors.
template <int COUNT, class A>
inline Vec<A> sum_each(Vec<A>* vectors) {
  if constexpr (COUNT > 1) {
    typename LaneNumbers<A>::type even{}, odd{};
    for (int i = 0; i < LANES<A>; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
#pragma GCC unroll 16
    for (int i = 0; i < COUNT / 2; i++) {
      const Vec<A> a = vectors[2 * i], b = vectors[2 * i + 1];
      vectors[i] = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
    }
    return sum_each<COUNT / 2, A>(vectors);
  }
  return vectors[0];
}

// sums[i], lane r: x[i] . weights[r], for `samples` rows of x and `rows` rows of weights; further lanes repeat the last.
template <class E, class X>
inline void dots(const X* x, int64_t ld_x, int64_t samples, const E* weights, int64_t rows, int64_t cols, Vec<Acc<E>>* sums) {
  using A = Acc<E>;
  constexpr int L = LANES<A>;
  const E* row[L];
  for (int r = 0; r < L; r++) row[r] = weights + at_most(r, rows - 1) * cols;
  for (int64_t i = 0; i < samples; i++) sums[i] = Vec<A>{};
  for (int64_t col = 0; col < cols; col += NETWORK_COLS<A>) {
    const int64_t last = at_most(col + NETWORK_COLS<A>, cols);
    for (int64_t i = 0; i < samples; i++) {
      Vec<A> found[L] = {};
      int64_t j = col;
      for (; j + L <= last; j += L) {
        const Vec<A> b_x = load(x + i * ld_x + j);
#pragma GCC unroll 16
        for (int r = 0; r < L; r++) found[r] += b_x * load(row[r] + j);
      }
      if (j < last) {
        const int lanes = static_cast<int>(last - j);
        const Vec<A> b_x = load_part(x + i * ld_x + j, lanes);
#pragma GCC unroll 16
        for (int r = 0; r < L; r++) found[r] += b_x * load_part(row[r] + j, lanes);
      }
      sums[i] += sum_each<L, A>(found);
    }
  }
}

// visit(sample, projection, gate) for rows [row, row + rows) of a module and every sample; a lane a row.
template <class E, class Visit>
inline void each_echo(const Networks& p, const void* h, int64_t module, int64_t row, int64_t rows, const Visit& visit) {
  using A = Acc<E>;
  const A* hidden = static_cast<const A*>(h) + 2 * module * p.m;
  const Vec<A> bias = load_part(static_cast<const E*>(p.gate_bias) + row, static_cast<int>(rows));
  for (int64_t first = 0; first < p.samples; first += NETWORK_SAMPLES) {
    const int64_t here = at_most(NETWORK_SAMPLES, p.samples - first);
    Vec<A> projection[NETWORK_SAMPLES], gate[NETWORK_SAMPLES];
    const A* from = hidden + first * p.hidden();
    dots(from, p.hidden(), here, static_cast<const E*>(p.proj_up) + row * p.m, rows, p.m, projection);
    dots(from + p.m, p.hidden(), here, static_cast<const E*>(p.gate_up) + row * p.m, rows, p.m, gate);
    for (int64_t i = 0; i < here; i++) visit(first + i, projection[i], logistic<A>(gate[i] + bias));
  }
}

template <class E>
void networks_forward(const NetworksForward& p, Parallel parallel) {
  using A = Acc<E>;
  constexpr int64_t L = LANES<A>;
  const Networks& nets = p.networks;
  const int64_t hidden = nets.hidden();
  run(parallel, (hidden + L - 1) / L, [&](int64_t task) {
    const int64_t row = task * L, rows = at_most(L, hidden - row);
    for (int64_t first = 0; first < nets.samples; first += NETWORK_SAMPLES) {
      const int64_t here = at_most(NETWORK_SAMPLES, nets.samples - first);
      Vec<A> sums[NETWORK_SAMPLES];
      dots(static_cast<const E*>(p.u) + first * p.d, p.d, here, static_cast<const E*>(p.down) + row * p.d, rows, p.d, sums);
      for (int64_t i = 0; i < here; i++)
        store_part(static_cast<A*>(p.h) + (first + i) * hidden + row, tangent<A>(sums[i]), static_cast<int>(rows));
    }
  });
  run(parallel, parts_before(nets, nets.count), [&](int64_t task) {
    const Part part = part_at(nets, task);
    const A scale = widen(static_cast<const E*>(nets.scale)[part.module]);
    E* delta = static_cast<E*>(p.delta) + nets.samples * part.start + part.col;
    for (int64_t row = 0; row < part.rows; row += L) {
      const int64_t rows = at_most(L, part.rows - row);
      each_echo<E>(nets, p.h, part.module, part.start + part.col + row, rows,
                   [&](int64_t sample, Vec<A> projection, Vec<A> gate) {
                     store_part(delta + sample * part.width + row, scale * gate * projection, static_cast<int>(rows));
                   });
    }
  });
}

// What a task of the backward pass adds up, and the factors of the rows it is at.
template <class A>
struct NetworkSums {
  int64_t samples, padded, size;
  A* data;

  NetworkSums(const Networks& p, void* work, int64_t task)
      : samples(round_up(p.samples, TOGETHER<A>)), padded(round_up(p.m, LANES<A>)),
        size(2 * samples * (padded + LANES<A>) + 1), data(static_cast<A*>(work) + task * size) {}

  A* dh(int half) const { return data + half * samples * padded; }
  A* factors(int half) const { return dh(2) + half * samples * LANES<A>; }
  A* dscale() const { return factors(2); }
};

template <class E>
int64_t networks_backward_work(const NetworksBackward& p) {
  return parts_before(p.networks, p.networks.count) * NetworkSums<Acc<E>>(p.networks, nullptr, 0).size;
}

// out[r][:] = sum_i factors[i][r] h[i][:]
template <class E>
inline void weight_gradient(const Networks& p, const Acc<E>* factors, const Acc<E>* h, int64_t rows, E* out) {
  using A = Acc<E>;
  for (int64_t col = 0; col < p.m; col += LANES<A>) {
    const int lanes = static_cast<int>(at_most(LANES<A>, p.m - col));
    for (int64_t r = 0; r < rows; r += TOGETHER<A>) {
      Vec<A> sums[TOGETHER<A>] = {};
      for (int64_t i = 0; i < p.samples; i++) {
        const Vec<A> b_h = load_part(h + i * p.hidden() + col, lanes);
        for (int t = 0; t < TOGETHER<A>; t++) sums[t] += splat(factors[i * LANES<A> + r + t]) * b_h;
      }
      for (int64_t t = 0; t < at_most(TOGETHER<A>, rows - r); t++) store_part(out + (r + t) * p.m + col, sums[t], lanes);
    }
  }
}

// dh[i][:] += sum_r factors[i][r] weights[r][:]
template <class E>
inline void add_hidden_gradient(const Networks& p, const NetworkSums<Acc<E>>& sums, int half, const E* weights, int64_t rows) {
  using A = Acc<E>;
  for (int64_t col = 0; col < p.m; col += LANES<A>) {
    const int lanes = static_cast<int>(at_most(LANES<A>, p.m - col));
    for (int64_t i = 0; i < sums.samples; i += TOGETHER<A>) {
      const A* factors = sums.factors(half) + i * LANES<A>;
      A* dh = sums.dh(half) + i * sums.padded + col;
      Vec<A> found[TOGETHER<A>];
      for (int t = 0; t < TOGETHER<A>; t++) found[t] = load(dh + t * sums.padded);
      for (int64_t r = 0; r < rows; r++) {
        const Vec<A> b_w = load_part(weights + r * p.m + col, lanes);
        for (int t = 0; t < TOGETHER<A>; t++) found[t] += splat(factors[t * LANES<A> + r]) * b_w;
      }
      for (int t = 0; t < TOGETHER<A>; t++) store(dh + t * sums.padded, found[t]);
    }
  }
}

// One part's gradients of its rows, and its share of what is summed over a module's rows.
template <class E>
inline void network_part(const NetworksBackward& p, const Part& part, const NetworkSums<Acc<E>>& sums) {
  using A = Acc<E>;
  constexpr int64_t L = LANES<A>;
  const Networks& nets = p.networks;
  const A* hidden = static_cast<const A*>(p.h) + 2 * part.module * nets.m;
  const A scale = widen(static_cast<const E*>(nets.scale)[part.module]);
  const E* ddelta = static_cast<const E*>(p.ddelta) + nets.samples * part.start + part.col;
  std::memset(sums.data, 0, sizeof(A) * sums.size);
  Vec<A> dscale[4] = {};  // four sums: their rounding errors grow as slowly as those of torch's own sums
  for (int64_t row = 0; row < part.rows; row += L) {
    const int64_t rows = at_most(L, part.rows - row), at = part.start + part.col + row;
    const int lanes = static_cast<int>(rows);
    Vec<A> dbias{};
    each_echo<E>(nets, p.h, part.module, at, rows, [&](int64_t sample, Vec<A> projection, Vec<A> gate) {
      const Vec<A> gated = gate * load_part(ddelta + sample * part.width + row, lanes);
      const Vec<A> dgate = scale * (gated * projection) * (1 - gate);
      dscale[sample % 4] += gated * projection;
      dbias += dgate;
      store(sums.factors(0) + sample * L, scale * gated);
      store(sums.factors(1) + sample * L, dgate);
    });
    store_part(static_cast<E*>(p.dgate_bias) + at, dbias, lanes);
    const void* weights[2] = {nets.proj_up, nets.gate_up};
    void* gradients[2] = {p.dproj_up, p.dgate_up};
    for (int half = 0; half < 2; half++) {
      weight_gradient<E>(nets, sums.factors(half), hidden + half * nets.m, rows, static_cast<E*>(gradients[half]) + at * nets.m);
      add_hidden_gradient<E>(nets, sums, half, static_cast<const E*>(weights[half]) + at * nets.m, rows);
    }
  }
  *sums.dscale() = sum_lanes<A>((dscale[0] + dscale[1]) + (dscale[2] + dscale[3]));
}

// The shares of a module's parts added up: one half of its da, and its dscale.
template <class E>
inline void finish_network(const NetworksBackward& p, int64_t module, int half) {
  using A = Acc<E>;
  const Networks& nets = p.networks;
  const int64_t first = parts_before(nets, module), last = first + parts_of(nets.widths[module]);
  for (int64_t i = 0; i < nets.samples; i++) {
    const int64_t at = i * nets.hidden() + (2 * module + half) * nets.m;
    for (int64_t col = 0; col < nets.m; col += LANES<A>) {
      const int lanes = static_cast<int>(at_most(LANES<A>, nets.m - col));
      Vec<A> dh{};
      for (int64_t task = first; task < last; task++) {
        const NetworkSums<A> sums(nets, p.work, task);
        dh += load(sums.dh(half) + i * sums.padded + col);
      }
      const Vec<A> h = load_part(static_cast<const A*>(p.h) + at + col, lanes);
      store_part(static_cast<E*>(p.da) + at + col, dh * (1 - h * h), lanes);
    }
  }
  if (half) return;
  A dscale = 0;
  for (int64_t task = first; task < last; task++) dscale += *NetworkSums<A>(nets, p.work, task).dscale();
  narrow(dscale, static_cast<E*>(p.dscale) + module);
}

template <class E>
void networks_backward(const NetworksBackward& p, Parallel parallel) {
  const Networks& nets = p.networks;
  run(parallel, parts_before(nets, nets.count), [&](int64_t task) {
    network_part<E>(p, part_at(nets, task), NetworkSums<Acc<E>>(nets, p.work, task));
  });
  run(parallel, 2 * nets.count, [&](int64_t task) { finish_network<E>(p, task / 2, static_cast<int>(task % 2)); });
}

}  // namespace ECHOLORA_ISA
}  // namespace echolora

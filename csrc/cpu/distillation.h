// Cross-entropies of two branches and the divergence between them, a row of the vocabulary at a time.
//
// With a, b the logits of OFF and ON, q = softmax(a / tau) and p = softmax(b / tau):
//   CE = log z + max - logit of the target,  z = sum exp(logit - max)
//   KL = sum p (log p - log q) + (q - p)     the last two sum to 0, and take away what rounding does to the sums z
//   da = c_off (softmax(a) - onehot) + c_kl (q - p) / tau
//   db = c_on (softmax(b) - onehot) + c_kl p (log p - log q - KL) / tau
#pragma once

#include "block.h"
#include "functions.h"

namespace echolora {
namespace ECHOLORA_ISA {

constexpr int64_t BLOCK_VECTORS = 8;  // are added up plainly, and these sums without loss
constexpr double INFINITE = __builtin_inf();

// What the temperature makes of exp(x): itself; its square root; a power that wants an exp of its own.
enum class Tempered { same, root, other };

// Columns col .. col + count of a row; the lanes behind them are -infinity, which adds nothing to any sum.
template <class E>
inline Vec<Acc<E>> logits_at(const E* row, int64_t stride, int64_t col, int count) {
  if (stride == 1 && count == LANES<Acc<E>>) return load(row + col);
  Vec<Acc<E>> vector = splat(static_cast<Acc<E>>(-INFINITE));
  for (int i = 0; i < count; i++) vector[i] = widen(row[(col + i) * stride]);
  return vector;
}

// A sum that carries along what its additions round away.
template <class A>
struct Sum {
  Vec<A> high{}, low{};

  void add(Vec<A> x) {
    const Vec<A> zero{}, y = x - low, t = high + y, rounded = (t - high) - y;
    low = rounded == rounded ? rounded : zero;  // of an infinite sum nothing is lost
    high = t;
  }
  double total() const {
    double sum = 0;
    for (int i = 0; i < LANES<A>; i++) sum += static_cast<double>(high[i]) - static_cast<double>(low[i]);
    return sum;
  }
};

// visit(col, count) for every vector of a row, and after_block() after every block of them
template <class A, class Visit, class AfterBlock>
inline void each_vector(int64_t width, const Visit& visit, const AfterBlock& after_block) {
  constexpr int64_t block = BLOCK_VECTORS * LANES<A>;
  for (int64_t begin = 0; begin < width; begin += block) {
    const int64_t end = at_most(begin + block, width);
    int64_t col = begin;
    for (; col + LANES<A> <= end; col += LANES<A>) visit(col, LANES<A>);
    if (col < end) visit(col, static_cast<int>(end - col));
    after_block();
  }
}

// The choice keeps this product from being fused into a difference, which would not be 0 for equal branches.
template <class A>
inline Vec<A> probability(Vec<A> power, A inverse_z) {
  const Vec<A> zero{};
  return power == zero ? zero : power * inverse_z;
}

// One branch of one row.
template <class E, Tempered T>
struct Branch {
  using A = Acc<E>;
  const E* row;
  int64_t stride, width;
  A max, inverse_z, inverse_z_tau, log_z_tau;

  struct Powers {
    Vec<A> plain, tempered;  // exp(x), exp(x / tau) of x = logit - max
    Vec<A> log_p;            // log of the tempered probability
  };

  Powers powers(int64_t col, int count, A inverse_tau) const {
    const Vec<A> x = logits_at(row, stride, col, count) - max;
    const Vec<A> cooled = T == Tempered::same ? x : x * inverse_tau;
    const Vec<A> tempered = exponential<A>(cooled);
    const Vec<A> plain = T == Tempered::same ? tempered : T == Tempered::root ? tempered * tempered : exponential<A>(x);
    return {plain, tempered, cooled - log_z_tau};
  }

  void set(A max_, A inverse_z_, A inverse_z_tau_) {
    max = max_;
    inverse_z = inverse_z_;
    inverse_z_tau = inverse_z_tau_;
    log_z_tau = static_cast<A>(-logarithm(static_cast<double>(inverse_z_tau)));
  }

  // Reads the row twice; the cross-entropy with `target`.
  A add_up(int64_t target, A inverse_tau) {
    Vec<A> most = splat(static_cast<A>(-INFINITE));
    const auto nothing = [] {};
    each_vector<A>(width, [&](int64_t col, int count) {
      const Vec<A> x = logits_at(row, stride, col, count);
      most = x > most ? x : most;
    }, nothing);
    max = most[0];
    for (int i = 1; i < LANES<A>; i++) max = most[i] > max ? most[i] : max;
    log_z_tau = 0;
    Sum<A> sum, sum_tau;
    Vec<A> plain{}, tempered{};
    each_vector<A>(width, [&](int64_t col, int count) {
      const Powers e = powers(col, count, inverse_tau);
      plain += e.plain;
      tempered += e.tempered;
    }, [&] {
      sum.add(plain);
      sum_tau.add(tempered);
      plain = tempered = Vec<A>{};
    });
    const double z = sum.total();
    set(max, static_cast<A>(1 / z), static_cast<A>(1 / sum_tau.total()));
    const double logit = widen(row[target * stride]);
    return static_cast<A>(logarithm(z) - (logit - static_cast<double>(max)));
  }

  // softmax - onehot
  Vec<A> residual(const Powers& e, int64_t col, int count, int64_t target) const {
    Vec<A> p = probability(e.plain, inverse_z);
    const uint64_t lane = static_cast<uint64_t>(target - col);
    if (lane < static_cast<uint64_t>(count)) p[lane] -= 1;
    return p;
  }
};

template <class E, Tempered T>
struct DistilledRow {
  using A = Acc<E>;
  const Distillation& p;
  int64_t m, target;
  A tau, inverse_tau;
  Branch<E, T> off{}, on{};
  A divergence;

  DistilledRow(const Distillation& arguments, int64_t row)
      : p(arguments), m(row), target(arguments.targets[row]), tau(static_cast<A>(arguments.temperature)),
        inverse_tau(static_cast<A>(1 / arguments.temperature)), divergence(0) {
    off.row = row_start<E>(p.off, m);
    off.stride = p.off.stride_w;
    off.width = p.off.width;
    if (!p.on.data) return;
    on.row = row_start<E>(p.on, m);
    on.stride = p.on.stride_w;
    on.width = p.on.width;
  }

  A* stats() const { return static_cast<A*>(p.stats) + m * DISTILLATION_STATS; }

  // p (log p - log q); 0 log 0 = 0
  static Vec<A> times_log_ratio(Vec<A> p, Vec<A> log_ratio) {
    const Vec<A> zero{};
    return p == zero ? zero : p * log_ratio;
  }

  void forward(A* losses) {
    losses[0] = off.add_up(target, inverse_tau);
    losses[1] = losses[2] = 0;
    if (p.on.data) {
      losses[1] = on.add_up(target, inverse_tau);
      Sum<A> sum;
      Vec<A> terms{};
      each_vector<A>(off.width, [&](int64_t col, int count) {
        const auto a = off.powers(col, count, inverse_tau), b = on.powers(col, count, inverse_tau);
        const Vec<A> p_on = probability(b.tempered, on.inverse_z_tau);
        terms += times_log_ratio(p_on, b.log_p - a.log_p) + (probability(a.tempered, off.inverse_z_tau) - p_on);
      }, [&] {
        sum.add(terms);
        terms = Vec<A>{};
      });
      divergence = static_cast<A>(sum.total());
      losses[2] = divergence;
    }
    const A all[DISTILLATION_STATS] = {off.max, off.inverse_z, off.inverse_z_tau, on.max, on.inverse_z,
                                      on.inverse_z_tau, divergence};
    for (int i = 0; i < DISTILLATION_STATS; i++) stats()[i] = all[i];
  }

  void recall() {
    const A* from = stats();
    off.set(from[0], from[1], from[2]);
    if (p.on.data) on.set(from[3], from[4], from[5]);
    divergence = from[6];
  }

  // The gradients may lie where the logits do.
  void backward() const {
    const A* scales = static_cast<const A*>(p.scales);
    const A c_off = scales[0], c_on = scales[1], c_kl = scales[2] * inverse_tau;
    E* d_off = p.d_off.data ? const_cast<E*>(row_start<E>(p.d_off, m)) : nullptr;
    E* d_on = p.d_on.data ? const_cast<E*>(row_start<E>(p.d_on, m)) : nullptr;
    const auto put = [](E* to, int64_t stride, int64_t col, int count, Vec<A> value) {
      if (stride == 1) return store_part(to + col, value, count);
      for (int i = 0; i < count; i++) narrow(value[i], to + (col + i) * stride);
    };
    each_vector<A>(off.width, [&](int64_t col, int count) {
      const auto a = off.powers(col, count, inverse_tau);
      Vec<A> da = off.residual(a, col, count, target) * c_off;
      if (p.on.data) {
        const auto b = on.powers(col, count, inverse_tau);
        const Vec<A> p_on = probability(b.tempered, on.inverse_z_tau);
        if (p.off_learns) da += (probability(a.tempered, off.inverse_z_tau) - p_on) * c_kl;
        Vec<A> db = on.residual(b, col, count, target) * c_on;
        if (p.on_learns) db += times_log_ratio(p_on, (b.log_p - a.log_p) - divergence) * c_kl;
        if (d_on) put(d_on, p.d_on.stride_w, col, count, db);
      }
      if (d_off) put(d_off, p.d_off.stride_w, col, count, da);
    }, [] {});
  }
};

template <class E>
inline void clear_row(const Rows& rows, int64_t m) {
  if (!rows.data) return;
  E* to = const_cast<E*>(row_start<E>(rows, m));
  for (int64_t col = 0; col < rows.width; col++) to[col * rows.stride_w] = E{};
}

// body(DistilledRow) for every row that has a target, skipped(m) for the others
template <class E, class Body, class Skipped>
inline void each_distilled_row(const Distillation& p, Parallel parallel, const Body& body, const Skipped& skipped) {
  run(parallel, p.off.total(), [&](int64_t m) {
    if (p.targets[m] == IGNORED_TARGET) {
      clear_row<E>(p.d_off, m);
      clear_row<E>(p.d_on, m);
      return skipped(m);
    }
    if (!p.on.data || p.temperature == 1) return body(DistilledRow<E, Tempered::same>(p, m));
    if (p.temperature == 2) return body(DistilledRow<E, Tempered::root>(p, m));
    return body(DistilledRow<E, Tempered::other>(p, m));
  });
}

inline int64_t distillation_work(const Distillation& p) {
  return p.off.total() * 3;
}

template <class E>
void distillation(const Distillation& p, Parallel parallel) {
  using A = Acc<E>;
  A* losses = static_cast<A*>(p.work);
  each_distilled_row<E>(p, parallel, [&](auto row) {
    row.forward(losses + 3 * row.m);
    if (p.scales) row.backward();
  }, [&](int64_t m) {
    for (int i = 0; i < 3; i++) losses[3 * m + i] = 0;
    for (int i = 0; i < DISTILLATION_STATS; i++) static_cast<A*>(p.stats)[m * DISTILLATION_STATS + i] = 0;
  });
  for (int i = 0; i < 3; i++) {
    double total = 0;
    for (int64_t m = 0; m < p.off.total(); m++) total += losses[3 * m + i];
    static_cast<A*>(p.sums)[i] = static_cast<A>(total);
  }
}

template <class E>
void distillation_backward(const Distillation& p, Parallel parallel) {
  each_distilled_row<E>(p, parallel, [&](auto row) {
    row.recall();
    row.backward();
  }, [](int64_t) {});
}

}  // namespace ECHOLORA_ISA
}  // namespace echolora

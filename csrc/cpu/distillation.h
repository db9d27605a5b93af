// Cross-entropies of two branches and the divergence between them, a row of the vocabulary at a time.
//
// With a, b the logits of OFF and ON, q = softmax(a / tau) and p = softmax(b / tau):
//   CE = log z + max - logit of the target,  z = sum exp(logit - max)
//   KL = sum p (log p - log q) + (q - p)     the last two sum to 0, and take away what rounding does to the sums z
//   da = c_off (softmax(a) - onehot) + c_kl (q - p) / tau
//   db = c_on (softmax(b) - onehot) + c_kl p (log p - log q - KL) / tau
#pragma once

#include "block.h"
#include "exponential.h"

namespace echolora {
namespace ECHOLORA_ISA {

constexpr int64_t SUMMED_COLS = 2048;  // are added up in vectors of A, and these sums in double
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

// visit(col, count) for every vector of a row, and after_block() after every SUMMED_COLS columns
template <class A, class Visit, class AfterBlock>
inline void each_vector(int64_t width, const Visit& visit, const AfterBlock& after_block) {
  for (int64_t begin = 0; begin < width; begin += SUMMED_COLS) {
    const int64_t end = at_most(begin + SUMMED_COLS, width);
    int64_t col = begin;
    for (; col + LANES<A> <= end; col += LANES<A>) visit(col, LANES<A>);
    if (col < end) visit(col, static_cast<int>(end - col));
    after_block();
  }
}

// One branch of one row; `stats` holds max, z and the z of the temperature.
template <class E, Tempered T>
struct Branch {
  using A = Acc<E>;
  const E* row;
  int64_t stride, width;
  A max, z, z_tau;
  A to_p, to_p_tau, log_z_tau;  // 1 / z, 1 / z_tau

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

  void set(A max_, A z_, A z_tau_) {
    max = max_;
    z = z_;
    z_tau = z_tau_;
    to_p = 1 / z;
    to_p_tau = 1 / z_tau;
    log_z_tau = static_cast<A>(logarithm(static_cast<double>(z_tau)));
  }

  void sum(A inverse_tau) {
    Vec<A> most = splat(static_cast<A>(-INFINITE));
    const auto nothing = [] {};
    each_vector<A>(width, [&](int64_t col, int count) {
      const Vec<A> x = logits_at(row, stride, col, count);
      most = x > most ? x : most;
    }, nothing);
    max = most[0];
    for (int i = 1; i < LANES<A>; i++) max = most[i] > max ? most[i] : max;
    log_z_tau = 0;
    double total = 0, total_tau = 0;
    Vec<A> plain{}, tempered{};
    each_vector<A>(width, [&](int64_t col, int count) {
      const Powers e = powers(col, count, inverse_tau);
      plain += e.plain;
      tempered += e.tempered;
    }, [&] {
      total += sum_lanes<A>(plain);
      total_tau += sum_lanes<A>(tempered);
      plain = tempered = Vec<A>{};
    });
    set(max, static_cast<A>(total), static_cast<A>(total_tau));
  }

  A cross_entropy(int64_t target) const {
    const double log_z = logarithm(static_cast<double>(z));
    return static_cast<A>(log_z - (static_cast<double>(widen(row[target * stride])) - static_cast<double>(max)));
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
  static Vec<A> times_log_ratio(Vec<A> probability, Vec<A> log_ratio) {
    const Vec<A> zero{};
    return probability == zero ? zero : probability * log_ratio;
  }

  void forward(A* losses) {
    off.sum(inverse_tau);
    losses[0] = off.cross_entropy(target);
    losses[1] = losses[2] = 0;
    if (p.on.data) {
      on.sum(inverse_tau);
      losses[1] = on.cross_entropy(target);
      double total = 0;
      Vec<A> sum{};
      each_vector<A>(off.width, [&](int64_t col, int count) {
        const auto a = off.powers(col, count, inverse_tau), b = on.powers(col, count, inverse_tau);
        const Vec<A> q_less_p = a.tempered * off.to_p_tau - b.tempered * on.to_p_tau;
        sum += times_log_ratio(b.tempered * on.to_p_tau, b.log_p - a.log_p) + q_less_p;
      }, [&] {
        total += sum_lanes<A>(sum);
        sum = Vec<A>{};
      });
      divergence = static_cast<A>(total);
      losses[2] = divergence;
    }
    const A all[DISTILLATION_STATS] = {off.max, off.z, off.z_tau, on.max, on.z, on.z_tau, divergence};
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
    const auto put = [&](E* to, const Rows& rows, int64_t col, int count, Vec<A> value, A at_target) {
      const uint64_t lane = static_cast<uint64_t>(target - col);
      if (lane < static_cast<uint64_t>(count)) value[lane] -= at_target;
      if (rows.stride_w == 1) return store_part(to + col, value, count);
      for (int i = 0; i < count; i++) narrow(value[i], to + (col + i) * rows.stride_w);
    };
    each_vector<A>(off.width, [&](int64_t col, int count) {
      const auto a = off.powers(col, count, inverse_tau);
      Vec<A> da = a.plain * (c_off * off.to_p);
      if (p.on.data) {
        const auto b = on.powers(col, count, inverse_tau);
        const Vec<A> probability = b.tempered * on.to_p_tau;
        if (p.off_learns) da += (a.tempered * off.to_p_tau - probability) * c_kl;
        Vec<A> db = b.plain * (c_on * on.to_p);
        if (p.on_learns) db += times_log_ratio(probability, (b.log_p - a.log_p) - divergence) * c_kl;
        if (d_on) put(d_on, p.d_on, col, count, db, c_on);
      }
      if (d_off) put(d_off, p.d_off, col, count, da, c_off);
    }, [] {});
  }
};

template <class E>
inline void clear_row(const Rows& rows, int64_t m) {
  if (!rows.data) return;
  E* to = const_cast<E*>(row_start<E>(rows, m));
  for (int64_t col = 0; col < rows.width; col++) to[col * rows.stride_w] = E{};
}

// body(DistilledRow) for every row that has a target, cleared(m) for the others
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

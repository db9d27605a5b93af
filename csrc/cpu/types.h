// Plain arguments of the CPU kernels: free of torch, so that a file built for one instruction set shares no inline code.
#pragma once

#include <cstdint>

namespace echolora {

enum class Type { f32, f64, bf16, f16 };
enum class Site { none, adapter_input, rank };

// x or dY, [samples, per_sample, width], any strides; row m is position m % per_sample of sample m / per_sample
struct Rows {
  const void* data;
  Type type;
  int64_t samples, per_sample, width;
  int64_t stride_n, stride_t, stride_w;
  int64_t total() const { return samples * per_sample; }
};

// A, B, S or dS: one side is the rank; data is null where the operator goes without it
struct Thin {
  const void* data = nullptr;
  Type type = Type::f32;
  int64_t stride_row = 0, stride_col = 0;
};

// an element is dropped where the 24 high bits of its random word are below `below`; 0 is no dropout
struct Dropout {
  uint64_t seed = 0;
  int64_t below = 0;
  double keep_scale = 1;
};

// void* below is the accumulator's type (double for f64, else float), contiguous, or null where there is none;
// "element" is the type of the rows. `work` is scratch of as many accumulators as `*_work` says.

struct Shrink {
  Rows x;
  Thin a;  // [rank, width]
  int64_t rank;
  double scaling;
  Dropout dropout;
  const void* gain;  // [width]
  Site site;
  const void *delta, *mask;  // [samples, width or rank], [total]
  void* s;                   // [total, rank], contiguous
  Type s_type;
  void* work;
};

struct LinearEpilogue {
  int64_t samples, per_sample, width, rank;
  Type type;
  Thin s, b;                                // [total, rank], [width, rank]
  const void *z, *base;                     // [total, width], element
  const void *gain, *bias, *delta, *mask;   // [width], [width], [samples, width], [total]
  void* y;                                  // [total, width], element
  void* work;
};

struct AdapterBackward {
  Rows dy;
  Thin s, b;  // [total, rank], [width, rank]
  int64_t rank;
  double scaling;
  const void* gain;  // [width]
  const void* z;     // [total, width], element
  const void* mask;  // [total]
  void* ds;          // [total, rank], of ds_type
  Type ds_type;
  void *db, *dbias, *dgain, *ddelta;  // [width, rank], [width], [width], [samples, width]
  bool add_low_rank;                  // to z, what s B^T adds
  void* work;
  bool sums_b() const { return db || (dgain && add_low_rank); }
};

struct LoraABackward {
  Rows x;
  Thin ds;  // [total, rank]
  int64_t rank;
  Dropout dropout;
  const void *delta, *mask;  // [samples, width], [total]
  void* da;                  // [rank, width]
  void* work;
};

struct InputEpilogue {
  int64_t total, width, rank;
  Type type;
  Thin ds, a;           // [total, rank], [rank, width]
  const void* product;  // [total, width], element
  Dropout dropout;
  bool accumulate;
  void* dx;  // [total, width], element
  void* work;
};

struct LinearForward {
  Shrink shrink;            // its work serves both
  LinearEpilogue epilogue;  // its s is what shrink writes
};

struct LinearBackward {
  AdapterBackward adapter;  // its work serves all
  LoraABackward lora_a;     // its ds is what adapter writes
  InputEpilogue input;      // likewise
  bool need_a, need_x;
};

struct DoraNorm {
  Thin weight;  // [d_out, d_in]
  Thin a, b;    // [rank, d_in], [d_out, rank]
  int64_t d_out, d_in, rank;
  double scaling, floor;
  const void* magnitude;  // [d_out], or null
  void *norm, *gain;      // [d_out]
  bool wide;              // accumulate in double
  void* work;
};

struct Drop {
  Rows x;
  Dropout dropout;
  void* out;  // [total, width], element
};

constexpr int64_t IGNORED_TARGET = -100;
constexpr int DISTILLATION_STATS = 7;  // max, 1 / z, 1 / z of the temperature of OFF, the same of ON, the divergence

struct Distillation {
  Rows off, on;            // [.., vocabulary]; on.data is null where there is one branch
  const int64_t* targets;  // [total], IGNORED_TARGET or a column
  double temperature;
  bool off_learns, on_learns;  // from the divergence
  const void* scales;          // [3], of the gradients of the two cross-entropies and the divergence
  Rows d_off, d_on;            // written, where not null; may be off and on themselves
  void* stats;                 // [total, DISTILLATION_STATS]
  void* sums;                  // [3], cross-entropies and divergence over all rows
  void* work;
};

// The up-projections of `count` modules, element and contiguous; module i has widths[i] rows of each
struct Networks {
  int64_t samples, m, count;
  const int64_t* widths;
  Type type;
  const void *proj_up, *gate_up, *gate_bias, *scale;  // [rows, m], [rows, m], [rows], [count]
  int64_t hidden() const { return 2 * count * m; }
};

struct NetworksForward {
  Networks networks;
  int64_t d;
  const void *u, *down;  // [samples, d], [hidden, d], element
  void* h;               // [samples, hidden]
  void* delta;           // for each module [samples, width], element
};

struct NetworksBackward {
  Networks networks;
  const void *ddelta, *h;                                // as in the forward pass
  void *da, *dproj_up, *dgate_up, *dgate_bias, *dscale;  // element; da [samples, hidden]
  void* work;
};

// Runs task(0) .. task(count - 1), in any order, on any number of threads.
using Parallel = void (*)(int64_t count, void (*task)(int64_t, void*), void* context);

// The kernels as one instruction set has them.
struct Kernels {
  const char* name;
  int64_t (*shrink_work)(const Shrink&);
  void (*shrink)(const Shrink&, Parallel);
  int64_t (*linear_epilogue_work)(const LinearEpilogue&);
  void (*linear_epilogue)(const LinearEpilogue&, Parallel);
  int64_t (*adapter_backward_work)(const AdapterBackward&);
  void (*adapter_backward)(const AdapterBackward&, Parallel);
  int64_t (*lora_a_backward_work)(const LoraABackward&);
  void (*lora_a_backward)(const LoraABackward&, Parallel);
  int64_t (*input_epilogue_work)(const InputEpilogue&);
  void (*input_epilogue)(const InputEpilogue&, Parallel);
  int64_t (*linear_forward_work)(const LinearForward&);
  void (*linear_forward)(const LinearForward&, Parallel);
  int64_t (*linear_backward_work)(const LinearBackward&);
  void (*linear_backward)(const LinearBackward&, Parallel);
  int64_t (*dora_norm_work)(const DoraNorm&);
  void (*dora_norm)(const DoraNorm&, Parallel);
  void (*drop)(const Drop&, Parallel);
  int64_t (*distillation_work)(const Distillation&);
  void (*distillation)(const Distillation&, Parallel);
  void (*distillation_backward)(const Distillation&, Parallel);
  void (*networks_forward)(const NetworksForward&, Parallel);
  int64_t (*networks_backward_work)(const NetworksBackward&);
  void (*networks_backward)(const NetworksBackward&, Parallel);
};

}  // namespace echolora

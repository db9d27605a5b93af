/* C interface of the CUDA kernels: raw device pointers, sizes and strides in elements, no word of torch.
 *
 * Every operator takes one struct and a cudaStream_t, works on the current device, and returns a cudaError_t (0 is
 * success; echolora_cuda_error names the rest). Where an operator has a `workspace`, the caller allocates the number
 * of bytes that its `_workspace` function returns; that memory needs no particular content.
 *
 * E is the type of an operator's main tensor; Acc is double for float64 and float for every other E. A pointer that is
 * said to be optional is null where there is no such tensor. Sizes M = samples * length, width and rank are at least 1
 * and below 2^31; rank is at most 256.
 */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { ECHOLORA_FLOAT16, ECHOLORA_BFLOAT16, ECHOLORA_FLOAT32, ECHOLORA_FLOAT64 };

/* [samples, length, width] with any strides, also 0; row m is (m / length, m % length) */
typedef struct {
  const void* data;
  int dtype;
  int64_t samples, length, width;
  int64_t stride_n, stride_t, stride_c;
} echolora_rows;

/* a matrix with any strides; dtype is E or Acc */
typedef struct {
  const void* data;
  int dtype;
  int64_t stride_row, stride_col;
} echolora_matrix;

/* seed: one int64 on the device, optional; drop_below is round(p * 2^24), keep_scale is 1 / (1 - p) */
typedef struct {
  const int64_t* seed;
  uint32_t drop_below;
  double keep_scale;
} echolora_dropout;

/* out = scaling * (drop(x) (a * gain)^T + echo), site 1: mask delta is added to drop(x), site 2: to the product */
typedef struct {
  echolora_rows x;
  echolora_matrix a; /* [rank, width] */
  int64_t rank;
  double scaling;
  echolora_dropout dropout;
  const void* gain; /* Acc [width], optional */
  int site;
  const void* delta; /* Acc [samples, width] or [samples, rank] */
  const void* mask;  /* Acc [M] */
  void* out;         /* [M, rank] in E, or in Acc where out_wide */
  int out_wide;
  void* workspace;
} echolora_shrink_args;

/* y = (gain * t + base - z | t) + bias + mask delta, with t = z + s b^T */
typedef struct {
  int dtype; /* E */
  int64_t samples, length, width, rank;
  echolora_matrix s;                             /* [M, rank] */
  echolora_matrix b;                             /* [width, rank] */
  const void *base, *gain, *bias, *delta, *mask; /* E [M, width], Acc [width] twice, [samples, width], [M]; optional */
  void* z;                                       /* E [M, width], optional, may be y */
  int store_z;
  void* y; /* E [M, width] */
} echolora_linear_epilogue_args;

/* everything that is a sum over dY; outputs are in Acc, each optional */
typedef struct {
  echolora_rows dy;
  echolora_matrix s; /* [M, rank]; only for db */
  echolora_matrix b; /* [width, rank]; only for ds */
  int64_t rank;
  double scaling;
  const void* gain;                       /* Acc [width], optional */
  const void* z;                          /* E [M, width]; only for dgain */
  const void* mask;                       /* Acc [M]; only for ddelta */
  void *ds, *db, *dbias, *dgain, *ddelta; /* [M, rank], [width, rank], [width], [width], [samples, width] */
  void* workspace;
} echolora_adapter_backward_args;

/* da = ds^T (drop(x) + mask delta) */
typedef struct {
  echolora_rows x;
  echolora_matrix ds; /* [M, rank] */
  int64_t rank;
  echolora_dropout dropout;
  const void *delta, *mask; /* Acc [samples, width] and [M], optional */
  void* da;                 /* Acc [rank, width] */
  void* workspace;
} echolora_lora_a_backward_args;

/* dx = (accumulate ? dx : 0) + drop'(ds a + product) */
typedef struct {
  int dtype; /* E */
  int64_t rows, width, rank;
  echolora_matrix ds;  /* [rows, rank] */
  echolora_matrix a;   /* [rank, width] */
  const void* product; /* E [rows, width], optional */
  echolora_dropout dropout;
  int accumulate;
  void* dx; /* E [rows, width] */
} echolora_input_epilogue_args;

/* norm = row norm of weight + scaling * b a; gain = magnitude / max(norm, the smallest normal number) */
typedef struct {
  int dtype; /* of weight */
  int64_t rows, width, rank;
  const void* weight;   /* [rows, width] */
  echolora_matrix a, b; /* [rank, width], [rows, rank], of one dtype: weight's, or Acc, or any with weight in Acc */
  double scaling;
  const void* magnitude; /* Acc [rows], optional */
  void *norm, *gain;     /* Acc [rows]; gain only with a magnitude */
  void* workspace;
} echolora_dora_norm_args;

/* out = drop(x) */
typedef struct {
  echolora_rows x;
  echolora_dropout dropout;
  void* out; /* E [M, width] */
} echolora_drop_args;

int64_t echolora_cuda_shrink_workspace(const echolora_shrink_args* args);
int64_t echolora_cuda_adapter_backward_workspace(const echolora_adapter_backward_args* args);
int64_t echolora_cuda_lora_a_backward_workspace(const echolora_lora_a_backward_args* args);
int64_t echolora_cuda_dora_norm_workspace(const echolora_dora_norm_args* args);

int echolora_cuda_shrink(const echolora_shrink_args* args, void* stream);
int echolora_cuda_linear_epilogue(const echolora_linear_epilogue_args* args, void* stream);
int echolora_cuda_adapter_backward(const echolora_adapter_backward_args* args, void* stream);
int echolora_cuda_lora_a_backward(const echolora_lora_a_backward_args* args, void* stream);
int echolora_cuda_input_epilogue(const echolora_input_epilogue_args* args, void* stream);
int echolora_cuda_dora_norm(const echolora_dora_norm_args* args, void* stream);
int echolora_cuda_drop(const echolora_drop_args* args, void* stream);

const char* echolora_cuda_error(int code);

#ifdef __cplusplus
}
#endif

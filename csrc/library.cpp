// The operators of the compiled backends: what each computes; CPU and CUDA implementations register themselves.
//
// Python (compiled_kernels.py, compiled_losses.py and compiled.py in ops/) composes them with the vendor's GEMM, which
// computes every product with W0 and the output head. x and dy are [n, T, width] with any strides, T rows a sample,
// M = n T rows in all; on CPUs also [M, width]. "Accumulator" is float64
// for float64 elements and float32 for the others. Dropout keeps an element where the 24 high bits of its random word
// (Philox4x32-7 of seed, row and column) are at least drop_below = round(p 2^24); drop_below = 0 is no dropout.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/dispatch.h"

// Defined where the library is built with its CUDA half: "sm_80 sm_90".
extern "C" __attribute__((weak)) const char* echolora_cuda_architectures();

namespace {
std::string cpu_instructions() { return echolora::kernels().name; }
std::string cuda_architectures() { return echolora_cuda_architectures ? echolora_cuda_architectures() : ""; }
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(echolora, m) {
  // S = scaling ((drop(x) + [site 1] mask delta) (gain * a)^T + [site 2] mask delta): [M, r], dtype of a.
  // a [r, K] in x's dtype or the accumulator's; gain [K], delta [n, K or r], mask [M] in the accumulator's.
  m.def(
      "shrink(Tensor x, Tensor a, float scaling, Tensor? seed, int drop_below, float keep_scale, Tensor? gain, "
      "int site, Tensor? delta, Tensor? mask) -> Tensor");
  // t = S b^T (+ z);  y = (gain t + (base - z), or t) + bias + mask delta;  store_z: z := t (CUDA alone).
  // s [M, r], b [N, r]; y [n, T, N], z and base, as many elements, contiguous; z may be y. z absent: the product S b^T alone.
  m.def(
      "linear_epilogue(Tensor s, Tensor b, Tensor(a!)? z, Tensor? base, Tensor? gain, Tensor? bias, Tensor? delta, "
      "Tensor? mask, Tensor(b!) y, bool store_z) -> ()");
  // One pass over dy [n, T, N]: dS = scaling dy (gain b) [M, r], in b's dtype or the accumulator's; and in the
  // accumulator's db = gain dy^T s [N, r]; dbias = sums of dy [N]; dgain = sums of dy z [N], of dy (z + s b^T) with
  // add_low_rank (CPU alone); ddelta = sums of mask dy over each sample [n, N]; added in an order that depends on shapes alone; empty where not needed.
  m.def(
      "adapter_backward(Tensor dy, Tensor? s, Tensor b, float scaling, Tensor? gain, Tensor? z, Tensor? mask, "
      "bool need_ds, bool need_db, bool need_dbias, bool need_dgain, bool need_ddelta, bool add_low_rank) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // dA = dS^T (drop(x) + mask delta): [r, K] in the accumulator's dtype; ds [M, r] as adapter_backward left it.
  m.def(
      "lora_a_backward(Tensor x, Tensor ds, Tensor? seed, int drop_below, float keep_scale, Tensor? delta, "
      "Tensor? mask) -> Tensor");
  // v = drop'(dS a + product);  dx = dx + v where accumulate, else v. dx and product, M K elements, contiguous.
  m.def(
      "input_epilogue(Tensor ds, Tensor a, Tensor? product, Tensor? seed, int drop_below, float keep_scale, "
      "bool accumulate, Tensor(a!) dx) -> ()");
  // shrink and linear_epilogue in one pass over the rows (CPU alone). site 3 is the echo at the output.
  m.def(
      "linear_forward(Tensor x, Tensor a, Tensor b, float scaling, Tensor? seed, int drop_below, float keep_scale, "
      "int site, Tensor? delta, Tensor? mask, Tensor? z, Tensor? base, Tensor? gain, Tensor? bias, Tensor(a!) y) -> "
      "Tensor");
  // adapter_backward with add_low_rank, and lora_a_backward where x is given, and input_epilogue with accumulate where dx is, in one pass
  // over the rows (CPU alone). delta: the echo at the adapter's input; it and need_ddelta share the mask. Last is dA.
  m.def(
      "linear_backward(Tensor dy, Tensor? s, Tensor b, float scaling, Tensor? gain, Tensor? z, Tensor? mask, Tensor? x, "
      "Tensor? a, Tensor? seed, int drop_below, float keep_scale, Tensor? delta, Tensor? product, Tensor(a!)? dx, "
      "bool need_ds, bool need_db, bool need_dbias, bool need_dgain, bool need_ddelta) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // norm = row norms of weight + scaling b a;  gain = magnitude / max(norm, smallest normal number). Both [N].
  m.def("dora_norm(Tensor weight, Tensor a, Tensor b, float scaling, Tensor? magnitude) -> (Tensor, Tensor)");
  // drop(x): [M, K], contiguous, in x's dtype.
  m.def("drop(Tensor x, Tensor seed, int drop_below, float keep_scale) -> Tensor");
  // Over the rows of logits [n, T, V] whose target [n T] is not -100, with p = softmax(on / temperature) and
  // q = softmax(off / temperature): the sums of CE(off), CE(on) and KL(p || q), [3], and what the backward pass wants
  // to know of each row, [n T, 7] (CPU alone). Where scales is given also the gradient, as distillation_backward.
  m.def(
      "distillation(Tensor off, Tensor? on, Tensor targets, float temperature, Tensor? scales, bool off_learns, "
      "bool on_learns, Tensor(a!)? d_off, Tensor(b!)? d_on) -> (Tensor, Tensor)");
  // d_off and d_on, each where given: the gradient of scales . sums; they may be off and on themselves. off_learns and
  // on_learns: whether the divergence has a gradient there. Rows without a target get zeros.
  m.def(
      "distillation_backward(Tensor off, Tensor? on, Tensor targets, Tensor stats, float temperature, Tensor scales, "
      "bool off_learns, bool on_learns, Tensor(a!)? d_off, Tensor(b!)? d_on) -> ()");
  // All echo networks of a step (CPU alone). Module i has rows [2 i m, 2 (i + 1) m) of down [2 n m, d], W1 then U1, and
  // widths[i] rows of proj_up (W2) and gate_up (U2) [sum of widths, m] and of gate_bias (c). Everything is contiguous and
  // in u's dtype; h is in the accumulator's.
  // delta_i = scale_i sigmoid(U2 tanh(U1 u) + c) (W2 tanh(W1 u)): for each module [N, widths[i]], one after the other,
  // and h = tanh(u down^T) [N, 2 n m].
  m.def(
      "networks_forward(Tensor u, Tensor down, Tensor proj_up, Tensor gate_up, Tensor gate_bias, Tensor scale, "
      "int[] widths) -> (Tensor, Tensor)");
  // The gradients of u down^T, proj_up, gate_up, gate_bias and scale, given that of delta.
  m.def(
      "networks_backward(Tensor ddelta, Tensor h, Tensor proj_up, Tensor gate_up, Tensor gate_bias, Tensor scale, "
      "int[] widths) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // What this process uses, and what the library was built for.
  m.def("cpu_instructions() -> str");
  m.def("cuda_architectures() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(echolora, CompositeExplicitAutograd, m) {
  m.impl("cpu_instructions", TORCH_BOX(&cpu_instructions));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
}

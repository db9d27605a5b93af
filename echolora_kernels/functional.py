"""The operators as functions: arguments in, backend chosen, result out. Nothing is kept between calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import backends
from .ops.echo_lora_linear import Echo, Projection

__all__ = ["echo_lora_linear", "echo_lora_linear_group", "echo_networks", "lora_update"]


def echo_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    magnitude: torch.Tensor | None = None,
    echo: Echo | None = None,
    dora_dropout: str = "exact",
    backend: str | None = None,
) -> torch.Tensor:
    """Linear layer with a LoRA or DoRA update and an optional echo.

    With ``x~ = drop(x)`` and ``E = mask * delta`` (zero where no echo is given):

        LoRA, site "output"         y = W0 x + bias + s B A x~ + E
        LoRA, site "adapter_input"  y = W0 x + bias + s B A (x~ + E)
        LoRA, site "rank"           y = W0 x + bias + s B (A x~ + E)
        DoRA                        y = W0 x + (g - 1) W0 x~ + g s B(...) + bias [+ E at site "output"]
                                    g = magnitude / sg(|| W0 + s B A ||_row)

    Without dropout the DoRA line is ``g (W0 x + s B A x) + bias``; with it, it is what PEFT computes, at the price of a
    second base product. ``dora_dropout="fast"`` keeps one: ``g (W0 x + s B A x~) + bias``.
    Source: docs/method.md "LoRA, site ..." (R) and "DoRA" (O).

    Args:
        x: [..., d_in], dtype of weight (any floating dtype under autocast); [N, T, d_in] when echo is given.
        weight: W0, [d_out, d_in], floating.
        bias: [d_out] or None.
        lora_a: A, [r, d_in], floating; may be wider than x (float32 adapters on a bfloat16 layer).
        lora_b: B, [d_out, r], dtype of lora_a.
        scaling: s, dimensionless; alpha / r, or alpha / sqrt(r) with rsLoRA.
        dropout_p: probability in [0, 1) that an element of x is dropped before A; drawn from torch's generator.
        magnitude: DoRA's w, [d_out], or None for LoRA.
        echo: `Echo(delta [N, width of the site], mask [N, T], site)`, or None.
        dora_dropout: "exact" (PEFT's form) or "fast" (one base product); only matters for DoRA with dropout (O).
        backend: None chooses, a name insists.

    Returns:
        y, [..., d_out], in the dtype of the base product.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendUnavailable: `backend` names one that cannot run here.
    """
    implementation = backends.choose("echo_lora_linear", backend, x.device)
    return implementation(
        x,
        weight,
        bias,
        lora_a,
        lora_b,
        scaling,
        dropout_p=dropout_p,
        magnitude=magnitude,
        echo=echo,
        dora_dropout=dora_dropout,
    )


def echo_lora_linear_group(
    x: torch.Tensor,
    projections: Sequence[Projection],
    *,
    dropout_p: float = 0.0,
    dora_dropout: str = "exact",
    backend: str | None = None,
) -> tuple[torch.Tensor, ...]:
    """Several adapted linears of one input (q, k and v; gate and up), each as `echo_lora_linear` computes it.

    With dropout, all projections see the same dropped input. Backends may read x once for all of them, and add the
    gradients of x up in one buffer. Our choice (O).

    Args:
        x: [..., d_in], as in `echo_lora_linear`.
        projections: at least one `Projection(weight, bias, lora_a, lora_b, scaling, magnitude, echo)`; one dtype for
            all lora_a; ranks, widths, DoRA and echoes may differ.
        dropout_p, dora_dropout, backend: as in `echo_lora_linear`.

    Returns:
        One y, [..., d_out], for each projection.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names the projection and the argument.
        BackendUnavailable: `backend` names one that cannot run here.
    """
    implementation = backends.choose("echo_lora_linear_group", backend, x.device)
    return implementation(x, projections, dropout_p=dropout_p, dora_dropout=dora_dropout)


def lora_update(
    base: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    overwrite_base: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """The low-rank update of a product that another library has computed, such as that of a quantised layer.

    ``y = g (base + s B A drop(x)) + bias``, with g = 1 where no gain is given. Our choice (O).

    Args:
        base: the product with the frozen weight, [..., d_out], floating.
        x: [..., d_in], dtype of base (any floating dtype under autocast, which computes in base's).
        lora_a: A, [r, d_in], floating; may be wider than x.
        lora_b: B, [d_out, r], dtype of lora_a.
        scaling: s, dimensionless.
        gain: g, [d_out], DoRA's ``magnitude / norm``, or None.
        bias: [d_out] or None, which no gain scales.
        dropout_p: probability in [0, 1) that an element of x is dropped before A; drawn from torch's generator.
        overwrite_base: nobody reads base any more, so kernels may put y there, where autograd allows it and no
            gradient of the gain wants it.
        backend: None chooses, a name insists.

    Returns:
        y, [..., d_out], in base's dtype.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendUnavailable: `backend` names one that cannot run here.
    """
    implementation = backends.choose("lora_update", backend, x.device)
    return implementation(
        base,
        x,
        lora_a,
        lora_b,
        scaling,
        gain=gain,
        bias=bias,
        dropout_p=dropout_p,
        overwrite_base=overwrite_base,
    )


def echo_networks(
    u: torch.Tensor,
    down: torch.Tensor,
    proj_up: torch.Tensor,
    gate_up: torch.Tensor,
    gate_bias: torch.Tensor,
    scale: torch.Tensor,
    widths: Sequence[int],
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, ...]:
    """The echo vectors of all target modules, whose networks lie in flat tensors, one module after the other.

    ``Delta = lambda * sigmoid(U2 tanh(U1 u) + c) * (W2 tanh(W1 u))`` for each module; docs/method.md "projection",
    "gate", "echo" (R). Computed in the dtype of the arguments, under autocast too.

    Args:
        u: [N, d], normalised boundary states, floating.
        down: W1 and then U1 of the first module, of the second, ...: [2 n m, d]. This and the others in u's dtype.
        proj_up, gate_up: W2, U2, [sum of widths, m].
        gate_bias: c, [sum of widths].
        scale: lambda, [n].
        widths: of the n modules.
        backend: None chooses, a name insists.

    Returns:
        One Delta, [N, width], contiguous, for each module.

    Raises:
        TypeError, ValueError: a dtype, a device or a shape does not fit; the message names the argument.
        BackendUnavailable: `backend` names one that cannot run here.
    """
    implementation = backends.choose("echo_networks", backend, u.device)
    return implementation(u, down, proj_up, gate_up, gate_bias, scale, widths)

"""`EchoLoRALinear`: a drop-in for `nn.Linear` with a LoRA or DoRA adapter that can receive an echo."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..functional import echo_lora_linear
from ..ops.dora_norm.reference import dora_gain, dora_norm
from ..ops.echo_lora_linear import DORA_DROPOUTS, Echo


class EchoLoRALinear(nn.Module):
    """Frozen linear layer plus a trainable low-rank adapter.

    ``y = W0 x + bias + s B A drop(x) + M Delta``; with DoRA the magnitude rescales ``W0 x + s B A x``.
    See `functional.echo_lora_linear` for the formulas. Initial values as in PEFT: A kaiming-uniform (a = sqrt 5), B = 0.

    Args:
        in_features: d_in.
        out_features: d_out.
        bias: whether the frozen layer has a bias.
        r: rank, at least 1.
        lora_alpha: alpha; s = alpha / r, or alpha / sqrt(r) with use_rslora.
        lora_dropout: probability in [0, 1) of dropping an element of the adapter's input while training.
        use_dora: train a magnitude per output (DoRA).
        use_rslora: rank-stabilised scaling.
        dora_dropout: "exact" computes DoRA under dropout as PEFT does, "fast" with one base product.
        device, dtype: of every parameter.

    Attributes:
        weight: [d_out, d_in], frozen. bias: [d_out] or None, frozen.
        lora_A: [r, d_in]. lora_B: [d_out, r]. magnitude: [d_out] or None; float32 or wider.
        scaling: s. merged: whether `weight` currently contains the adapter.

    Raises:
        ValueError: a size, r, lora_alpha, lora_dropout or dora_dropout out of range.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    magnitude: torch.Tensor | None
    _unmerged_weight: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_dora: bool = False,
        use_rslora: bool = False,
        dora_dropout: str = "exact",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._set_up(base, r, lora_alpha, lora_dropout, use_dora, use_rslora, dora_dropout, None, None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_dora: bool = False,
        use_rslora: bool = False,
        dora_dropout: str = "exact",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> EchoLoRALinear:
        """Wrap `linear`; its weight and bias are shared, not copied, and become frozen.

        `device` and `dtype` are those of the adapter; None takes the weight's.

        Raises:
            TypeError: `linear` is not an nn.Linear.
            ValueError: as the constructor.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: got {type(linear).__name__}, wants torch.nn.Linear")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set_up(linear, r, lora_alpha, lora_dropout, use_dora, use_rslora, dora_dropout, device, dtype)
        return layer.train(linear.training)

    def _set_up(
        self,
        base: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_dora: bool,
        use_rslora: bool,
        dora_dropout: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        for name, size in (("in_features", base.in_features), ("out_features", base.out_features)):
            if size < 1:
                raise ValueError(f"{name}: got {size}, wants at least 1")
        if not math.isfinite(lora_alpha):
            raise ValueError(f"lora_alpha: got {lora_alpha}, wants a finite number")
        if isinstance(r, bool) or not isinstance(r, int) or r <= 0:
            raise ValueError(f"r: got {r!r}, wants an integer of at least 1")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout: got {lora_dropout}, wants 0 <= lora_dropout < 1")
        self.in_features, self.out_features, self.r = base.in_features, base.out_features, r
        self.lora_alpha, self.lora_dropout, self.use_rslora = lora_alpha, lora_dropout, use_rslora
        if dora_dropout not in DORA_DROPOUTS:
            raise ValueError(f"dora_dropout: got {dora_dropout!r}, wants one of {', '.join(map(repr, DORA_DROPOUTS))}")
        self.dora_dropout = dora_dropout
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.weight = base.weight.requires_grad_(False)
        if base.bias is not None:
            base.bias.requires_grad_(False)
        self.register_parameter("bias", base.bias)
        kind: dict[str, Any] = {"device": device or base.weight.device, "dtype": dtype or base.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **kind))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **kind))
        if use_dora:  # never narrower than float32: rounded, it would not start as the frozen layer
            kind["dtype"] = torch.promote_types(kind["dtype"], torch.float32)
        self.register_parameter("magnitude", nn.Parameter(torch.empty(self.out_features, **kind)) if use_dora else None)
        self._unmerged_weight = None
        self.register_state_dict_pre_hook(_refuse_to_save)
        self.register_load_state_dict_pre_hook(_refuse_to_load)
        self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Give the adapter its initial values: afterwards the layer computes what the frozen one does."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.magnitude is not None:
            self.magnitude.copy_(dora_norm(self.weight, self.lora_A, self.lora_B, self.scaling))

    @property
    def merged(self) -> bool:
        return self._unmerged_weight is not None

    def forward(self, x: torch.Tensor, echo: Echo | None = None) -> torch.Tensor:
        """y, [..., d_out], for x [..., d_in]; [N, T, d_in] when an echo is given.

        Raises:
            RuntimeError: an echo for a merged layer, which has no adapter to ride on.
        """
        if self.merged:
            if echo is not None:
                raise RuntimeError("echo: the layer is merged; call unmerge() before training")
            return nn.functional.linear(x, self.weight, self.bias)
        return echo_lora_linear(
            x,
            self.weight,
            self.bias,
            self.lora_A,
            self.lora_B,
            self.scaling,
            dropout_p=self.lora_dropout if self.training else 0.0,
            magnitude=self.magnitude,
            echo=echo,
            dora_dropout=self.dora_dropout,
        )

    def gain(self) -> torch.Tensor | None:
        """DoRA's factor on each output, [d_out]; None for LoRA."""
        if self.magnitude is None:
            return None
        return dora_gain(self.weight, self.lora_A, self.lora_B, self.scaling, self.magnitude)

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """W0 + s B A, row-scaled with DoRA: [d_out, d_in], computed in float32 or wider, in weight's dtype."""
        weight = self.weight if self._unmerged_weight is None else self._unmerged_weight
        wide = torch.promote_types(torch.promote_types(weight.dtype, self.lora_A.dtype), torch.float32)
        merged = weight.to(wide) + self.scaling * (self.lora_B.to(wide) @ self.lora_A.to(wide))
        if self.magnitude is not None:
            gain = dora_gain(weight, self.lora_A, self.lora_B, self.scaling, self.magnitude)
            merged = gain.to(wide).unsqueeze(1) * merged
        return merged.to(weight.dtype)

    def merge(self) -> None:
        """Fold the adapter into `weight`. The original weight is set aside: `unmerge()` restores it bit for bit."""
        if not self.merged:
            merged = nn.Parameter(self.merged_weight(), requires_grad=False)
            # a plain attribute, so that the parameter list and the state dict do not show it
            object.__setattr__(self, "_unmerged_weight", self.weight)
            self.weight = merged

    def unmerge(self) -> None:
        """Undo `merge()`; nothing happens on a layer that is not merged."""
        original, now = self._unmerged_weight, self.weight
        if original is not None:
            if original.device != now.device or original.dtype != now.dtype:  # moved while merged
                original = nn.Parameter(original.to(now), requires_grad=False)
            self.weight = original
            object.__setattr__(self, "_unmerged_weight", None)

    def merged_linear(self) -> nn.Linear:
        """A new, ordinary nn.Linear that computes the same as this layer without echo and dropout."""
        weight = self.merged_weight()
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, r={self.r}"
        text += f", lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
        return text + f", use_dora={self.magnitude is not None}, use_rslora={self.use_rslora}"


def _refuse_to_save(layer: EchoLoRALinear, prefix: str, keep_vars: bool) -> None:
    if layer.merged:
        raise RuntimeError(
            f"{_name(prefix)}: a merged layer's state would hold the adapter twice; "
            "unmerge() first, or use merged_linear()"
        )


def _refuse_to_load(layer: EchoLoRALinear, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    if layer.merged:
        raise RuntimeError(f"{_name(prefix)}: a merged layer cannot load a state; unmerge() first")


def _name(prefix: str) -> str:
    return prefix.rstrip(".") or "layer"

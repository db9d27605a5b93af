"""`EchoConfig`: every choice of the method that is not in the paper's own words, documented and validated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..ops.echo_distillation import KD_DETACH
from ..ops.echo_lora_linear import SITES

STEP_MODES = ("auto", "two-pass", "shared", "packed")
SOURCE_POOLINGS = ("mean", "last")
DORA_ECHOES = ("outside", "inside")


@dataclass(frozen=True)
class EchoConfig:
    """How Echo-LoRA trains. P marks the paper's words, R an independent reading of it, O our own choice.

    Args:
        source_layers: S, blocks whose boundary outputs are pooled; negative counts from the end. None scales the
            reading's 24..27 of 32 with depth: 0.75 L up to 0.875 L (P deeper layers, R which, O scaling).
        target_layers: G, blocks that receive the echo, all shallower than every source. None scales 4..7 of 32:
            0.125 L up to 0.25 L (P shallow modules, R which, O scaling).
        target_modules: last name parts ("q_proj", ...) of the adapted linears in G to inject into. None means every
            adapted linear there (O).
        source_pooling: "mean" over S (R), or "last", the deepest source only (O).
        detach_source: no gradient flows into the boundary states (R).
        norm_eps: epsilon of the affine-free LayerNorm on the pooled state (R).
        bottleneck: m, inner width of projection and gate (R).
        gate_bias: initial c of the gate (R).
        scale: initial lambda of every module (R).
        site: where the echo enters: "output" (R), "adapter_input" or "rank" (O).
        dora_echo: at site "output", add the echo "outside" the DoRA magnitude or "inside" it (O).
        answer_mask: inject at answer positions only (P). False injects at every real position; for ablations.
        echo_start_probability: p_0, probability of routing at the first optimizer step (R).
        echo_end_probability: p_K, after total_steps (R).
        total_steps: K, optimizer steps over which the probability falls linearly; afterwards it stays.
        kd_weight: lambda_kd, weight of the distillation (R).
        kd_temperature: tau (R).
        kd_detach: side of the KL without gradient: "on" (the teacher; R), "none" or "off" (O).
        seed: of the routing draws; equal on every rank.
        step_mode: "two-pass" runs the batch OFF, then ON. "shared" runs the prompts once and then the answers of both
            branches together: the same losses and gradients (with dropout, one mask for the shared prompt), for models
            of transformers without gradient checkpointing. "packed" runs prompt and both branches' answers as one
            row, after a pass over the prompts that keeps no graph: the same again, with gradient checkpointing too.
            "auto" takes the first of "shared", "packed" and "two-pass" that can be done (O).

    Raises:
        TypeError, ValueError: a field is out of range; the message names it.
    """

    source_layers: tuple[int, ...] | None = None
    target_layers: tuple[int, ...] | None = None
    target_modules: tuple[str, ...] | None = None
    source_pooling: str = "mean"
    detach_source: bool = True
    norm_eps: float = 1e-5
    bottleneck: int = 64
    gate_bias: float = -2.0
    scale: float = 0.1
    site: str = "output"
    dora_echo: str = "outside"
    answer_mask: bool = True
    echo_start_probability: float = 1.0
    echo_end_probability: float = 0.2
    total_steps: int = 1000
    kd_weight: float = 1.0
    kd_temperature: float = 2.0
    kd_detach: str = "on"
    seed: int = 0
    step_mode: str = "auto"

    def __post_init__(self) -> None:
        for name in ("source_layers", "target_layers", "target_modules"):
            _freeze_sequence(self, name, str if name == "target_modules" else int)
        _want_choice("source_pooling", self.source_pooling, SOURCE_POOLINGS)
        _want_choice("site", self.site, SITES)
        _want_choice("dora_echo", self.dora_echo, DORA_ECHOES)
        _want_choice("kd_detach", self.kd_detach, KD_DETACH)
        _want_choice("step_mode", self.step_mode, STEP_MODES)
        for name in ("detach_source", "answer_mask"):
            _want(name, getattr(self, name), isinstance(getattr(self, name), bool), "True or False")
        for name in ("bottleneck", "total_steps"):
            _want_number(name, getattr(self, name), "an integer of at least 1", lambda value: value >= 1, int)
        _want_number("seed", self.seed, "an integer of at least 0", lambda value: value >= 0, int)
        for name in ("echo_start_probability", "echo_end_probability"):
            _want_number(name, getattr(self, name), "0 <= value <= 1", lambda value: 0 <= value <= 1)
        for name in ("norm_eps", "kd_temperature"):
            _want_number(name, getattr(self, name), "a finite number above 0", lambda value: value > 0)
        _want_number("kd_weight", self.kd_weight, "a finite number of at least 0", lambda value: value >= 0)
        for name in ("gate_bias", "scale"):
            _want_number(name, getattr(self, name), "a finite number", lambda value: True)
        if self.dora_echo == "inside" and self.site != "output":
            raise ValueError(f"dora_echo: got 'inside' with site {self.site!r}, wants site 'output'")

    def layers(self, depth: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Source and target block numbers, ascending, for a model of `depth` blocks.

        Raises:
            ValueError: a number is out of range or repeated, or a target is not shallower than every source.
        """
        source = self.source_layers or tuple(_slice(depth, 0.75, 0.875))
        target = self.target_layers or tuple(_slice(depth, 0.125, 0.25))
        source = _resolve("source_layers", source, depth)
        target = _resolve("target_layers", target, depth)
        if target[-1] >= source[0]:
            raise ValueError(
                f"target_layers: got {list(target)}, wants every one below {source[0]}, "
                f"the shallowest of source_layers {list(source)} in a model of {depth} blocks"
            )
        return source, target

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `EchoConfig(**d)` gives the same configuration back."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }


def _slice(depth: int, start: float, stop: float) -> range:
    first = int(start * depth)
    return range(first, max(int(stop * depth), first + 1))


def _resolve(name: str, layers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    resolved = [layer + depth if layer < 0 else layer for layer in layers]
    for given, layer in zip(layers, resolved, strict=True):
        if not 0 <= layer < depth:
            raise ValueError(f"{name}: got {given}, wants -{depth} <= layer < {depth}, the number of blocks")
    if len(set(resolved)) != len(resolved):
        raise ValueError(f"{name}: got {list(layers)}, wants every block once")
    return tuple(sorted(resolved))


def _freeze_sequence(config: EchoConfig, name: str, kind: type) -> None:
    value = getattr(config, name)
    if value is None:
        return
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name}: got {value!r}, wants a sequence of {kind.__name__} or None")
    value = tuple(value)
    if not value or not all(isinstance(item, kind) and not isinstance(item, bool) for item in value):
        raise ValueError(f"{name}: got {value!r}, wants at least one {kind.__name__}, or None for the default")
    object.__setattr__(config, name, value)


def _want_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _want(name, value, value in choices, f"one of {', '.join(map(repr, choices))}")


def _want_number(name: str, value: Any, wants: str, holds: Callable[[Any], bool], kind: Any = (int, float)) -> None:
    number = isinstance(value, kind) and not isinstance(value, bool)
    _want(name, value, number and math.isfinite(float(value)) and holds(value), wants)


def _want(name: str, value: object, holds: bool, wants: str) -> None:
    if not holds:
        raise ValueError(f"{name}: got {value!r}, wants {wants}")

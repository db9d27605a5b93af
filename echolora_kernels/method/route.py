"""Stochastic routing: whether an optimizer step runs the ON branch. A pure function of (configuration, step)."""

from __future__ import annotations

from .config import EchoConfig

_MASK = (1 << 64) - 1


def echo_probability(config: EchoConfig, step: int) -> float:
    """p_k, linear from echo_start_probability at k = 0 to echo_end_probability at k = total_steps, then constant."""
    progress = min(step / config.total_steps, 1.0)
    start, end = config.echo_start_probability, config.echo_end_probability
    return start + (end - start) * progress


def routed(config: EchoConfig, step: int) -> bool:
    """r_k ~ Bernoulli(p_k): the same on every rank and micro-batch of step k, and after a resume (R)."""
    return _uniform(config.seed, step) < echo_probability(config, step)


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that depends on (seed, step) alone: two rounds of the SplitMix64 finaliser."""
    return (_mix(_mix(seed & _MASK) + step) >> 11) / 2**53


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)

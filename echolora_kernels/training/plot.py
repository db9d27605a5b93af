"""The loss curves of a run as a picture."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from .loop import StepRecord

_CURVES = {
    "loss_off": ("echo off: what is deployed", "#1b6ca8", "-"),
    "loss_on": ("echo on", "#d1495b", (0, (4, 2))),
    "loss_kd": ("distillation, on to off", "#8d6a9f", "-"),
}
_FLOOR = 1e-8  # a distillation of exactly zero still has a place on the logarithmic axis


def plot_losses(history: list[StepRecord], title: str, path: Path) -> None:
    """Write a PNG: both branches' loss over the steps, and below it the distillation and which steps were routed."""
    routed = [record.step for record in history if record.routed]
    rows = 2 if routed else 1
    figure, panels = plt.subplots(
        rows, 1, figsize=(8, 3.2 + 1.8 * (rows - 1)), dpi=150, sharex=True, squeeze=False, height_ratios=[2, 1][:rows]
    )
    losses = panels[0, 0]
    for name in ("loss_off", "loss_on"):
        _draw(losses, history, name)
    losses.set_ylabel("nats per answer token")
    losses.set_title(title, loc="left", fontsize=11)
    if routed:
        distillation = panels[1, 0]
        _draw(distillation, history, "loss_kd")
        distillation.set_ylabel("nats")
        marks = distillation.get_xaxis_transform()
        distillation.vlines(routed, 0, 0.07, transform=marks, color="#495057", linewidth=0.8, label="routed step")
    for panel in panels[:, 0]:
        low, high = panel.dataLim.intervaly
        if high < 1.0001 * low:  # values that are all alike give no axis, and matplotlib warns
            panel.set_ylim(low / 2, high * 2)
        panel.set_yscale("log")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", which="major", alpha=0.25)
        panel.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2)
    losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    losses.yaxis.set_major_formatter("{x:g}")
    last = panels[-1, 0]
    last.set_xlabel("optimizer step")
    last.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _draw(panel: plt.Axes, history: list[StepRecord], name: str) -> None:
    label, colour, dashes = _CURVES[name]
    points = [(r.step, max(value, _FLOOR)) for r in history if (value := getattr(r, name)) is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    panel.plot(steps, values, ".", color=colour, alpha=0.3, markersize=4)
    panel.plot(steps, _smoothed(steps, values, len(history) / 40), color=colour, linestyle=dashes, label=label)


def _smoothed(steps: tuple[int, ...], values: tuple[float, ...], width: float) -> list[float]:
    """Geometric mean of the neighbours under a Gaussian of `width` steps: no lag, and true to a logarithmic axis."""
    logs = [math.log(value) for value in values]
    smooth = []
    for centre in steps:
        weights = [math.exp(-0.5 * ((step - centre) / max(width, 0.3)) ** 2) for step in steps]
        mean = sum(weight * log for weight, log in zip(weights, logs, strict=True)) / sum(weights)
        smooth.append(math.exp(mean))
    return smooth

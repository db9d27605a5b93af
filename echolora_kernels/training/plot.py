"""The loss curves of a run as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .loop import StepRecord

_COLOURS = {"loss_off": "#1b6ca8", "loss_on": "#d1495b", "loss_kd": "#8d99ae"}
_LABELS = {"loss_off": "OFF  (what is deployed)", "loss_on": "ON  (with echo)", "loss_kd": "distillation"}


def plot_losses(history: list[StepRecord], title: str, path: Path) -> None:
    """Write a PNG with the smoothed OFF, ON and distillation losses, the raw points, and which steps were routed."""
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150)
    top = 0.0
    for name, colour in _COLOURS.items():
        points = [(r.step, value) for r in history if (value := getattr(r, name)) is not None]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        smooth = _smoothed(values)
        top = max(top, max(smooth) * 1.25)
        axes.plot(steps, values, ".", color=colour, alpha=0.25, markersize=4)
        axes.plot(steps, smooth, color=colour, linewidth=2)
        axes.annotate(
            _LABELS[name],
            (steps[-1], smooth[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
        )
    routed = [record.step for record in history if record.routed]
    if routed:
        axes.eventplot(routed, lineoffsets=-0.035 * top, linelengths=0.03 * top, colors="#6c757d", linewidths=0.8)
        axes.annotate(
            "routed steps",
            (history[-1].step, -0.035 * top),
            xytext=(8, 0),
            textcoords="offset points",
            color="#6c757d",
            va="center",
            fontsize=9,
            annotation_clip=False,
        )
    axes.set(xlabel="optimizer step", ylabel="nats per answer token", ylim=(-0.07 * top, top or 1.0))
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.2)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _smoothed(values: tuple[float, ...], weight: float = 0.85) -> list[float]:
    """Exponential moving average without the bias of its first value."""
    average, total, out = 0.0, 0.0, []
    for value in values:
        average, total = weight * average + (1 - weight) * value, weight * total + (1 - weight)
        out.append(average / total)
    return out

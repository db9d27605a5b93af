"""Results as pictures: a line a case, a mark an implementation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from .run import Row

_PAGE = 36  # cases in one picture
_OURS = {"color": "#d1495b", "fmt": "o"}
_OTHERS = [
    {"color": colour, "fmt": mark}
    for colour, mark in zip(
        ("#1b6ca8", "#5fa8d3", "#8d6a9f", "#e09f3e", "#2a9d8f", "#6c757d", "#9c6644", "#3d405b"),
        "sD^vPX*<",
        strict=True,
    )
]


def write(rows: Sequence[Row], environment: dict[str, str], folder: Path, roofline: bool) -> list[Path]:
    """A PNG for each kind, phase and base that has times: how often the base's time, or with `roofline` times and floor."""
    written = []
    timed = [row for row in rows if row.milliseconds is not None]
    for kind, phase, base in dict.fromkeys((row.kind, row.phase, row.base) for row in timed):
        own = [row for row in timed if (row.kind, row.phase, row.base) == (kind, phase, base)]
        own = [row for row in own if (row.floor if roofline else row.over_base) is not None]
        cases = list(dict.fromkeys(row.case for row in own))
        pages = [cases[start : start + _PAGE] for start in range(0, len(cases), _PAGE)]
        for number, page in enumerate(pages, 1):
            parts = ["roofline" if roofline else "bench", kind, phase, f"over-{base}"]
            name = "-".join(parts + ([str(number)] if len(pages) > 1 else []))
            path = folder / f"{name}.png"
            _draw([row for row in own if row.case in page], environment, path, roofline)
            written.append(path)
    return written


def _draw(rows: Sequence[Row], environment: dict[str, str], path: Path, roofline: bool) -> None:
    cases = list(dict.fromkeys(row.case for row in rows))
    names = list(dict.fromkeys(row.implementation for row in rows))
    figure, axes = plt.subplots(figsize=(9, 1.9 + 0.34 * len(cases)), dpi=150)
    for index in range(0, len(cases), 2):
        axes.axhspan(index - 0.5, index + 0.5, color="#f4f4f4", zorder=0)
    if roofline:
        floors = {row.case: row.floor or 0.0 for row in rows}
        ticks = axes.vlines([floors[case] for case in cases], *_ends(cases), color="#111111", linewidth=2.2)
        ticks.set_label("floor")
    elif rows[0].base in names:
        axes.axvline(1, color="#111111", linewidth=1, label=rows[0].base)
        names.remove(rows[0].base)
    ours = [name for name in names if "ours" in name]
    others = [name for name in names if name not in ours]
    styles = {name: _OTHERS[index % len(_OTHERS)] for index, name in enumerate(others)}
    for index, name in enumerate(ours):
        styles[name] = {**_OURS, "markerfacecolor": ("#d1495b", "white", "#f3b6bd")[index % 3]}
    for name in (*others, *ours):
        _mark(axes, cases, [row for row in rows if row.implementation == name], styles[name], roofline)
    axes.set_yticks(range(len(cases)), [_short(case, rows[0].kind) for case in cases], fontsize=8, family="monospace")
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    low, high = axes.get_xlim()
    subs = (1, 2, 5) if high / low > 8 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.set_xlabel(
        "milliseconds (median, bars between the quartiles)"
        if roofline
        else f"times {rows[0].base} (median, bars between the quartiles)",
        fontsize=9,
    )
    what = {"both": "forward + backward"}.get(rows[0].phase, rows[0].phase)
    axes.set_title(f"{rows[0].kind}, {what}: {_conditions(environment, rows[0])}", loc="left", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", which="both", alpha=0.2)
    axes.legend(
        frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.4, -0.45 / (0.5 + 0.34 * len(cases)))
    )
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def _mark(axes: Axes, cases: Sequence[str], rows: Sequence[Row], style: dict, roofline: bool) -> None:
    scale = [1.0 if roofline else (row.over_base or 0.0) / (row.milliseconds or 1.0) for row in rows]
    low, middle, high = (
        [(getattr(row, name) or 0.0) * by for row, by in zip(rows, scale, strict=True)]
        for name in ("low", "milliseconds", "high")
    )
    below, above = ([abs(end - at) for end, at in zip(ends, middle, strict=True)] for ends in (low, high))
    places = [cases.index(row.case) for row in rows]
    axes.errorbar(
        middle,
        places,
        xerr=[below, above],
        label=rows[0].implementation,
        markersize=5,
        alpha=0.9,
        elinewidth=1,
        **style,
    )


def _ends(cases: Sequence[str]) -> tuple[list[float], list[float]]:
    return [index - 0.42 for index in range(len(cases))], [index + 0.42 for index in range(len(cases))]


def _short(case: str, kind: str) -> str:
    return case.replace(f"/{kind}/", "/")


def _conditions(environment: dict[str, str], row: Row) -> str:
    hardware = environment["hardware"].partition(", CUDA")[0]
    return f"{environment['device']}, {hardware}, torch {row.torch.partition('+')[0]}, {row.date}"

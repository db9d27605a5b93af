"""The table, results.json and accuracy.png of an experiment's runs.

    python examples/commonsense/report.py results.json [results.json ...]

prints the tables again. The picture takes matplotlib. Intervals hold 95 % of a bootstrap that draws seeds and questions
anew; differences are paired, the same seed and the same question on both sides.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DRAWS = 4000
COMPARED_WITH = {"Echo-LoRA": "LoRA", "Echo-DoRA": "DoRA"}  # an ablation: with Echo-LoRA
METHODS = ("LoRA", "Echo-LoRA", "DoRA", "Echo-DoRA")
_COLOURS = {"LoRA": "#6c757d", "Echo-LoRA": "#1b6ca8", "DoRA": "#a68a64", "Echo-DoRA": "#d1495b"}


class Estimate(NamedTuple):
    """Percent, with the ends of the interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} ({self.low:.1f} to {self.high:.1f})"


def bootstrap(answers: dict[str, np.ndarray]) -> dict[str, Estimate]:
    """Per task, and under "mean" of all tasks: of values [seeds, questions], in percent."""
    random = np.random.default_rng(0)
    seeds = len(next(iter(answers.values())))
    chosen = random.integers(seeds, size=(DRAWS, seeds))
    means, draws = {}, {}
    for task, values in answers.items():
        count = values.shape[1]
        weights = random.multinomial(count, np.full(count, 1 / count), size=DRAWS) / count
        by_seed = values @ weights.T
        draws[task] = 100 * by_seed[chosen, np.arange(DRAWS)[:, None]].mean(axis=1)
        means[task] = 100 * float(values.mean())
    draws["mean"] = np.mean(list(draws.values()), axis=0)
    means["mean"] = statistics.fmean(means.values())
    return {task: Estimate(means[task], *np.quantile(draw, [0.025, 0.975])) for task, draw in draws.items()}


class Results:
    """What an experiment found: the final runs of each method or ablation, and the untrained model."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content, self.untrained = content, content["untrained"]
        self.tasks = list(self.untrained["right"])
        self.runs: dict[str, list[dict[str, Any]]] = {}
        for run in content["runs"]:
            self.runs.setdefault(run["name"], []).append(run)
        for runs in self.runs.values():
            runs.sort(key=lambda run: run["seed"])

    def answers(self, name: str, seeds: set[int] | None = None) -> dict[str, np.ndarray]:
        """task -> 1 where the answer is right, [seeds, questions]."""
        runs = [run for run in self.runs[name] if seeds is None or run["seed"] in seeds]
        return {task: np.array([[float(bit) for bit in run["right"][task]] for run in runs]) for task in self.tasks}

    def difference(self, name: str) -> tuple[str, Estimate] | None:
        """The method it is compared with, and how many percentage points more are right, mean of the tasks."""
        other = COMPARED_WITH.get(name, None if name in METHODS else "Echo-LoRA")
        if other not in self.runs:
            return None
        seeds = {run["seed"] for run in self.runs[name]} & {run["seed"] for run in self.runs[other]}
        if not seeds:
            return None
        ours, theirs = self.answers(name, seeds), self.answers(other, seeds)
        return other, bootstrap({task: ours[task] - theirs[task] for task in self.tasks})["mean"]

    def losses(self, name: str) -> list[float]:
        """Of each seed, nats a token of the right answers, mean of the tasks."""
        return [statistics.fmean(run["loss"].values()) for run in self.runs[name]]

    def table(self) -> str:
        header = ["", *self.tasks, "mean", "difference, points", "nats a token", "lr", "seeds"]
        bits = self.untrained["right"]
        shares = [100 * bits[task].count("1") / len(bits[task]) for task in self.tasks]
        nats = statistics.fmean(self.untrained["loss"].values())
        untrained = [*(f"{share:.1f}" for share in (*shares, statistics.fmean(shares))), "", f"{nats:.3f}", "", ""]
        frequent = [100 * self.content["conditions"]["questions"][task]["most_frequent"] for task in self.tasks]
        most = [*(f"{share:.1f}" for share in (*frequent, statistics.fmean(frequent))), "", "", "", ""]
        rows = [["the most frequent answer", *most], ["untrained", *untrained]]
        for name, runs in self.runs.items():
            estimates, losses, difference = bootstrap(self.answers(name)), self.losses(name), self.difference(name)
            spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
            rows.append(
                [
                    name,
                    *(f"{estimates[task].mean:.1f}" for task in self.tasks),
                    str(estimates["mean"]),
                    f"{difference[1]} from {difference[0]}" if difference else "",
                    f"{statistics.fmean(losses):.4f}{spread}",
                    f"{runs[0]['lr']:g}",
                    str(len(runs)),
                ]
            )
        lines = [header, ["---"] * len(header), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def plot(self, path: Path) -> None:
        """Write a PNG: accuracy of each method with its seeds, and the paired differences."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        names = list(self.runs)
        compared = [(name, found) for name in names if (found := self.difference(name))]
        height = 1.2 + 0.38 * max(len(names), len(compared))
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, height), dpi=150, width_ratios=[3, 2])
        for row, name in enumerate(names):
            colour = _COLOURS.get(name, "#8d6a9f")
            by_task = self.answers(name).values()
            seeds = [100 * statistics.fmean(values) for values in zip(*(v.mean(axis=1) for v in by_task), strict=True)]
            left.plot(seeds, [row] * len(seeds), "o", color=colour, alpha=0.3, markersize=4)
            _draw(left, row, bootstrap(self.answers(name))["mean"], colour)
        for row, (name, (_, estimate)) in enumerate(compared):
            _draw(right, row, estimate, _COLOURS.get(name, "#8d6a9f"))
        right.axvline(0, color="#495057", linewidth=0.8)
        _label(left, names, "exact match, %, mean of the tasks")
        _label(right, [f"{name} over {other}" for name, (other, _) in compared], "difference, percentage points")
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)


def _draw(panel: Any, row: int, estimate: Estimate, colour: str) -> None:
    panel.plot([estimate.low, estimate.high], [row, row], color=colour, linewidth=2)
    panel.plot(estimate.mean, row, "D", color=colour, markersize=6)


def _label(panel: Any, names: list[str], what: str) -> None:
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xlabel(what)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="x", alpha=0.25)


def write_report(folder: Path, conditions: dict[str, Any], untrained: dict[str, Any], runs: list[dict]) -> str:
    """results.json and, where there is matplotlib, accuracy.png in `folder`; returns the table."""
    order = {name: index for index, name in enumerate(METHODS)}
    runs = sorted(runs, key=lambda run: (order.get(run["name"], len(order)), run["name"], run["seed"]))
    told = ("settings", "questions")  # the conditions say it
    kept = [{key: value for key, value in run.items() if key not in told} for run in (untrained, *runs)]
    content = {"conditions": conditions, "untrained": kept[0], "runs": kept[1:]}
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    results = Results(content)
    if importlib.util.find_spec("matplotlib") is None:
        return f"{results.table()}\nno accuracy.png: matplotlib is not installed"
    results.plot(folder / "accuracy.png")
    return results.table()


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(Results(json.loads(Path(argument).read_text())).table())

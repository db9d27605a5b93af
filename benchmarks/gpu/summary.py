"""What a run of gpu_run.sh found, in less than a hundred lines.

python benchmarks/gpu/summary.py LOGS TUNED
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MOST_FAILURES, MOST_PICKS, MOST_CASES = 12, 16, 24


def parts(logs: Path) -> Iterator[str]:
    """How each part went."""
    for line in (logs / "parts.tsv").read_text().splitlines():
        name, how, seconds, log = line.split("\t")
        yield f"  {name:<16} {how:<34} {seconds:>4} s  {log}"


def counts(logs: Path) -> Iterator[str]:
    """What the smoke part, pytest and the training say about themselves."""
    for log in sorted(logs.glob("*.log")):
        lines = log.read_text(errors="replace").splitlines()
        if log.stem.startswith("smoke"):
            yield from (f"  {log.stem}: {line}" for line in lines if re.search(r"\d+ passed, \d+ failed$", line))
            yield from (f"  {log.stem}: {line}" for line in lines if line.startswith("---") and "status 0" not in line)
        elif log.stem.startswith(("tests", "sanitizer")):
            yield from (f"  {log.stem}: {line.strip('= ')}" for line in lines[-1:])
        elif log.stem.startswith(("accuracy", "host")):
            yield from (f"  {log.stem}: {line}" for line in lines if line.startswith(("ok ", "FAILED ", "| ")))


def failures(logs: Path) -> Iterator[str]:
    """The first lines that say so."""
    found = [
        f"  {log.stem}: {line}"[:200]
        for log in sorted(logs.glob("*.log"))
        for line in log.read_text(errors="replace").splitlines()
        if re.match(r"FAILED|ERROR|.*\bWRONG\b", line)
    ]
    yield from found[:MOST_FAILURES]
    if len(found) > MOST_FAILURES:
        yield f"  and {len(found) - MOST_FAILURES} more"


def picks(tuned: Path) -> Iterator[str]:
    """Each product's fastest way, at the largest number of rows, over the fastest of the other candidates."""
    for path in sorted(tuned.glob("*.json")):
        table = json.loads(path.read_text())
        rows = table["entries"]
        yield f"  {table['device']}: {len(rows)} entries; at the most rows, the pick and the best of the others over it"
        largest = [row for row in rows if row["m"] == max(row["m"] for row in rows)]
        for row in largest[:MOST_PICKS]:
            times = {way: median for way, (median, *_) in row["microseconds"].items()}
            best = times[f"{row['candidate']} {row['tile']}"]
            others: dict[str, float] = {}
            for way, median in times.items():
                candidate = way.partition(" ")[0]
                if candidate != row["candidate"]:
                    others[candidate] = min(median / best, others.get(candidate, float("inf")))
            rest = ", ".join(f"{name} {ratio:.2f}" for name, ratio in others.items())
            sizes = f"M {row['m']} N {row['n']} K {row['k']} r {row['rank']}"
            method = "dora" if row["dora"] else "lora"
            yield f"  {row['product']:<14} {method} {sizes:<30} {row['candidate']} {row['tile']}: {best:.0f} us; {rest}"


def ratios(logs: Path) -> Iterator[str]:
    """Of each benchmark case, all implementations over the base, and peak memory."""
    cases: dict[tuple[str, str], list[str]] = {}
    for path in sorted(logs.glob("*/bench.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                said = cases.setdefault((row["case"], row["phase"]), [])
                if row["status"] != "ok":
                    if row["status"] == "wrong":
                        said.append(f"{row['implementation']} WRONG")
                    continue
                over = f" {float(row['over_base']):.2f}x" if row["over_base"] else ""
                peak = f" {float(row['peak_mb']):.0f}MB" if row["peak_mb"] else ""
                said.append(f"{row['implementation']}{over} ({float(row['milliseconds']):.3g} ms{peak})")
    lines = [f"  {case} {phase}: {', '.join(said)}" for (case, phase), said in cases.items() if said]
    yield from lines[:MOST_CASES]
    if len(lines) > MOST_CASES:
        yield f"  and {len(lines) - MOST_CASES} more"


def main() -> None:
    logs, tuned = map(Path, sys.argv[1:])
    sections = {
        "environment": lambda: (f"  {line}"[:240] for line in (logs / "environment.txt").read_text().splitlines()),
        "parts (log in logs.tar.gz)": lambda: parts(logs),
        "checks and tests": lambda: counts(logs),
        "failures": lambda: failures(logs),
        "tuned": lambda: picks(tuned),
        "over the base, and in milliseconds": lambda: ratios(logs),
    }
    for title, lines in sections.items():
        print(title)
        try:
            for line in lines():
                print(line)
        except (OSError, ValueError, KeyError) as error:  # a file that a part left half written
            print(f"  cannot be read: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()

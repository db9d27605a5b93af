"""What two runs of the same cases, as PEFT computes them and fused, say together; as tables and as JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

# in the order of the table
OUTCOMES = {
    "passed": "fused, and passes as it does without",
    "declined": "`fuse` leaves every LoRA layer of it to PEFT, says why, and it passes",
    "failed": "passes without `fuse` and fails with it, or an output differs from PEFT's",
    "needs a hub": "loads models or data that were not to be had",
    "fails without fuse": "fails here whether models are fused or not: versions of libraries, stand-ins for models",
    "skipped": "PEFT's own condition, such as a GPU or another package, is not met",
}

MOST_REASONS = 12  # in the tables; the JSON has them all

Cases = dict[str, dict[str, Any]]


def judge(plain: dict[str, Any], fused: dict[str, Any] | None) -> tuple[str | None, str]:
    """Outcome and reason of one case; None where it makes no LoRA layer."""
    if plain["outcome"] == "skipped":
        return "skipped", plain["why"]
    if plain["hub"] or (fused is not None and fused["hub"]):
        return "needs a hub", plain["why"]
    if fused is None:
        return "failed", "did not run"
    if plain["outcome"] == "failed":
        return "fails without fuse", plain["why"]
    if not plain["layers"] and not fused["layers"]:
        return None, ""
    if fused["outcome"] != "passed":
        return "failed", fused["why"]
    if fused["difference"] > 1:
        return "failed", f"an output differs from PEFT's, {fused['difference']:.3g} times what is allowed"
    if fused["fused"]:
        return "passed", "" if fused["ours"] else _most(fused["left"], "no forward pass through a fused layer")
    return "declined", _most(fused["declined"], "its layers are made outside a model, or are not PEFT's")


def compare(plain: Cases, fused: Cases) -> Cases:
    """name -> file, outcome, reason and counts of every case that makes a LoRA layer or might have."""
    found = {}
    for name, case in plain.items():
        outcome, reason = judge(case, fused.get(name))
        if outcome is not None:
            other = fused.get(name, {})
            counts = {key: other.get(key, 0) for key in ("ours", "together", "peft", "difference")}
            found[name] = {"file": _file(name), "outcome": outcome, "reason": reason, **counts}
    missing = fused.keys() - plain.keys()
    assert not missing, f"ran fused alone: {sorted(missing)[:3]}"
    return found


def summary(cases: Cases) -> dict[str, Any]:
    """Counts; `calls` are those of LoRA layers in the cases that passed."""
    passed = [case for case in cases.values() if case["outcome"] == "passed"]
    return {
        "counts": {outcome: sum(case["outcome"] == outcome for case in cases.values()) for outcome in OUTCOMES},
        "through_ours": sum(case["ours"] > 0 for case in passed),
        "calls": {key: sum(case[key] for case in passed) for key in ("ours", "together", "peft")},
        "largest_difference": max((case["difference"] for case in passed), default=0.0),
    }


def tables(cases: Cases) -> str:
    """Markdown: all outcomes, files, and the reasons behind every outcome but a plain pass."""
    told = summary(cases)
    calls = told["calls"]
    left = [case["reason"] for case in cases.values() if case["outcome"] == "passed" and case["reason"]]
    parts = [
        _table(
            ("outcome", "cases", "what it says"),
            [(name, told["counts"][name], meaning) for name, meaning in OUTCOMES.items()],
        ),
        f"{told['through_ours']} of the {told['counts']['passed']} that pass call our operators, "
        f"{calls['ours']} times in all, {calls['together']} of them in groups; of each output that was computed without "
        f"dropout the largest difference from PEFT's own is {told['largest_difference']:.2g} times what is allowed. The "
        f"others save, load or inspect, or: {_listed(left)}.",
        _table(
            ("file", *OUTCOMES),
            [
                (file, *(_count(cases, file, outcome) or "" for outcome in OUTCOMES))
                for file in sorted({case["file"] for case in cases.values()})
            ],
        ),
    ]
    for outcome in list(OUTCOMES)[1:]:
        chosen = {name: case["reason"] for name, case in cases.items() if case["outcome"] == outcome}
        if outcome == "failed":
            rows = [(_cell(f"{name}: {reason}"), 1) for name, reason in chosen.items()]
        else:
            rows = [(_cell(reason), count) for reason, count in Counter(chosen.values()).most_common()]
            if outcome != "declined" and len(rows) > MOST_REASONS:
                others = rows[MOST_REASONS:]
                rows[MOST_REASONS:] = [(f"{len(others)} other reasons", sum(count for _, count in others))]
        if rows and outcome != "needs a hub":
            parts.append(_table((outcome, "cases"), rows))
    return "\n\n".join(parts) + "\n"


def _file(name: str) -> str:
    return name.partition("::")[0].rpartition("/")[2]


def _count(cases: Cases, file: str, outcome: str) -> int:
    return sum(case["file"] == file and case["outcome"] == outcome for case in cases.values())


def _most(reasons: dict[str, int], otherwise: str) -> str:
    return "; ".join(sorted(reasons)) or otherwise


def _listed(reasons: list[str]) -> str:
    return ", ".join(f"{reason} ({count})" for reason, count in Counter(reasons).most_common()) or "nothing"


def _cell(text: str) -> str:
    text = text.removeprefix("Skipped: ").replace("|", "\\|").replace("<", "\\<")
    return text if len(text) <= 160 else text[:160] + " ..."


def _table(head: tuple, rows: list[tuple]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)

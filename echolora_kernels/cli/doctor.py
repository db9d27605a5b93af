"""`echolora doctor`."""

from __future__ import annotations

import json
import platform
from typing import Annotated, Any

import torch
import typer
from typer import Option

from .. import __version__, backends, native
from ..backends import BACKENDS
from ..environment import PACKAGES, installed, processor, variables_set
from ..verification.run import plan
from .show import interruptible
from .verify import as_json, left_out, lines, run, summary


def doctor(
    json_output: Annotated[bool, Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say what runs here and why, and test it in less than a minute: text to paste into a bug report.

    Exit status 1 where the self-test, which is the quick part of echolora verify, does not pass.
    """
    facts = _facts()
    if not json_output:
        typer.echo("\n".join(_text(facts)))
    jobs, not_run = plan(quick=True)
    with interruptible():
        rows = run(jobs)
    if json_output:
        typer.echo(json.dumps({**facts, "self_test": as_json(rows, not_run)}, indent=2))
    else:
        typer.echo(
            "\n".join(["\nself-test", *(f"  {line}" for line in (*left_out(not_run), *lines(rows), summary(rows)))])
        )
    if not all(row.passed for row in rows):
        raise typer.Exit(1)


def _facts() -> dict[str, Any]:
    devices = {"cpu": f"{processor()}, {torch.get_num_threads()} threads of torch"}
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{of.name}, sm_{of.major}{of.minor}, {of.total_memory / 2**30:.0f} GiB"
    return {
        "versions": {
            "echolora_kernels": __version__,
            "python": f"{platform.python_version()} on {platform.platform()}",
            "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
            **{name: installed(name) for name in PACKAGES},
        },
        "devices": devices,
        "compiled_library": _library(),
        "backends": backends.availability(),
        "operators": {
            f"{operator} on {kind}": _choice(operator, kind)
            for kind in dict.fromkeys(name.partition(":")[0] for name in devices)
            for operator in dict.fromkeys(operator for backend in BACKENDS for operator in backend.operators)
        },
        "environment": variables_set(),
    }


def _text(facts: dict[str, Any]) -> list[str]:
    """A heading and indented lines for each part; no frames and no colours, which paste badly."""
    printed: list[str] = []
    for name, part in facts.items():
        printed.append(("" if not printed else "\n") + name.replace("_", " "))
        if name == "operators":
            part = {operator: _sentence(choice) for operator, choice in part.items()}
        width = max(map(len, part), default=0)
        printed += [f"  {key:<{width}}  {value}" for key, value in part.items()] or ["  nothing of it is set"]
    return printed


def _sentence(choice: dict[str, str]) -> str:
    others = "; ".join(f"not {name}: {reason}" for name, reason in choice.items() if reason != "chosen")
    chosen = [name for name, reason in choice.items() if reason == "chosen"]
    return f"{chosen[0]} ({others})" if chosen else f"none ({others})"


def _choice(operator: str, kind: str) -> dict[str, str]:
    try:
        return backends.why(operator, torch.device(kind))
    except (ValueError, backends.BackendUnavailable) as error:  # what ECHOLORA_BACKEND asks for
        return {"any": str(error)}


def _library() -> dict[str, str]:
    if (reason := native.why_unavailable()) is not None:
        return {"state": reason}
    return {
        "file": str(native.path()),
        "processor": native.why_no_instructions() or native.cpu_instructions(),
        "GPUs": " ".join(native.cuda_architectures()) or "built without CUDA",
    }

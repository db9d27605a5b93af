"""Running Python beside the tests: the library reads its environment once in a process."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment without what is pytest's own, with `changes`; None takes a variable away.

    The package is this checkout's, wherever else one may be installed.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    kept["PYTHONPATH"] = str(ROOT)
    kept |= {name: value for name, value in changes.items() if value is not None}
    return {name: value for name, value in kept.items() if changes.get(name, "") is not None}


def run(command: list[str], cwd: Path = ROOT, **changes: str | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=environment(**changes), capture_output=True, text=True, timeout=280)


def python(code: str, **changes: str | None) -> str:
    """What a program prints; it must end well."""
    done = run([sys.executable, "-c", code], **changes)
    assert done.returncode == 0, done.stderr
    return done.stdout


def passed(*arguments: str, **changes: str | None) -> int:
    """How many tests a run of pytest has passed; none may have failed."""
    done = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments], **changes)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout).group(1))


@functools.cache
def instruction_sets() -> list[str]:
    """Those that this processor can run, as the library lists them for a name that it does not know."""
    code = "from echolora_kernels import native; assert not native.why_unavailable(); print(native.cpu_instructions())"
    done = run([sys.executable, "-c", code], ECHOLORA_CPU_ISA="nonsense")
    assert done.returncode != 0, "an unknown instruction set was accepted"
    return re.search(r"ECHOLORA_CPU_ISA: got nonsense, wants one of (.+)", done.stderr).group(1).split(", ")

"""`benchmarks/gpu_run.sh` without a GPU: what it refuses, and that a part that fails stops no other."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_run.sh"


def run(*arguments, cwd=None):
    return subprocess.run([SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=200, cwd=cwd)


def python_whose_smoke_test(does, folder):
    """A Python that does this in place of the smoke test, and else what this one does."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *smoke.py*) {does} ;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def only_smoke(python, folder):
    """A dry run of the smoke part in 29 seconds."""
    return run("--dry", "--no-build", "--output", folder, "--python", python, "--part", "smoke", "--minutes", "0.5")


@pytest.mark.parametrize(("arguments", "words"), [
    ((), ["--output", "folder"]),
    (("--output", "{}", "--part", "smoke,speed"), ["--part", "'speed'", "smoke,tune,layers"]),
    (("--output", "{}", "--minutes", "few"), ["--minutes", "'few'"]),
    (("--output", "{}", "--wheels", "/no/such"), ["--wheels", "/no/such"]),
    (("--output", "{}", "--data", "/no/such"), ["--model", "--data", "both"]),
    (("--output", "{}", "--python", "/no/such"), ["--python", "/no/such"]),
    (("--output", "{}", "--speed", "9"), ["--speed", "no such option"]),
    (("--output",), ["--output", "value"]),
    (("--output", "{}", "--python", sys.executable), ["no GPU", "--dry"]),
])  # fmt: skip
def test_what_it_refuses(tmp_path, arguments, words):
    if torch.cuda.is_available() and "no GPU" in words:
        pytest.skip("there is a GPU")
    done = run(*(word.format(tmp_path / "out") for word in arguments))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("gpu_run.sh: ") and all(word in done.stderr for word in words), done.stderr


def test_a_failing_part_stops_no_other(tmp_path):
    """A Python whose smoke test fails; tuning goes the whole way."""
    python_whose_smoke_test('echo "FAILED on purpose"; exit 3', tmp_path)
    out = tmp_path / "out"
    options = ("--dry", "--no-build", "--python", "./python", "--part", "smoke,tune,sanitizer")
    done = run(*options, "--output", "out", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    summary = (out / "summary.txt").read_text()
    assert summary in done.stdout and len(summary.splitlines()) < 100
    parts = {line.split()[0]: line.split()[1] for line in summary.splitlines() if line.endswith(".log")}
    assert parts == {"smoke": "FAILED", "tune": "ok"}
    assert "smoke: FAILED on purpose" in summary and "skipped: it wants pytest" in summary
    assert len(json.loads((out / "cpu.json").read_text())["entries"]) == 12 and "12 entries" in summary
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert {"logs/smoke.log", "logs/tune.log", "tuned/cpu.json"} <= set(logs.getnames())


def test_a_part_is_stopped_by_its_box(tmp_path):
    done = only_smoke(python_whose_smoke_test("exec sleep 100", tmp_path), tmp_path)
    assert done.returncode == 0 and "stopped after 11 s" in done.stdout, done.stdout + done.stderr
    assert "not finished: smoke\tstopped" in done.stdout


def test_a_part_that_is_killed_has_failed(tmp_path):
    """As for want of memory; nobody had stopped it."""
    done = only_smoke(python_whose_smoke_test("kill -9 $$", tmp_path), tmp_path)
    assert done.returncode == 1 and "FAILED (137)" in done.stdout, done.stdout + done.stderr


def test_what_a_hanging_check_leaves_of_the_others(tmp_path):
    """Each dtype is a process of its own: one that hangs until all are stopped hides no failure."""
    script = tmp_path / "smoke.py"
    source = (ROOT / "benchmarks" / "gpu" / "smoke.py").read_text()
    child = 'import sys, time\nif "float32" in sys.argv: print("FAILED on purpose"); sys.exit(1)\ntime.sleep(100)\n'
    (tmp_path / "child.py").write_text(child)
    script.write_text(source.replace("[sys.executable, __file__]", f"[sys.executable, {str(tmp_path / 'child.py')!r}]"))
    command = [
        "timeout",
        "-s",
        "INT",
        "6",
        sys.executable,
        script,
        "all",
        "--backend",
        "cpp",
        "--dtype",
        "float32",
        "float16",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0 and "FAILED on purpose" in done.stdout
    assert "checks-float32, exit status 1" in done.stdout and "checks-float16, exit status" in done.stdout


def test_what_a_layer_takes_of_the_host():
    """A line for the frozen linear, PEFT's and ours, with times."""
    command = [sys.executable, ROOT / "benchmarks" / "gpu" / "host.py", "--shape", "16x32x24", "--calls", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[1].partition(",")[0] for row in rows][:3] == ["frozen", "PEFT", "fused"]
    assert all(0 < float(row[2]) <= float(row[3]) for row in rows)

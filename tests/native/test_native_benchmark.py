"""The benchmark's own rules: everything is checked before it is timed, and what is wrong gets no time."""

import json
import sys

import pytest
import torch
from native_cases import ROOT, run

sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_loss

bench_cpu = pytest.importorskip("bench_cpu", reason="the benchmark compares with PEFT")


def test_the_table(library, tmp_path):
    output = tmp_path / "table.json"
    command = [sys.executable, "benchmarks/bench_cpu.py", "--threads", "1", "--rounds", "2", "--rank", "4"]
    done = run([*command, "--shapes", "24x40x32", "16x32x48", "--output", str(output)])
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads(output.read_text())
    assert table["environment"]["threads"] == "1" and table["environment"]["cpu"] in done.stdout
    assert len(table["results"]) == 2 * 2 * 3
    for row in table["results"]:
        names = {"frozen", "peft", "reference", "ours"} | ({"addmm"} if row["method"] == "lora" else set())
        assert row["milliseconds"].keys() == names and not row["errors"]
        assert all(value > 0 for value in row["milliseconds"].values())


@pytest.mark.parametrize("name", ["peft", "ours", "addmm"])
def test_no_time_is_given_to_what_is_wrong(library, monkeypatch, name):
    made = bench_cpu.implementations

    def damaged(layer):
        forwards = made(layer)
        right, leaves = forwards[name], getattr(forwards[name], "leaves", None)
        wrong = lambda: right() * 1.001  # noqa: E731
        if leaves:
            wrong.leaves = leaves
        return forwards | {name: wrong}

    monkeypatch.setattr(bench_cpu, "implementations", damaged)
    float32, _ = bench_cpu.KINDS[0]
    result = bench_cpu.compare(bench_cpu.make_layer((24, 40, 32), 4, False, float32, float32), rounds=1)
    assert name not in result["milliseconds"] and "is off by" in result["errors"][name]
    assert bench_cpu.cell(result, name) == "wrong" and len(result["milliseconds"]) == 4


def test_shapes_by_name_and_by_size():
    assert bench_cpu.shape_of("smollm2-up") == ("smollm2-up", (1024, 576, 1536))
    assert bench_cpu.shape_of("3x4x5") == ("3x4x5", (3, 4, 5))
    with pytest.raises(bench_cpu.argparse.ArgumentTypeError, match="got '3x4', wants ROWSxD_INxD_OUT or one of square"):
        bench_cpu.shape_of("3x4")


def test_the_losses(library, tmp_path):
    output = tmp_path / "losses.json"
    command = [sys.executable, "benchmarks/bench_loss.py", "--threads", "1", "--rounds", "1"]
    done = run([*command, "--shapes", "8x16x500", "--output", str(output)])
    assert done.returncode == 0, done.stdout + done.stderr
    for row in json.loads(output.read_text()):
        assert row["milliseconds"].keys() == row["peaks"].keys() == bench_loss.IMPLEMENTATIONS.keys()
        assert not row["errors"] and all(value > 0 for value in row["milliseconds"].values())


@pytest.mark.parametrize("name", [*bench_loss.FROM_LOGITS, "hidden: ours"])
def test_no_time_is_given_to_losses_that_are_wrong(library, monkeypatch, name):
    right = bench_loss.IMPLEMENTATIONS[name]
    monkeypatch.setitem(bench_loss.IMPLEMENTATIONS, name, lambda p: [result * 1.001 for result in right(p)])
    assert "off by" in bench_loss.wrong(name, bench_loss.make_problem((8, 16, 500), torch.float32), torch.float32)

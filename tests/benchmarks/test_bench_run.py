"""What is wrong gets no time, and everything else gets a row with all its columns."""

import contextlib
import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_cases import CPU, custom_case, tiny_bench, tiny_cases

from echolora_kernels.benchmarks import command, events, layers, memory, plots, report, timing
from echolora_kernels.benchmarks.check import check
from echolora_kernels.benchmarks.problem import Implementation, why_no
from echolora_kernels.method import model

ROOT = Path(__file__).resolve().parents[2]
PLAIN = {"method": ["lora"], "rank": [16], "dropout": [0.0], "echo": [False], "dtype": ["fp32"]}


def _damaged(monkeypatch, name, change):
    made = layers.build

    def build(case, device):
        problem = made(case, device)
        right = problem.implementations[name]
        wrong = dataclasses.replace(right, forward=lambda: change(right.forward()))
        return dataclasses.replace(problem, implementations={**problem.implementations, name: wrong})

    monkeypatch.setattr(layers, "build", build)


@pytest.mark.parametrize("name", ["reference", "addmm", "ours-cpp"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_time_is_given_to_what_is_wrong(monkeypatch, name, dtype):
    case = custom_case("24x40x32+16+8", **{**PLAIN, "dtype": [dtype]})
    if name not in case.build(CPU).implementations:
        pytest.skip("no compiled library")
    _damaged(monkeypatch, name, lambda outputs: [outputs[0], outputs[1] * 1.05, *outputs[2:]])
    rows = tiny_bench(("forward", "both")).run(case)
    (wrong,) = [row for row in rows if row.status == "wrong"]
    assert wrong.implementation == name and wrong.milliseconds is None and "1 is" in wrong.why
    timed = {row.implementation for row in rows if row.status == "ok"}
    assert "frozen" in timed and name not in timed and len(timed) >= 2


def test_an_error_is_a_row(monkeypatch):
    def fail(outputs):
        raise RuntimeError("no such\nkernel")

    _damaged(monkeypatch, "addmm", fail)
    (row,) = [row for row in tiny_bench().run(custom_case(**PLAIN)) if row.status != "ok" and "kernel" in row.why]
    assert (row.implementation, row.status, row.why) == ("addmm", "wrong", "RuntimeError: no such kernel")


def test_a_missing_gradient_is_wrong(monkeypatch):
    _damaged(monkeypatch, "reference", lambda outputs: [outputs[0].detach().requires_grad_()])
    (row,) = [row for row in tiny_bench().run(custom_case(**PLAIN)) if row.status == "wrong"]
    assert row.implementation == "reference"


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_layers_are_right(method, dtype, dropout):
    filters = {"method": [method], "rank": [16], "dropout": [dropout], "echo": [True], "dtype": [dtype]}
    rows = tiny_bench(implementations=["peft", "peft-bf16", "addmm", "reference", "ours*"]).run(
        custom_case("64x40x96+80", **filters)
    )
    assert not [row.why for row in rows if row.status == "wrong"]
    timed = [row for row in rows if row.status == "ok"]
    assert {"frozen", "peft", "reference"} <= {row.implementation for row in timed}
    assert all(row.milliseconds > 0 and row.over_base > 0 and row.floor > 0 for row in timed)
    base = next(row for row in timed if row.implementation == "frozen")
    assert all(row.added == pytest.approx(row.milliseconds - base.milliseconds) for row in timed)


@pytest.mark.parametrize("kind", ["loss", "networks", "quantised"])
def test_the_other_kinds_are_right(monkeypatch, kind):
    if kind == "quantised":
        pytest.importorskip("bitsandbytes")
    for case in tiny_cases(monkeypatch, kind=[kind], rank=[16] if kind == "quantised" else []):
        rows = tiny_bench(("forward", "backward"), implementations=()).run(case)
        assert not [row.why for row in rows if row.status == "wrong"]
        assert len({row.implementation for row in rows if row.status == "ok"}) >= 2
        assert all(row.floor for row in rows if row.status == "ok")


def test_steps_are_right_and_a_wrong_one_is_found(monkeypatch):
    (case,) = tiny_cases(
        monkeypatch, kind=["step"], method=["lora"], dtype=["fp32"], cases=["*/boolq/*/checkpointed/*"]
    )
    why_not, packed_step = model._FORMS["packed"]
    taken = []
    monkeypatch.setitem(model._FORMS, "packed", (why_not, lambda *args: taken.append(1) or packed_step(*args)))
    rows = tiny_bench(rounds=1).run(case)
    assert len(taken) >= 2 * 3  # checked, warm, timed; by PEFT's layers and by ours
    forms = {f"{form}-{kind}" for form in ("plain", "two-pass", "packed") for kind in ("peft", "ours")}
    assert {row.implementation for row in rows if row.status == "ok"} == forms
    problem = case.build(CPU)
    packed = problem.implementations["packed-ours"]
    wrong = dataclasses.replace(packed, forward=lambda: [packed.forward()[0] * 1.001])
    assert "times plain torch's" in check([wrong]).problem


def test_a_single_number_is_judged_in_units_of_what_it_was_computed_in():
    """A loss of a bfloat16 model with float32 adapters: one draw of an error says little beside another."""
    leaf = torch.ones(2, requires_grad=True)
    exact, plain = torch.tensor(3.0, dtype=torch.float64), torch.tensor(3.0 + 1e-5)
    known = {"y0": plain, "dleaf": torch.ones(2)}, {"y0": exact, "dleaf": torch.ones(2, dtype=torch.float64)}

    def judged(error, dtype):
        forward = lambda: [leaf.sum() + 1.0 + error]  # noqa: E731
        return check([Implementation(forward, {"leaf": leaf}, None, lambda: known, computed_in=dtype)]).problem

    assert judged(0.01, torch.bfloat16) is None
    assert "y0" in judged(0.01, None) and "y0" in judged(0.2, torch.bfloat16)


def test_one_wrong_gradient_among_many_is_found():
    torch.manual_seed(0)
    exact = {f"dparameters {index}": torch.randn(100, dtype=torch.float64) for index in range(200)}
    plain = {name: (value * (1 + 0.01 * torch.randn(100))).float() for name, value in exact.items()}
    leaves = {name[1:]: torch.zeros(100, requires_grad=True) for name in exact}

    def judged(factor):
        ours = {name: (value * (1 + 0.01 * torch.randn(100))).float() for name, value in exact.items()}
        ours["dparameters 7"] *= factor
        products = lambda: [sum((leaves[name[1:]] * value).sum() for name, value in ours.items())]  # noqa: E731
        known = plain | {"y0": torch.zeros(())}, exact | {"y0": torch.zeros((), dtype=torch.float64)}
        return check([Implementation(products, leaves, None, lambda: known)]).problem

    assert judged(1.0) is None and "rms error of dparameters 7" in judged(1.1)


def test_schema_and_files(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command.rates, "measure", lambda *_: tiny_bench().rates)
    flags = "--shape 24x40x32 --method lora --rank 8 --dropout 0 --dtype fp32 bf16 --echo off --rounds 2 --phase forward both"
    flags += " --warm --no-memory --roofline --implementations addmm --output"
    assert command.main([*flags.split(), str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    assert "floor ms" in printed and "custom/layer/24x40x32/lora/r8/p0/plain/bf16" in printed
    with (tmp_path / "new" / "bench.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == report.COLUMNS
    assert {(line["phase"], line["implementation"]) for line in lines if line["status"] == "ok"} >= {
        ("forward", "addmm"),
        ("both", "frozen"),
    }
    for line in lines:
        assert line["device"] and line["torch"] == torch.__version__ and line["date"]
    content = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert len(content["rows"]) == len(lines) and content["environment"]["command"].startswith("echolora bench --shape")
    assert (tmp_path / "new" / "roofline-layer-both-over-frozen.png").stat().st_size > 10_000


def test_compiled_layers_are_checked_without_dropout():
    rows = tiny_bench(implementations=["peft-compiled"]).run(custom_case(**{**PLAIN, "dropout": [0.1]}))
    (row,) = [row for row in rows if row.implementation == "peft-compiled"]
    if row.status == "not run":
        pytest.skip(row.why)
    assert (row.status, row.why) == ("ok", "checked without dropout") and row.milliseconds > 0


def test_what_cannot_run_says_why_and_the_time_limit_ends_a_run(monkeypatch):
    monkeypatch.setattr(layers.baselines, "why_no", lambda package: f"{package} is not installed")
    rows = tiny_bench(implementations=["peft*", "unsloth"]).run(custom_case(**PLAIN))
    reasons = {row.implementation: row.why for row in rows if row.status == "not run"}
    assert reasons == {
        "peft": "peft is not installed",
        "peft-compiled": "peft is not installed",
        "unsloth": "unsloth is not installed",
    }
    (late,) = tiny_bench(stop_at=0.0).run(custom_case(**PLAIN))
    assert (late.status, late.why) == ("not run", "the time limit was reached")


def test_a_package_that_cannot_be_imported_is_one_that_is_not_there(monkeypatch, tmp_path):
    (tmp_path / "of_a_gpu.py").write_text("raise NotImplementedError('wants\\na GPU')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert why_no("of_a_gpu") == "of_a_gpu cannot be imported: NotImplementedError: wants a GPU"
    assert why_no("nowhere_at_all") == "nowhere_at_all is not installed" and why_no("torch") is None


def test_want_of_memory_is_no_wrong_result(monkeypatch):
    def fail(outputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    _damaged(monkeypatch, "reference", fail)
    rows = {row.implementation: row for row in tiny_bench().run(custom_case(**PLAIN))}
    assert (rows["reference"].status, rows["frozen"].status) == ("not run", "ok")
    assert rows["reference"].why == "OutOfMemoryError: CUDA out of memory"


def test_flags_that_cannot_be_honoured_are_refused():
    for flags, message in {
        "--device cuda:0": "device: got 'cuda:0', but torch finds no GPU",
        "--device tpu": "device: got 'tpu', wants cpu",
        "--timer events --device cpu": "timer: got 'events' on cpu",
        "--rounds 0": "rounds: got 0, wants at least 1",
        "--dtype fp8": "invalid choice",
        "--nonsense": "unrecognized arguments",
    }.items():
        if "cuda" in flags and torch.cuda.is_available():
            continue
        with pytest.raises(ValueError, match=message):
            command.main(flags.split())


def test_turns_are_taken_and_medians_are_given():
    order = []

    def implementation(name):
        x = torch.ones(2, requires_grad=True)
        forward = lambda: [order.append(name) or x * 2]  # noqa: E731
        return Implementation(forward, {"x": x}, [torch.ones(2)], None)

    several = {name: implementation(name) for name in "abc"}
    times = timing.Timer(CPU, warm=True).compare(several, "both", rounds=30)
    rounds = ["".join(order[first : first + 3]) for first in range(0, len(order), 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds) and len(times["a"].milliseconds) == 30
    followed = {each[place : place + 2] for each in rounds for place in (0, 1)}
    assert followed == {"ab", "ac", "ba", "bc", "ca", "cb"}  # everyone follows everyone
    found = timing.Times([5.0, 1.0, 3.0, 2.0, 10.0], "host")
    assert (found.median, found.quartiles) == (3.0, (2.0, 5.0))


def test_a_wide_spread_is_said():
    row = tiny_bench(stop_at=0.0).run(custom_case(**PLAIN))[0]
    timed = [dataclasses.replace(row, milliseconds=10.0, iqr=iqr) for iqr in (1.0, 2.5)]
    assert report.noise_of(timed).startswith("1 of 2 times") and report.noise_of(timed[:1]) is None


def test_peak_memory_is_what_is_allocated():
    if memory._trim() is None:
        pytest.skip("no glibc or no Linux")
    x = torch.ones(1, requires_grad=True)
    eight_megabytes = x.expand(2_000_000)
    made = Implementation(lambda: [eight_megabytes * n for n in range(6)], {"x": x}, None, None)
    for _ in range(3):  # what the one before has freed is not there for the next
        assert memory.peak_megabytes(made, "forward", CPU) == pytest.approx(48, rel=0.1)


def test_pictures(monkeypatch, tmp_path):
    rows = tiny_bench(("forward",)).run(custom_case(**PLAIN))
    written = plots.write(rows, {"device": "this", "hardware": "one thread"}, tmp_path, roofline=False)
    assert [path.name for path in written] == ["bench-layer-forward-over-frozen.png"] and written[
        0
    ].stat().st_size > 10_000


class _Gpu:
    """Stands in for torch.cuda and writes down what it is asked for."""

    def __init__(self, captures=True):
        self.log, self.captures, self.now, self.late = [], captures, 0.0, iter(())

    def install(self, monkeypatch):
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                self.at = None

            def record(self):
                gpu.now += 1.0
                self.at = gpu.now

            def query(self):
                return next(gpu.late, False)

            def elapsed_time(self, end):
                assert gpu.log[-1] == "synchronize"
                return end.at - self.at

        class Graph:
            def replay(self):
                gpu.log.append("replay")

            def pool(self):
                return 1

        @contextlib.contextmanager
        def graph(_, pool=None):
            if not gpu.captures:
                raise RuntimeError("cannot be captured")
            yield

        class Stream:
            def wait_stream(self, other):
                pass

        replaced = {"Event": Event, "CUDAGraph": Graph, "graph": graph, "Stream": Stream}
        replaced |= {"current_stream": Stream, "stream": lambda _: contextlib.nullcontext()}
        replaced["synchronize"] = lambda device=None: gpu.log.append("synchronize")
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)
        timer = timing.Timer(CPU, warm=True)
        timer.device = torch.device("cuda")
        return timer


@pytest.mark.parametrize("phase", ["forward", "backward", "both"])
def test_graphs_on_a_gpu(monkeypatch, phase):
    gpu = _Gpu()
    timer = gpu.install(monkeypatch)
    x = torch.ones(2, requires_grad=True)
    made = Implementation(lambda: [x * 2], {"x": x}, [torch.ones(2)], None)
    found = timer.compare({"a": made, "b": made}, phase, rounds=2)
    assert {(of.timer, of.note, of.median) for of in found.values()} == {("graph", "", 1.0)}
    replays = 2 if phase == "backward" else 1  # the forward pass, which is not timed
    assert gpu.log[-5 if replays == 2 else -3 :] == ["replay"] * 2 * replays + ["synchronize"]


def test_the_host_is_ahead_of_what_is_timed(monkeypatch):
    """Where the device has begun before all is launched, the turn is taken again behind more clears, up to a limit."""
    gpu, clears = _Gpu(), []
    gpu.install(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "zero_", lambda self: clears.append(len(gpu.log)))
    backlog = events.Backlog(torch.empty(1), clears=2)
    for late, wants in ([True, True, False], [2, 4, 8]), ([True] * 9, [8, 16]), ([True], [16]):
        clears.clear()
        gpu.late, gpu.log, turns = iter(late), [], []
        read = backlog.take(lambda: gpu.log.append("set up") or "state", turns.append)
        torch.cuda.synchronize()
        assert read() == 1.0 and turns == ["state"] * len(wants)
        assert [clears.count(turn) for turn in range(1, len(wants) + 1)] == wants


def test_a_step_is_timed_as_it_is_run(monkeypatch):
    timer = _Gpu().install(monkeypatch)
    x = torch.ones(2, requires_grad=True)
    made = Implementation(lambda: [x * 2], {"x": x}, [torch.ones(2)], None)
    found = {as_run: timer.compare({"a": made}, "both", rounds=2, as_run=as_run)["a"] for as_run in (True, False)}
    assert [(of.timer, of.note) for of in found.values()] == [("events", ""), ("graph", "")]


def test_what_cannot_be_captured_is_timed_with_events(monkeypatch):
    timer = _Gpu(captures=False).install(monkeypatch)
    x = torch.ones(2, requires_grad=True)
    made = Implementation(lambda: [x * 2], {"x": x}, [torch.ones(2)], None)
    (times,) = timer.compare({"a": made}, "both", rounds=2).values()
    assert times.timer == "events" and times.note == "events, because a cannot be captured in a CUDA graph"
    timer.how = "graph"
    with pytest.raises(RuntimeError, match="timer: a cannot be captured in a CUDA graph: cannot be captured"):
        timer.compare({"a": made}, "both", rounds=2)


def make_bench(flags):
    """What `make bench` runs, with these BENCH_FLAGS."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "--bench", flags]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=200)


def test_the_suite_that_make_bench_runs():
    done = make_bench(
        "--shape 24x40x32 --method lora dora --rank 8 --dropout 0 --echo off --dtype fp32 --implementations addmm"
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "3 passed, 1 skipped" in done.stdout and "custom/layer/24x40x32/lora/r8/p0/plain/fp32 both" in done.stdout


def test_a_flag_that_the_suite_does_not_honour_is_refused():
    done = make_bench("--quick --warm")
    assert done.returncode != 0 and "--bench: got --warm, which is for `echolora bench`" in done.stdout + done.stderr

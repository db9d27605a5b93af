"""`echolora tune`: what it offers, picks, writes and refuses. Times mean nothing here; everything else does."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from linear_cases import why_not

from echolora_kernels.ops.echo_lora_linear import (
    candidates,
    triton_backward_launch,
    triton_descriptors,
    triton_forward_launch,
    triton_products,
)
from echolora_kernels.ops.echo_lora_linear.candidates import Entry, Problem, choose, table_for
from echolora_kernels.ops.echo_lora_linear.configs import Device
from echolora_kernels.ops.echo_lora_linear.launch import Launch
from echolora_kernels.tuning import command, run, shapes, table, timing, ways
from echolora_kernels.tuning.request import Request
from echolora_kernels.tuning.select import Measured, Result
from echolora_kernels.tuning.ways import Product, Way

ROOT = Path(__file__).resolve().parents[2]
H100, CPU = Device("sm_90", 132), Device("cpu", 8)
LLAMA = Problem("forward", 8192, 4096, 4096, 16, "bfloat16", "sm_90")
TINY = Problem("forward", 24, 40, 32, 4, "float16", "cpu")
DRY = ("--dry-run", "--method", "lora", "--shapes", "smollm2")

MODULES = (triton_forward_launch, triton_backward_launch, triton_descriptors, triton_products)

needs_triton = pytest.mark.skipif(why_not("triton") is not None, reason=f"triton: {why_not('triton')}")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def launched(monkeypatch):
    """(kernel, tile) of each launch."""
    taken, run_planned = [], Launch.run

    def record(planned, device, **tensors):
        taken.append((planned.kernel.fn.__name__, planned.tile))
        run_planned(planned, device, **tensors)

    monkeypatch.setattr(Launch, "run", record)
    return taken


def test_shapes_of_known_models():
    assert shapes.known("llama3-8b") == [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
    with pytest.raises(ValueError, match=r"shapes: got 'gpt-9', wants smollm2, .*--model"):
        shapes.known("gpt-9")
    for name in shapes.KNOWN:
        small = shapes.tiny(shapes.known(name))
        assert max(max(shape) for shape in small) == 64 and min(min(shape) for shape in small) >= 16


def test_shapes_of_a_model_are_its_linears_but_the_head(tmp_path):
    from transformers import LlamaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=50).save_pretrained(tmp_path)
    assert shapes.of_model(str(tmp_path)) == [(32, 32), (16, 32), (48, 32), (32, 48)]


def test_the_rule_is_one_of_the_ways():
    """So that every pick can be compared with it; and a table without tiles means the rule's."""
    for arch, dtype in (("sm_90", "bfloat16"), ("sm_86", "float16"), ("sm_100", "float32"), ("gfx942", "bfloat16")):
        device = Device(arch, 100)
        for m, rank, dora, product in ((8192, 16, False, "forward"), (64, 128, True, "forward"),
                                       (8192, 64, True, "input-gradient"), (300, 8, False, "input-gradient")):  # fmt: skip
            problem = replace(LLAMA, m=m, rank=rank, dora=dora, product=product, arch=arch, dtype=dtype)
            assert ways.by_rule(problem, device) in ways.ways(problem, device)


def test_the_rule_is_what_the_backend_runs():
    assert ways.by_rule(LLAMA, H100) == Way("lora-first", "matmul/flat")
    assert ways.by_rule(replace(LLAMA, product="input-gradient"), H100) == Way("lora-first", "matmul/large")
    assert ways.by_rule(replace(LLAMA, m=64), H100) == Way("fused", "matmul/small")  # no descriptors for a small one


def test_the_ways_of_a_product_on_hopper():
    found = {str(way) for way in ways.ways(LLAMA, H100)}
    assert {"fused descriptor/wide", "fused matmul/large", "lora-first matmul/flat"} <= found
    dora = {str(way) for way in ways.ways(replace(LLAMA, dora=True), H100)}
    assert "accumulate matmul/flat" in dora and "fused descriptor/wide" not in dora
    thick = {str(way) for way in ways.ways(replace(LLAMA, rank=128), H100)}
    assert not any("descriptor" in way for way in thick)


@interpreted
@needs_triton
@pytest.mark.parametrize("of", [CPU, H100], ids=["cpu", "sm_90"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("product", ["forward", "input-gradient"])
def test_each_way_is_what_it_says_and_is_right(launched, monkeypatch, product, dora, of):
    for module in MODULES:
        monkeypatch.setattr(module, "device_of", lambda _: of)
    problem = replace(TINY, product=product, dora=dora)
    arguments, kernels = Product(problem, torch.device("cpu")), set()
    for way in ways.ways(problem, of):
        launched.clear()
        assert arguments.error(way) <= 1.5, way
        (name, tile), kernel = launched[0], way.tile.partition("/")[0]  # behind it the gain may go on W0
        assert tile == candidates.TILES[kernel, "half"][way.tile.partition("/")[2]]
        assert ("descriptor" in name) == (kernel == "descriptor")
        kernels.add(kernel)
    assert ("descriptor" in kernels) == (of is H100 and not (dora and product == "input-gradient"))


@needs_triton
def test_wrong_results_of_any_row_column_or_kind_are_seen(monkeypatch):
    original = triton_products.linear
    for dora, spoil in (
        (False, lambda y, z: y[..., -1, :].mul_(1.01)),
        (False, lambda y, z: y[..., 0].mul_(1.01)),
        (False, lambda y, z: y[..., 3, 5].fill_(float("nan"))),
        (True, lambda y, z: z.mul_(1.01)),
    ):
        product = Product(replace(TINY, dora=dora), torch.device("cpu"))

        def spoiled(*arguments, spoil=spoil, **options):
            y, z = original(*arguments, **options)
            spoil(y, z)
            return y, z

        monkeypatch.setattr(triton_products, "linear", spoiled)
        error = product.error(Way("fused", "matmul/small"))
        assert not ways.is_right(error), error


@interpreted
@needs_triton
def test_the_backend_takes_tile_and_way_from_a_written_table(tmp_path, monkeypatch, launched):
    def forward(m):
        launched.clear()
        choice = triton_products._choice("forward", torch.empty(1, m, 32).half(), torch.empty(40, 32), 4, None, NONE)
        product = Product(replace(TINY, m=m), torch.device("cpu"))
        product.run(Way(choice.candidate, choice.tile or "matmul/none"))
        return launched[-1][1]

    from echolora_kernels.ops.echo_lora_linear.dropout import Dropout

    NONE = Dropout()
    tiles = candidates.TILES["matmul", "half"]
    flat = Measured(Way("lora-first", "matmul/flat"), 1.0, [5.0])
    row = table.row(Result(TINY, Way("fused", "matmul/small"), [flat]), {})
    table.write(candidates.table_path("cpu", tmp_path), "cpu", [row])
    assert forward(24) == tiles["small"]
    monkeypatch.setenv("ECHOLORA_TUNED", str(tmp_path))
    assert forward(24) == forward(12) == tiles["flat"]
    assert forward(11) == tiles["small"]  # too far


def test_a_tile_that_does_not_fit_the_call_is_left_to_the_rule():
    entry = Entry("forward", False, "bfloat16", 8192, 4096, 4096, 16, "fused", "descriptor/wide")
    assert choose(LLAMA, (entry,)).tile == "descriptor/wide"
    assert choose(replace(LLAMA, m=4095), (entry,)).tile is None
    named = lambda kernel, allowed: triton_products.configs.named(entry.tile, kernel, allowed, torch.bfloat16, "sm_90")  # noqa: E731
    assert named("descriptor", ("wide", "small")) == candidates.TILES["descriptor", "half"]["wide"]
    assert named("descriptor", ("small",)) is None and named("matmul", ("wide", "small")) is None


def measured(way, *microseconds, error=1.0, problem=None):
    candidate, _, tile = way.partition(" ")
    return Measured(Way(candidate, tile), error, list(microseconds), problem)


def result(*ways, rule="fused a", problem=LLAMA):
    candidate, _, tile = rule.partition(" ")
    return Result(problem, Way(candidate, tile), ways)


def test_the_fastest_right_way_is_picked():
    slow, fast = measured("fused a", 9, 10, 30), measured("lora-first b", 8, 8, 8)
    wrong = measured("lora-first c", 1, 1, 1, error=1.6, problem="WRONG")
    failed = measured("lora-first d", error=None, problem="boom")
    assert result(slow, fast, wrong, failed).entry().candidate == "lora-first"
    assert result(slow, fast, wrong, failed).entry().tile == "b"
    assert result(slow, fast).gain() == 0.8 and slow.quartiles == (9.5, 20)
    assert result(wrong, failed).entry() is None and result(wrong, failed).gain() is None
    nearly = measured("lora-first b", 9.9, 9.9, 9.9)
    assert result(slow, nearly).fastest is slow and result(slow, nearly, rule="x y").fastest is nearly


def test_a_table_keeps_what_was_not_measured_again(tmp_path):
    path = candidates.table_path("NVIDIA H200", tmp_path / "new")
    old = [table.row(result(measured("fused a", 9), problem=replace(LLAMA, m=m)), {"date": "then"}) for m in (512, 64)]
    for row in old:
        row["tile"] = "descriptor/wide"
    new = {**old[0], "candidate": "lora-first", "tile": "matmul/flat", "measured": {"date": "now"}}
    table.write(path, "NVIDIA H200", table.merged([], old))
    table.write(path, "NVIDIA H200", table.merged(table.read(path), [new]))
    assert table.read(path) == [old[1], new]
    assert [(entry.m, entry.candidate, entry.tile) for entry in table_for("NVIDIA H200", str(path.parent))] == [
        (64, "fused", "descriptor/wide"), (512, "lora-first", "matmul/flat"),
    ]  # fmt: skip
    assert [file.name for file in path.parent.iterdir()] == ["nvidia-h200.json"]
    path.write_text(path.read_text().replace("matmul/flat", "matmul/huge"))
    with pytest.raises(
        ValueError, match=r"nvidia-h200\.json: entry 1: got tile 'matmul/huge', wants one of .*matmul/flat"
    ):
        table.read(path)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_table(tmp_path, monkeypatch, broken):
    path = tmp_path / "a.json"
    table.write(path, "a", [])
    before = path.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError, match="No space left"):
        table.write(path, "a", [{"more": 1}])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_kill_leaves_the_old_table(tmp_path):
    path = tmp_path / "a.json"
    table.write(path, "a", [])
    before = path.read_bytes()
    program = f"""
import os
from pathlib import Path
from echolora_kernels.tuning import table
os.fsync = lambda _: os.kill(os.getpid(), 9)
table.write(Path({str(path)!r}), "a", [{{"more": 1}}])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_bytes() == before and list(tmp_path.glob("*.json")) == [path]


@interpreted
@needs_triton
def test_an_interrupt_keeps_what_is_done(echolora, tmp_path, monkeypatch, capsys):
    path = tmp_path / "cpu.json"
    old = table.row(result(measured("fused matmul/small", 9), rule="fused matmul/small"), {})
    table.write(path, "cpu", [old])
    original, calls = run.measure, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(run, "measure", interrupted)
    assert echolora("tune", *DRY, "--output", tmp_path) == 130
    assert f"interrupted after 1 of 8 problems; those are in {path}" in capsys.readouterr().err
    rows = table.read(path)
    assert len(rows) == 2 and old in rows and list(tmp_path.iterdir()) == [path]


@interpreted
@needs_triton
def test_a_wrong_way_is_told_and_never_picked(echolora, tmp_path, monkeypatch, capsys):
    original = triton_products.add_product
    monkeypatch.setattr(triton_products, "add_product", lambda *arguments: original(*arguments).mul_(1.01))
    # the wrong one is the fastest
    monkeypatch.setattr(run, "interleaved", lambda ways, *_: {w: [1.0 + (w.candidate == "fused")] for w in ways})
    assert echolora("tune", *DRY, "--output", tmp_path, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    wrong = [
        way for each in found["results"] for name, way in each["ways"].items() if "WRONG" in (way["problem"] or "")
    ]
    assert len(wrong) == 4 and not any(way["microseconds"] for way in wrong)
    picks = {(row["product"], row["candidate"]) for row in table.read(tmp_path / "cpu.json")}
    assert picks == {("forward", "lora-first"), ("input-gradient", "fused")}
    assert echolora("tune", *DRY, "--shapes", "llama2-7b") == 1
    assert "WRONG" in capsys.readouterr().out


@interpreted
@needs_triton
def test_a_failing_way_does_not_end_the_rest(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("out of\nshared memory")

    monkeypatch.setattr(triton_products, "add_product", fails)
    found = run.measure(replace(TINY, product="input-gradient"), torch.device("cpu"), CPU, 1, 1)
    assert found.fastest.way.candidate == "fused"
    assert {each.problem for each in found.measured} == {None, "RuntimeError: out of"}


def test_threads_have_the_context_of_the_device(monkeypatch):
    """Each has launched something on it before a way."""
    begun, zeros = set(), torch.zeros

    def launched(*sizes, **options):
        begun.add(threading.get_ident())
        return zeros(*sizes, **options)

    def attempt(product, way):
        assert threading.get_ident() in begun
        raise RuntimeError("only asked")

    monkeypatch.setattr(torch, "zeros", launched)
    monkeypatch.setattr(ways.Product, "run", attempt)
    found = run.measure(TINY, torch.device("cpu"), CPU, 1, 2)
    assert {each.problem for each in found.measured} == {"RuntimeError: only asked"}


def test_actions_take_turns():
    taken = []
    actions = {name: lambda name=name: taken.append(name) for name in "abc"}
    times = timing.interleaved(actions, torch.device("cpu"), 3)
    assert "".join(taken) == "abcbcacab" and {name: len(of) for name, of in times.items()} == dict.fromkeys("abc", 3)


def test_no_time_left_is_said(echolora, capsys):
    if why_not("triton"):
        pytest.skip("no triton")
    assert echolora("tune", *DRY, "--minutes", "0") == 0
    assert "not measured: 8 of 8 problems" in capsys.readouterr().out


@interpreted
@pytest.mark.parametrize(("arguments", "words"), [
    (("--install",), ["no GPU", "--dry-run"]),
    (("--dry-run", "--install"), ["install", "--dry-run"]),
    (("--dry-run", "--shapes", "gpt-9"), ["gpt-9", "llama3-8b"]),
    (("--dry-run", "--rank", "0"), ["rank", "0", "1 to 256"]),
    (("--dry-run", "--rank", "a"), ["rank", "a"]),
    (("--dry-run", "--dtype", "float8"), ["dtype", "float8", "bfloat16"]),
    (("--dry-run", "--rounds", "0"), ["rounds", "0", "1"]),
    (("--dry-run", "--speed", "9"), ["--speed"]),
])  # fmt: skip
def test_errors_are_one_line(echolora, arguments, words):
    said = echolora("tune", *arguments)
    assert "\n" not in said and all(word in said for word in words), said


def test_a_malformed_table_is_refused_before_anything_is_timed(echolora, tmp_path, monkeypatch):
    if why_not("triton"):
        pytest.skip("no triton")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    path = candidates.table_path(name, tmp_path)
    path.write_text("{")
    monkeypatch.setattr(run, "measure", None)
    assert str(path) in echolora("tune", *DRY, "--output", tmp_path) and path.read_text() == "{"


@needs_triton
def test_goes_without_typer_and_transformers():
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in "transformers peft typer rich click hypothesis pytest safetensors accelerate".split():
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from echolora_kernels.tuning.command import main
sys.exit(main({[*DRY, "--rounds", "1"]!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "nothing is written" in done.stdout, done.stderr


def test_problems_come_with_the_largest_first():
    request = Request([(64, 32), (32, 64)], [16], ["float32"], [128, 512], ["lora", "dora"])
    found = request.problems("sm_90")
    assert len(found) == 2 * 2 * 2 * 2 and [p.m for p in found] == [512] * 8 + [128] * 8
    assert not found[0].dora and {p.product for p in found[:4]} == {"forward", "input-gradient"}
    assert command.parser().parse_args([]).shapes == ["llama3-8b"]


def test_the_first_and_the_last_rows_are_compared():
    rows = Product(replace(TINY, m=1000), torch.device("cpu"))._checked
    assert len(set(rows.tolist())) == 256 and {0, 63, 936, 999} <= set(rows.tolist())
    assert len(Product(TINY, torch.device("cpu"))._checked) == 24

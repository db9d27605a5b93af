"""`echolora verify` and `echolora doctor`: what they say, and that wrong numbers are found."""

import json

import pytest
import torch
from linear_cases import why_not

from echolora_kernels import backends, functional
from echolora_kernels.cli import verify as command
from echolora_kernels.environment import VARIABLES
from echolora_kernels.ops.echo_distillation import compiled_losses
from echolora_kernels.ops.echo_lora_linear.kernels import load
from echolora_kernels.ops.echo_networks import autograd as networks
from echolora_kernels.verification.run import DTYPES, plan
from echolora_kernels.verification.trials import Errors


@pytest.fixture
def cpp():
    if reason := why_not("cpp"):
        pytest.skip(reason)


def test_all_is_well_here(cpp, echolora, capsys, tmp_path):
    before = torch.get_rng_state()
    assert echolora("verify", "--backend", "cpp", "--json", tmp_path / "ratios.json") == 0
    assert torch.equal(torch.get_rng_state(), before)
    printed = " ".join(capsys.readouterr().out.split())
    assert "checks passed" in printed and "1.5 is right" in printed
    found = json.loads((tmp_path / "ratios.json").read_text())
    assert found["passed"] and {row["dtype"] for row in found["rows"]} == set(DTYPES)
    assert {row["operator"] for row in found["rows"]} == set(backends.BACKENDS[-1].operators)
    largest = [ratio for row in found["rows"] for pair in row["ratios"].values() for ratio in pair.values()]
    assert max(largest) <= 1.5 and len(largest) > 1000


def test_json_in_place_of_the_table(cpp, echolora, capsys):
    assert echolora("verify", "--quick", "--backend", "cpp", "--dtype", "float32", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["passed"]


def test_every_gradient_is_compared(cpp):
    rows = [job.run() for job in plan(["cpp"], ["float32"])[0]]
    of = lambda operator: set().union(*(row.ratios for row in rows if row.operator == operator))  # noqa: E731
    gradients = {"dx", "dbias", "dlora_a", "dlora_b", "dmagnitude", "ddelta"}
    assert of("echo_lora_linear") == {"y", *gradients}
    assert {"y0", "y1", "y2", "dlora_a2", "dmagnitude1", "ddelta0", "dx"} <= of("echo_lora_linear_group")
    assert of("lora_update") == {"y", "dbase", "dx", "dlora_a", "dlora_b", "dgain", "dbias"}
    assert of("echo_networks") == {"delta", "du", "ddown", "dproj_up", "dgate_up", "dgate_bias", "dscale"}
    for operator in backends.LOSSES:
        assert of(operator) == {"losses", "loss_kd", "doff", "don"}


def _scaled(change):
    """The last of what a kernel returns, a little too large."""

    def wrap(kernel):
        def call(*arguments, **options):
            *others, last = kernel(*arguments, **options)
            return (*others, change(last))

        return call

    return wrap


BROKEN = {
    "input gradient": (lambda: load("cpp"), "linear_backward", _scaled(lambda dx: dx * 1.01), "echo_lora_linear", "dx"),
    "not a number": (
        lambda: load("cpp"),
        "linear_backward",
        _scaled(lambda dx: dx * torch.nan),
        "echo_lora_linear",
        "nan",
    ),
    "a group's dA": (
        lambda: load("cpp"),
        "lora_a_backward",
        lambda kernel: lambda *a, **o: kernel(*a, **o) * 1.01,
        "echo_lora_linear_group",
        "dlora_a",
    ),
    "networks": (lambda: networks, "backward_pass", _scaled(lambda d: d * 1.01), "echo_networks", "dscale"),
    "sums": (
        lambda: compiled_losses,
        "forward",
        lambda kernel: lambda *a: (kernel(*a)[0] * 1.0001, kernel(*a)[1]),
        "echo_distillation_rows",
        "loss",
    ),
}


@pytest.mark.parametrize(("where", "name", "wrap", "operator", "word"), BROKEN.values(), ids=BROKEN.keys())
def test_wrong_numbers_are_found(cpp, echolora, monkeypatch, capsys, tmp_path, where, name, wrap, operator, word):
    monkeypatch.setattr(where(), name, wrap(getattr(where(), name)))
    arguments = ("--quick", "--backend", "cpp", "--dtype", "float32", "--json", tmp_path / "ratios.json")
    assert echolora("verify", *arguments) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed and word in printed
    rows = json.loads((tmp_path / "ratios.json").read_text())["rows"]
    assert operator in {row["operator"] for row in rows if not row["passed"]} != {row["operator"] for row in rows}


def test_a_broken_kernel_does_not_end_the_rest(cpp, echolora, monkeypatch, capsys):
    def fails(*arguments, **options):
        raise RuntimeError("out of\nregisters")

    monkeypatch.setattr(networks, "forward_pass", fails)
    assert echolora("verify", "--quick", "--backend", "cpp", "--dtype", "float32") == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "RuntimeError: out of registers" in printed and "1 of 12 checks FAILED" in printed


def test_a_little_noise_is_told_from_a_mistake():
    def ratios(wrong):
        errors = Errors()
        for _ in range(8):
            exact = torch.randn(64, dtype=torch.float64)
            noise = lambda: exact + 1e-6 * torch.randn(64, dtype=torch.float64)  # noqa: B023, E731
            errors.add((noise() * wrong).float(), noise().float(), exact)
        return errors.ratios()

    assert max(ratios(1.0)) < 1.2 and min(ratios(1 + 5e-6)) > 1.5


def test_another_dtype_or_shape_is_a_mistake():
    exact = torch.ones(3, dtype=torch.float64)
    for wrong, got in ((exact, r"float64 \[3\]"), (exact.float()[:2], r"float32 \[2\]")):
        with pytest.raises(ValueError, match=rf"^got {got}, wants float32 \[3\]"):
            Errors().add(wrong, exact.float(), exact)


@pytest.mark.parametrize(("arguments", "words"), [
    (("--backend", "cude"), ["backend", "cude", "triton"]),
    (("--backend", "cuda"), ["cuda", "cannot run", "no GPU"]),
    (("--backend", "reference"), ["backend", "reference", "others"]),
    (("--dtype", "float64"), ["dtype", "float64", "bfloat16"]),
    (("--json", "/no/such/folder/x.json"), ["json", "/no/such/folder", "exists"]),
])  # fmt: skip
def test_errors_are_one_line(echolora, arguments, words):
    if torch.cuda.is_available() and "cuda" in arguments:
        pytest.skip("there is a GPU")
    said = echolora("verify", *arguments)
    assert "\n" not in said and all(word in said for word in words), said


def test_what_lacks_an_operator_says_so(cpp, echolora, monkeypatch, capsys):
    compiled = next(backend for backend in backends.BACKENDS if backend.name == "cpp")
    monkeypatch.delitem(compiled.operators, "echo_networks")
    assert echolora("verify", "--quick", "--backend", "cpp", "--dtype", "float32") == 0
    assert "not run: echo_networks, cpp, all: the backend does not have it" in capsys.readouterr().out


def test_an_interrupt_is_no_verdict(cpp, echolora, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(functional, "echo_lora_linear", interrupted)
    assert echolora("verify", "--quick") == 130


def test_the_doctor_says_what_runs_and_why(echolora, monkeypatch, capsys):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ECHOLORA_CACHE", "/some/where")
    monkeypatch.setenv("ECHOLORA_BAKCEND", "cpp")
    assert echolora("doctor") == 0
    printed = capsys.readouterr().out
    for word in ("torch", "bitsandbytes", "echo_networks on cpu", "ECHOLORA_CACHE", "/some/where", "no such variable"):
        assert word in printed, word
    assert ("checks passed" in printed) == (why_not("cpp") is None)
    assert echolora("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["self_test"]["passed"] and found["environment"]["ECHOLORA_CACHE"] == "/some/where"
    assert found["operators"]["echo_lora_linear on cpu"]["reference"] in ("chosen", "cpp comes first")


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton then runs on the GPU")
def test_the_interpreter_is_left_out_of_the_quick_part_and_said_so(echolora, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backends._why_no_triton.cache_clear()
    try:
        if backends._why_no_triton() is not None:
            pytest.skip("no Triton")
        assert {job.backend for job in plan(["triton"], ["float32"], quick=True)[0]} == {"triton"}
        assert echolora("doctor") == 0
    finally:
        backends._why_no_triton.cache_clear()
    assert "not run: all, triton, all: Triton's interpreter" in capsys.readouterr().out


def test_the_doctor_finds_wrong_numbers(cpp, echolora, monkeypatch, capsys):
    monkeypatch.setattr(networks, "backward_pass", _scaled(lambda d: d * 1.01)(networks.backward_pass))
    assert echolora("doctor") == 1
    assert "echo_networks, cpp, float32" in capsys.readouterr().out
    assert echolora("doctor", "--json") == 1
    assert not json.loads(capsys.readouterr().out)["self_test"]["passed"]


def test_the_doctor_reports_what_the_environment_asks_in_vain(echolora, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("ECHOLORA_BACKEND", "cuda")
    echolora("doctor")
    assert "none (not any: backend 'cuda' cannot run echo_lora_linear: there is no GPU)" in capsys.readouterr().out


def test_nothing_to_compare_is_said(echolora, monkeypatch, capsys):
    monkeypatch.setattr(command, "plan", lambda *_: ([], []))
    assert echolora("verify") == 0
    assert "nothing to verify" in capsys.readouterr().out

"""Which way a product is computed: the rules, the table, and that every way gives the same."""

import json
from dataclasses import replace

import pytest
import torch
from linear_cases import assert_equal_up_to_rounding, error_ratios
from triton_cases import NORM, make, reference_results

from echolora_kernels.ops.echo_lora_linear import candidates
from echolora_kernels.ops.echo_lora_linear.candidates import Entry, Problem, choose, parse, possible, table_for

LLAMA = Problem("forward", 8192, 4096, 4096, 16, "bfloat16", "sm_90")
FORCED = {
    "forward": {False: "lora-first", True: "accumulate"},
    "input-gradient": {False: "lora-first", True: "lora-first"},
}


@pytest.fixture
def vendor(monkeypatch):
    """Every product by the vendor's GEMM wherever that is possible; the interpreter would fuse."""
    taken = []

    def prefer(problem, table, insist):
        can = possible(problem)
        taken.append((problem.product, can[-1]))
        return candidates.Choice(can[-1], "test")

    monkeypatch.setattr(candidates, "choose", prefer)
    return taken


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("site", [None, "output", "adapter_input", "rank"])
def test_every_way_gives_the_same(vendor, site, dora, p, monkeypatch):
    case = make(site=site, dora=dora, p=p)
    got = case.results("triton")
    ways = {
        product: way if not (dora and p) else "fused"
        for product, by in FORCED.items()
        for d, way in by.items()
        if d == dora
    }
    assert dict(vendor) == ways
    assert_equal_up_to_rounding(got, reference_results(case, monkeypatch))


@pytest.mark.parametrize("site", [None, "output", "adapter_input", "rank"])
@pytest.mark.parametrize("by_vendor", [False, True])
def test_fast_dora_dropout(request, site, by_vendor, monkeypatch):
    """One base product: every way is possible again."""
    if by_vendor:
        request.getfixturevalue("vendor")
    case = replace(make(site=site, dora=True, p=0.3), dora_dropout="fast")
    exact = replace(case, dora_dropout="exact")
    fast = case.results("triton")
    assert_equal_up_to_rounding(fast, reference_results(case, monkeypatch))
    assert (fast["y"] - reference_results(exact, monkeypatch)["y"]).abs().max() > 1e-3


@pytest.mark.parametrize("dora", [False, True])
def test_the_vendor_ways_are_as_exact_as_torch(vendor, dora):
    case = make(n=2, t=93, d_in=150, d_out=141, r=12, site="output", dora=dora, dtype=torch.float32)
    exact = case.to(torch.float64).results("reference")
    ratios = error_ratios(case.results("triton"), case.results("reference"), exact)
    assert max(max(pair) for pair in ratios.values()) <= 1.5, ratios


@pytest.mark.parametrize("dora", [False, True])
def test_the_vendor_ways_launch_as_many_kernels_and_one_for_the_gain(vendor, launches, dora):
    make(site="output", dora=dora).results("triton")
    names = ["shrink_fwd_kernel", "linear_fwd_kernel", "adapter_bwd_kernel", "lora_a_bwd_kernel", "input_bwd_kernel"]
    assert launches == NORM * dora + names + ["scale_rows_kernel"] * dora


def test_the_vendor_ways_change_no_input_and_repeat_bit_for_bit(vendor):
    for dora in (False, True):
        case = make(site="output", dora=dora)
        before = {name: tensor.clone() for name, tensor in {**case.tensors(), "dy": case.dy}.items()}
        first, second = case.results("triton"), case.results("triton")
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert all(torch.equal(tensor, before[name]) for name, tensor in {**case.tensors(), "dy": case.dy}.items())


def test_rows_the_vendor_would_copy_are_fused(vendor, forget):
    case = make()
    transposed = replace(case, x=case.x.transpose(1, 2).contiguous().transpose(1, 2))
    sliced = replace(case, x=torch.cat([case.x, case.x], 1)[:, :9])
    expanded = replace(case, dy=torch.ones((), dtype=case.dy.dtype, device=case.dy.device).expand(case.dy.shape))
    for odd, product in ((transposed, "forward"), (sliced, "forward"), (expanded, "input-gradient")):
        vendor.clear()
        forget()
        assert_equal_up_to_rounding(odd.results("triton"), odd.results("reference"))
        assert dict(vendor)[product] == "fused"
        assert dict(vendor) != {"forward": "fused", "input-gradient": "fused"}


@pytest.mark.parametrize(("change", "ways"), [
    ({}, ("fused", "lora-first")),
    ({"dora": True}, ("fused", "accumulate")),
    ({"dora": True, "product": "input-gradient"}, ("fused", "lora-first")),
    ({"dropout": True}, ("fused", "lora-first")),
    ({"dora": True, "dropout": True}, ("fused",)),
    ({"plain_rows": False}, ("fused",)),
])  # fmt: skip
def test_what_is_possible(change, ways):
    assert possible(replace(LLAMA, **change)) == ways


@pytest.mark.parametrize(("change", "candidate", "reason"), [
    ({}, "lora-first", "no measurement"),
    ({"dora": True}, "accumulate", "no measurement"),
    ({"arch": "cpu"}, "fused", "interpreter"),
    ({"dtype": "float64"}, "lora-first", "float64"),
    ({"m": 4}, "fused", "small"),
    ({"plain_rows": False}, "fused", "nothing else"),
])  # fmt: skip
def test_the_rule(change, candidate, reason):
    choice = choose(replace(LLAMA, **change))
    assert choice.candidate == candidate and reason in choice.reason


def entry(m, candidate, **change):
    fields = {"product": "forward", "dora": False, "dtype": "bfloat16", "n": 4096, "k": 4096, "rank": 16, **change}
    return Entry(m=m, candidate=candidate, **fields)


def test_the_nearest_measurement_decides():
    table = (entry(1024, "lora-first"), entry(4096, "fused"), entry(16384, "lora-first"), entry(8192, "fused", n=1024))
    picks = {512: "lora-first", 2047: "lora-first", 2049: "fused", 4097: "fused", 8191: "fused", 10**6: "lora-first"}
    assert {m: choose(replace(LLAMA, m=m), table).candidate for m in picks} == picks


def test_a_measurement_speaks_for_its_neighbourhood_alone():
    reasons = {m: choose(replace(LLAMA, m=m), (entry(2048, "fused"), entry(8192, "fused"))).reason for m in (900, 1024)}
    assert "no measurement" in reasons[900] and "M = 2048" in reasons[1024]
    for rank, near in ((1, True), (16, True), (17, False)):
        assert ("M = 8192" in choose(replace(LLAMA, rank=rank), (entry(8192, "fused"),)).reason) is near
    assert "M = 8192" in choose(replace(LLAMA, m=10**6), (entry(8192, "fused"),)).reason


def test_what_cannot_be_is_no_measurement():
    impossible = (entry(8192, "accumulate"),)
    assert "no measurement" in choose(LLAMA, impossible).reason


def test_insisting():
    assert choose(LLAMA, (entry(8192, "lora-first"),), "fused").candidate == "fused"
    with pytest.raises(ValueError, match=r"ECHOLORA_CANDIDATE.*accumulate.*fused, lora-first"):
        choose(LLAMA, (), "accumulate")


@pytest.mark.parametrize(("text", "found"), [
    ("", {}),
    ("fused", {"forward": "fused", "input-gradient": "fused"}),
    ("forward=accumulate", {"forward": "accumulate"}),
    ("input-gradient=fused", {"input-gradient": "fused"}),
    ("forward=accumulate, input-gradient=lora-first", {"forward": "accumulate", "input-gradient": "lora-first"}),
])  # fmt: skip
def test_what_the_variable_may_say(text, found):
    assert parse(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "fastest",
        "lora-first",
        "accumulate",
        "forward",
        "forward=",
        "forward=fastest",
        "backward=fused",
        "input-gradient=accumulate",
        "forward=fused,",
        ",",
        "forward=fused,forward=lora-first",
        "forward:fused",
    ],
)
def test_anything_else_is_refused_at_the_first_product(text, monkeypatch):
    wants = r"wants 'fused', or one or both of forward=fused\|lora-first\|accumulate; input-gradient=fused\|lora-first"
    monkeypatch.setenv("ECHOLORA_CANDIDATE", text)
    with pytest.raises(ValueError, match=rf"^ECHOLORA_CANDIDATE: got '{text}', {wants}"):
        make().call("triton")


@pytest.mark.parametrize(("dora", "text", "ways"), [
    (False, "forward=lora-first,input-gradient=lora-first", [("forward", "lora-first"), ("input-gradient", "lora-first")]),
    (True, "forward=accumulate,input-gradient=lora-first", [("forward", "accumulate"), ("input-gradient", "lora-first")]),
    (True, "input-gradient=lora-first", [("forward", "fused"), ("input-gradient", "lora-first")]),
    (True, "fused", [("forward", "fused"), ("input-gradient", "fused")]),
])  # fmt: skip
def test_the_environment_insists_on_each_product(monkeypatch, dora, text, ways):
    taken, original = [], candidates.choose

    def choose(problem, table, insist):
        choice = original(problem, table, insist)
        taken.append((problem.product, choice.candidate))
        return choice

    monkeypatch.setattr(candidates, "choose", choose)
    monkeypatch.setenv("ECHOLORA_CANDIDATE", text)
    case = make(dora=dora)
    assert_equal_up_to_rounding(case.results("triton"), case.results("reference"))
    assert taken == ways


def test_what_cannot_be_honoured_is_refused(monkeypatch):
    monkeypatch.setenv("ECHOLORA_CANDIDATE", "forward=lora-first")
    with pytest.raises(ValueError, match="got 'lora-first', wants one of fused, accumulate for"):
        make(dora=True).call("triton")
    monkeypatch.setenv("ECHOLORA_CANDIDATE", "input-gradient=lora-first")
    with pytest.raises(ValueError, match="got 'lora-first', wants one of fused for"):
        make(dora=True, p=0.3).results("triton")


def test_tables_are_read_by_device_name(tmp_path):
    row = {"product": "forward", "dora": False, "dtype": "bfloat16", "m": 8192, "n": 4096, "k": 4096, "rank": 16}
    file = tmp_path / "nvidia-h200.json"
    file.write_text(
        json.dumps({"device": "NVIDIA H200", "entries": [{**row, "candidate": "fused", "microseconds": {}}]})
    )
    assert table_for("NVIDIA H200", str(tmp_path)) == (entry(8192, "fused"),)
    assert table_for("NVIDIA A100", str(tmp_path)) == ()
    for number, (text, reason) in enumerate((
        ("[]", "entries"), ("{", "entries"), (json.dumps({"entries": [row]}), "entry 0.*candidate"),
        (json.dumps({"entries": [{**row, "candidate": "quick"}]}), "entry 0.*quick"),
    )):  # fmt: skip
        (tmp_path / f"broken-{number}.json").write_text(text)
        with pytest.raises(ValueError, match=rf"broken-{number}\.json.*{reason}"):
            table_for(f"Broken {number}", str(tmp_path))


def test_every_shipped_table_can_be_read():
    from pathlib import Path

    for file in Path(candidates.__file__).parent.glob("tuned/*.json"):
        assert table_for(file.stem)

"""The conformance run itself, on a few tests as PEFT's are; PEFT's own are `make conformance`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "run.py"
TESTS = """
import pytest, torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from echolora_kernels.integrations import fused


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(7, 6), nn.Linear(6, 5)

    def forward(self, ids):
        return self.linear(self.embedding(ids))


def model(config_cls=LoraConfig, target="linear", **options):
    if config_cls is IA3Config:
        options["feedforward_modules"] = []
    return get_peft_model(Net(), config_cls(target_modules=[target], **options))


IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize("config_cls", [LoraConfig, IA3Config])
def test_forward(config_cls):
    assert model(config_cls)(IDS).isfinite().all()


@pytest.mark.parametrize("config", [LoraConfig(target_modules=["linear"], use_dora=True), IA3Config()])
def test_configuration(config):
    assert get_peft_model(Net(), config)(IDS).isfinite().all()


def test_merged():
    merged = model()
    merged.merge_adapter()
    merged(IDS)


def test_nothing_is_run():
    model()


def test_embedding():
    model(target="embedding")(IDS)


def test_embedding_and_linear():
    model(target="embedding").add_adapter("other", LoraConfig(target_modules=["linear"]))


def test_without_a_layer():
    assert Net()(IDS).isfinite().all()


def test_another_method():
    model(IA3Config)(IDS)


def test_of_the_hub():
    raise OSError("We couldn't connect to 'the hub' to load this file")


def test_broken():
    model()
    assert False, "always"


@pytest.mark.skipif(True, reason="no such device")
def test_skipped():
    model()


def test_that_fuse_breaks():
    assert "forward" not in model().base_model.model.linear.__dict__, "replaced"


def test_with_a_wrong_operator(monkeypatch):
    operator = fused.echo_lora_linear
    monkeypatch.setattr(fused, "echo_lora_linear", lambda x, **named: 1.001 * operator(x, **named))
    assert model()(IDS).isfinite().all()


def test_with_an_operator_that_makes_nan(monkeypatch):
    operator = fused.echo_lora_linear
    monkeypatch.setattr(fused, "echo_lora_linear", lambda x, **named: torch.nan * operator(x, **named))
    model()(IDS)
"""
WANTED = {
    "test_forward[LoraConfig]": ("passed", ""),
    "test_configuration[config0]": ("passed", ""),
    "test_merged": ("passed", "adapters merged"),
    "test_nothing_is_run": ("passed", "no forward pass"),
    "test_embedding": ("declined", "PEFT's Embedding is not its plain Linear"),
    "test_embedding_and_linear": ("passed", ""),
    "test_of_the_hub": ("needs a hub", "couldn't connect"),
    "test_broken": ("fails without fuse", "always"),
    "test_skipped": ("skipped", "no such device"),
    "test_that_fuse_breaks": ("failed", "replaced"),
    "test_with_a_wrong_operator": ("failed", "an output differs"),
    "test_with_an_operator_that_makes_nan": ("failed", "an output differs"),
}


@pytest.mark.timeout(200)
def test_every_case_gets_its_outcome(tmp_path):
    (tmp_path / "test_custom_models.py").write_text(TESTS)
    (tmp_path / "test_broken.py").write_text("from peft import LoraConfig, NoSuchThing")
    results, tables = tmp_path / "results.json", tmp_path / "tables.md"
    command = [sys.executable, str(RUN), "--online", "--peft-tests", str(tmp_path)]
    done = subprocess.run(
        [*command, "--json", str(results), "--markdown", str(tables)], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 1, done.stderr[-3000:]
    told = json.loads(results.read_text())
    cases = {name.rpartition("::")[2]: case for name, case in told["cases"].items()}
    broken = cases.pop("tests/test_broken.py")
    assert broken["outcome"] == "fails without fuse" and "NoSuchThing" in broken["reason"]
    assert cases.keys() == WANTED.keys()
    for name, (outcome, word) in WANTED.items():
        assert cases[name]["outcome"] == outcome and word in cases[name]["reason"], (name, cases[name])
    assert told["counts"] == {
        "passed": 5, "declined": 1, "failed": 3, "needs a hub": 1, "fails without fuse": 2, "skipped": 1
    }  # fmt: skip
    assert told["through_ours"] == 2 and told["calls"]["ours"] == 2 and told["largest_difference"] < 0.01
    assert "| test_custom_models.py | 5 | 1 | 3 | 1 | 1 | 1 |" in tables.read_text() == done.stdout.removesuffix("\n")
    assert "| PEFT's Embedding is not its plain Linear | 1 |" in tables.read_text()

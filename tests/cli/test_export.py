"""`echolora export`: what it writes, what it refuses, and that nothing is ever half written or lost."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import TARGETS, randomise
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from echolora_kernels.integrations import export as integration

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(model_folder, tmp_path):
    return saved_adapter(model_folder, tmp_path / "adapter")


def saved_adapter(model_folder, folder, **choices):
    """A LoRA on the tiny model, whose B is not zero."""
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    config = LoraConfig(**{"r": 3, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **choices})
    model = randomise(get_peft_model(base, config))
    model.save_pretrained(folder)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_adapter_is_copied(adapter, echolora, tmp_path, capsys):
    output, files = tmp_path / "deep" / "output", contents(adapter)
    (adapter / "optimizer.pt").write_text("")
    assert echolora("export", adapter, "--output", output) == 0
    assert contents(output) == files
    printed = capsys.readouterr().out
    assert "KB" in printed and f"PeftModel.from_pretrained(base, '{output}')" in printed
    assert [path.name for path in output.parent.iterdir()] == ["output"]


def test_json_and_progress(adapter, echolora, tmp_path, capsys):
    output = tmp_path / "output"
    assert echolora("export", adapter, "--merged", "--output", output, "--json") == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["folder"] == str(output) and found["bytes"] == sum(map(len, contents(output).values()))
    assert 0 <= found["logit_difference"] < 1e-4
    assert [line.split()[0] for line in printed.err.splitlines()] == ["loading", "merging", "loading"]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_merged_model_is_the_base_with_the_adapter(model_folder, echolora, tmp_path, capsys, dtype, dora):
    adapter, output = saved_adapter(model_folder, tmp_path / "adapter", use_dora=dora), tmp_path / "output"
    assert echolora("export", adapter, "--merged", "--dtype", dtype, "--output", output) == 0
    assert "of the largest" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(output, dtype=getattr(torch, dtype))
    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        got, want, without = (model.eval()(ids).logits.float() for model in (merged, adapted, plain))
    tolerance = integration.TOLERANCES[getattr(torch, dtype)]
    assert (got - want).abs().max() <= tolerance * want.abs().max() < (without - want).abs().max()
    assert AutoTokenizer.from_pretrained(output)("What is")["input_ids"] == [7, 8]
    assert not list(output.glob("*.bin")) and list(output.glob("*.safetensors"))


def test_a_run_is_exported_with_the_model_that_it_names(adapter, echolora, tmp_path, model_folder):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(adapter, run / "adapter")
    assert echolora("export", run, "--output", tmp_path / "output") == 0
    config = json.loads((adapter / "adapter_config.json").read_text())
    (run / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    said = echolora("export", run, "--output", tmp_path / "other")
    assert "model: got none" in said
    assert echolora("export", run, "--model", model_folder, "--output", tmp_path / "other") == 0


def damaged(adapter, change):
    weights = load_file(adapter / WEIGHTS)
    change(weights)
    save_file(weights, adapter / WEIGHTS)


@pytest.mark.parametrize(("change", "words"), [
    (lambda weights: weights.popitem(), ["1 missing"]),
    (lambda weights: weights.update(extra=torch.ones(1)), ["1 unexpected", "extra"]),
    (lambda weights: next(iter(weights.values())).view(-1)[0].fill_(torch.inf), ["not finite", "lora_"]),
])  # fmt: skip
def test_what_does_not_fit_is_refused(adapter, echolora, tmp_path, change, words):
    damaged(adapter, change)
    said = echolora("export", adapter, "--output", tmp_path / "output")
    assert "\n" not in said and all(word in said for word in (*words, WEIGHTS)), said
    assert not (tmp_path / "output").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("change", "words"), [
    ({"peft_type": "FOO"}, ["FOO", "PEFT"]),
    ({"use_newthing": True, "other_newthing": None}, ["use_newthing = True", "does not know"]),
    ([], ["cannot be read", "list"]),
])  # fmt: skip
def test_a_configuration_that_peft_does_not_know_is_refused(adapter, echolora, tmp_path, model_folder, change, words):
    """Not only ignored, as PEFT does: the merged model would be another."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(change and {**json.loads(path.read_text()), **change}))
    said = echolora("export", adapter, "--model", model_folder, "--merged", "--output", tmp_path / "output")
    assert "\n" not in said and all(word in said for word in (*words, "adapter_config.json")), said
    assert "other_newthing" not in said and not (tmp_path / "output").exists()


def test_an_adapter_without_weights_to_merge(model_folder, echolora, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config).save_pretrained(tmp_path / "prompt")
    said = echolora("export", tmp_path / "prompt", "--merged", "--output", tmp_path / "output")
    assert "merged: got an adapter of PROMPT_TUNING" in said and not (tmp_path / "output").exists()


def test_whatever_is_saved_must_be_finite(model_folder, echolora, tmp_path):
    adapter = saved_adapter(model_folder, tmp_path / "adapter", modules_to_save=["lm_head"])
    damaged(adapter, lambda weights: next(w for n, w in weights.items() if "lm_head" in n).view(-1)[0].fill_(torch.nan))
    said = echolora("export", adapter, "--output", tmp_path / "output")
    assert "not finite" in said and "lm_head" in said


def test_wrong_logits_are_refused(adapter, echolora, tmp_path, monkeypatch):
    wrong, logits = iter((1.0, 1.001)), integration._logits
    monkeypatch.setattr(integration, "_logits", lambda *arguments: logits(*arguments) * next(wrong))
    assert "differ from those" in echolora("export", adapter, "--merged", "--output", tmp_path / "output")
    assert not (tmp_path / "output").exists() and not list(tmp_path.glob(".*"))


def test_a_wrong_copy_is_refused(adapter, echolora, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: target.write_bytes(source.read_bytes()[:-1]))
    assert "the copy of" in echolora("export", adapter, "--output", tmp_path / "output")
    assert not (tmp_path / "output").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["full", "interrupt"])
@pytest.mark.parametrize("where", ["weights", "tokenizer", "rename"])
def test_a_failure_half_way_leaves_all_as_it_was(adapter, echolora, tmp_path, monkeypatch, where, error):
    old, new = tmp_path / "old", tmp_path / "new"
    assert echolora("export", adapter, "--output", old) == 0
    before = contents(tmp_path)

    def save(self, folder, **options):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    def rename(self, target, rename=integration.Path.rename):
        if self.name == "unfinished":
            raise error
        return rename(self, target)

    if where == "weights":
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    elif where == "tokenizer":
        monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", save)
    else:
        monkeypatch.setattr(integration.Path, "rename", rename)
    for arguments in (("--output", new), ("--output", old, "--overwrite")):
        said = echolora("export", adapter, "--merged", *arguments)
        assert said == 130 if isinstance(error, KeyboardInterrupt) else "No space left" in said
        assert contents(tmp_path) == before and not new.exists()
        assert {path.name for path in tmp_path.iterdir()} == {"adapter", "old"}


def test_only_an_earlier_export_is_replaced(adapter, echolora, tmp_path, monkeypatch):
    output, other = tmp_path / "output", tmp_path / "other"
    assert echolora("export", adapter, "--output", output) == 0
    assert "--overwrite" in echolora("export", adapter, "--output", output, "--merged")
    assert echolora("export", adapter, "--output", output, "--merged", "--overwrite") == 0
    assert (output / "config.json").is_file() and not (output / "adapter_config.json").exists()
    other.mkdir()
    (other / "thesis.txt").write_text("")
    assert "no earlier export" in echolora("export", adapter, "--output", other, "--overwrite")
    for folder in (adapter, tmp_path):
        assert "another folder" in echolora("export", adapter, "--output", folder, "--overwrite")
    monkeypatch.chdir(output)
    assert "another folder" in echolora("export", adapter, "--output", output, "--overwrite")
    assert (other / "thesis.txt").is_file() and (adapter / WEIGHTS).is_file()


@pytest.mark.parametrize(("arguments", "words"), [
    (("nowhere",), ["adapter", "nowhere", "adapter_config.json"]),
    (("unfinished",), ["adapter", "unfinished", "--resume"]),
    (("adapter", "--dtype", "float64"), ["dtype", "float64", "bfloat16"]),
    (("adapter", "--model", "/no/such"), ["model", "/no/such"]),
    (("adapter", "--model", ""), ["model", "''"]),
    (("adapter", "--model", "package:"), ["model", "package", "''"]),
    (("adapter", "--model", "package:no.such"), ["model", "package", "no.such", "not installed"]),
    (("adapter", "--model", "package:../x"), ["model", "package", "../x"]),
    (("adapter", "--output", "file"), ["output", "file"]),
    (("adapter", "--output", "/proc/run"), ["output", "/proc", "cannot be written to"]),
])  # fmt: skip
def test_errors_are_one_line(adapter, echolora, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    said = echolora("export", "--output", "output", *arguments)
    assert "\n" not in said and all(word in said for word in words), said
    assert not (tmp_path / "output").exists()

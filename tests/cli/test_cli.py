"""The command line: help, results, and errors in one line."""

import io
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import base_model

from echolora_kernels import __version__
from echolora_kernels.cli import main as cli
from echolora_kernels.cli import show
from echolora_kernels.cli.app import EXAMPLES
from echolora_kernels.integrations.transformers import load_model
from echolora_kernels.training import loop


@pytest.fixture
def train(echolora, model_folder, data_file, tmp_path):
    def train(**changes):
        options = {
            "model": model_folder, "data": data_file, "output": tmp_path / "run", "steps": 3, "batch-size": 2,
            "eval-size": 4, "threads": 1, "save-every": 1, **changes,
        }  # fmt: skip
        arguments = [part for name, value in options.items() for part in _option(name, value)]
        return echolora("train", *arguments)

    return train


def _option(name, value):
    return [f"--{name}"] if value is True else [f"--{name}", value]


def test_version_and_help(echolora, capsys):
    assert echolora("--version") == 0
    assert capsys.readouterr().out.strip() == __version__
    assert echolora("train", "--help") == 0
    help = capsys.readouterr().out
    assert all(flag in help for flag in ("--model", "--kd-temperature", "--resume"))
    assert echolora("-h") == 0
    assert "--debug" in capsys.readouterr().out


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_ends_with_examples(echolora, capsys, command):
    assert echolora(*command.split(), "--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.endswith(" ".join(["Examples", *EXAMPLES[command]]))


def test_every_choice_of_the_method_has_a_flag(train, tmp_path):
    flags = {
        "echo-target-modules": "q_proj,v_proj", "source-pooling": "last", "no-detach-source": True, "norm-eps": "1e-4",
        "gate-bias": "-1", "echo-scale": "0.3", "dora-echo": "inside", "no-answer-mask": True,
        "source-layers": "4,5", "target-layers": "1", "echo-site": "output", "bottleneck": "8",
        "echo-start-probability": "0.9", "echo-end-probability": "0.1", "kd-weight": "0.5", "kd-temperature": "1.5",
        "kd-detach": "none", "step-mode": "two-pass", "seed": "3",
    }  # fmt: skip
    assert train(**flags, method="echo-dora") == 0
    chosen = json.loads((tmp_path / "run" / "metrics.json").read_text())["settings"]["echo"]
    assert chosen == {
        "target_modules": ["q_proj", "v_proj"], "source_pooling": "last", "detach_source": False, "norm_eps": 1e-4,
        "gate_bias": -1.0, "scale": 0.3, "dora_echo": "inside", "answer_mask": False,
        "source_layers": [4, 5], "target_layers": [1], "site": "output", "bottleneck": 8,
        "echo_start_probability": 0.9, "echo_end_probability": 0.1, "kd_weight": 0.5, "kd_temperature": 1.5,
        "kd_detach": "none", "step_mode": "two-pass", "seed": 3, "total_steps": 3,
    }  # fmt: skip


def test_a_run_prints_a_table_and_progress(train, capsys):
    assert train() == 0
    printed = capsys.readouterr()
    assert "exact match after" in printed.out and "largest logit difference 0" in printed.out
    assert "step 3/3" in printed.err and "tok/s" in printed.err and "p 0." in printed.err


def test_json_output_is_json(train, capsys, tmp_path):
    assert train(json=True, method="lora") == 0
    printed = json.loads(capsys.readouterr().out)
    saved = json.loads((tmp_path / "run" / "metrics.json").read_text())
    del saved["history"]
    assert printed == saved


@pytest.mark.parametrize(("changes", "words"), [
    ({"model": "/no/such/folder"}, ["model", "/no/such/folder"]),
    ({"model": "x.gguf"}, ["model", "x.gguf", "no such file"]),
    ({"model": "package:no_such_package"}, ["model", "no_such_package", "not installed"]),
    ({"model": "package:json"}, ["model", "json", "0 .gguf files"]),
    ({"data": "no_such_task"}, ["data", "no_such_task"]),
    ({"data": "missing.json"}, ["missing.json", "cannot be read"]),
    ({"method": "full"}, ["method", "full", "echo-lora"]),
    ({"rank": 0}, ["rank", "0", "at least 1"]),
    ({"save-every": 0}, ["save_every", "0"]),
    ({"echo-site": "input"}, ["site", "input", "adapter_input"]),
    ({"source-layers": "4,x"}, ["source_layers", "4,x", "numbers"]),
    ({"source-layers": "2", "target-layers": "2"}, ["target_layers", "below 2"]),
    ({"step-mode": "once"}, ["step_mode", "once", "shared"]),
    ({"target-modules": "query"}, ["target_modules", "query"]),
    ({"target-modules": ","}, ["target_modules", "names"]),
    ({"threads": 0}, ["threads", "0", "at least 1"]),
    ({"device": "gpu"}, ["device", "gpu", "cuda:N"]),
    ({"max-new-tokens": 0}, ["max_new_tokens", "0"]),
    ({"weight-decay": -1}, ["weight_decay", "-1"]),
    ({"seed": -1}, ["seed", "-1"]),
    ({"lr": "inf"}, ["lr", "inf", "finite"]),
    ({"eval-size": 60}, ["eval_size", "60"]),
])  # fmt: skip
def test_errors_are_one_line_and_name_the_argument(train, changes, words, tmp_path):
    code = train(**changes)
    assert isinstance(code, str) and code.startswith("echolora: ") and "\n" not in code
    assert all(word in code for word in words), code
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_debug_shows_the_traceback(monkeypatch):
    arguments = ["--model", "/no/such", "--data", "x", "--output", "y", "--rank", "0"]
    monkeypatch.setattr("sys.argv", ["echolora", "--debug", "train", *arguments])
    with pytest.raises(ValueError, match="rank"):
        cli.main()


@pytest.mark.parametrize(("last", "flag", "words"), [
    (0, "json", "no checkpoint yet, so the same command starts over"),
    (2, "json", "with --resume goes on from"),
    (2, "overwrite", "with --resume instead of --overwrite goes on from"),
])  # fmt: skip
def test_an_interrupted_run_says_how_to_go_on(train, monkeypatch, capsys, last, flag, words):
    take = loop.Trainer._take_step

    def interrupted(self, step):
        if step == last:
            raise KeyboardInterrupt
        return take(self, step)

    monkeypatch.setattr(loop.Trainer, "_take_step", interrupted)
    assert train(**{"save-every": 9, flag: True}) == 130
    assert words in " ".join(capsys.readouterr().err.split())


def test_pickled_weights_are_not_read(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"pickled.*safetensors alone"):
        load_model(str(folder))


def test_an_unknown_hub_name_says_what_to_do(train, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable has been read long before
    code = train(model="nobody/nothing")
    assert "nobody/nothing" in code and "local folder" in code and "network" in code


def test_a_hub_that_does_not_answer_is_told_once():
    show.quiet_libraries()
    retries = logging.getLogger("huggingface_hub.utils._http")
    assert not retries.isEnabledFor(logging.WARNING) and retries.isEnabledFor(logging.ERROR)


def test_a_gguf_file_is_converted_once(tmp_path, monkeypatch):
    """The conversion itself is transformers'; here: where it goes, that it is reused, that a failure leaves nothing."""
    from echolora_kernels.integrations import transformers as integration

    monkeypatch.setenv("ECHOLORA_CACHE", str(tmp_path / "cache"))
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"not a gguf file")
    with pytest.raises(Exception):  # noqa: B017 - whatever the reader says
        integration.resolve_model(str(gguf))
    assert list((tmp_path / "cache").iterdir()) == []
    calls = []

    class Tokenizer:
        eos_token = "<of another version>"

        def convert_ids_to_tokens(self, index):
            return f"<{index}>"

        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text(self.eos_token)

    def load(pretrained_model_name_or_path, gguf_file, dtype):
        calls.append(gguf_file)
        return base_model(eos_token_id=2)

    monkeypatch.setattr(integration.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(integration.AutoTokenizer, "from_pretrained", lambda *_, **__: Tokenizer())
    folder = integration.resolve_model(str(gguf))
    assert integration.resolve_model(str(gguf)) == folder and calls == ["tiny.gguf"]
    assert Path(folder, "tokenizer.json").read_text() == "<2>"  # answers end with the token that the model ends with
    gguf.write_bytes(b"another file")
    assert integration.resolve_model(str(gguf)) != folder and len(calls) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_something_turns_on_a_terminal_until_the_next_part_begins(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(show, "Console", lambda **_: Console(file=written, force_terminal=True))
    with show.RunDisplay() as display:
        display.stage("loading [a model]")
        display.stage("merging")
        turning = display._spinner
        with display.batches("verifying", 2) as done:
            done(2)
        assert display._spinner is None and not turning._live.is_started
        display.stage("writing")
        turning = display._spinner
    assert not turning._live.is_started
    assert [text in written.getvalue() for text in ("loading [a model]", "merging", "2/2", "writing")] == [True] * 4

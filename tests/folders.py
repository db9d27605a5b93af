"""A tiny model with a tokenizer in a folder, and a data file, as a user would have them."""

import json
from contextlib import contextmanager

import pytest
import torch

from echolora_kernels import EchoConfig
from echolora_kernels.training.settings import TrainSettings

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
COLOURS = ["red", "green", "blue"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Llama of 6 blocks, width 32, and a word tokenizer."""
    # only here, so that the tests of kernels go without PEFT and transformers
    from tiny import base_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "Question",
        ":",
        "Answer",
        "What",
        "is",
        "the",
        "colour",
        "of",
        "thing",
        "?",
        *COLOURS,
        *map(str, range(10)),
    ]
    vocabulary = {word: index for index, word in enumerate(SPECIAL + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    special = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    folder = tmp_path_factory.mktemp("model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    base_model(dtype=torch.float32, bos_token_id=1, eos_token_id=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    """Questions of different lengths whose answer follows from the number."""
    entries = [
        {
            "instruction": f"What is the colour of {'the ' * (number % 3)}thing {number % 10} {number // 10} ?",
            "input": "",
            "output": COLOURS[number % 3],
            "answer": COLOURS[number % 3],
        }
        for number in range(60)
    ]
    path = tmp_path_factory.mktemp("data") / "colours.json"
    path.write_text(json.dumps(entries, indent=2))
    return path


@pytest.fixture
def settings(model_folder, data_file):
    return run_settings(model_folder, data_file)


def run_settings(model_folder, data_file):
    return TrainSettings(
        model=str(model_folder), data=str(data_file), steps=12, batch_size=3, accumulate=2, lr=5e-3, rank=4,
        dropout=0.1, eval_size=10, device="cpu", echo=EchoConfig(bottleneck=8, scale=1.0, gate_bias=0.0),
    )  # fmt: skip


class Silent:
    """An observer that can interrupt a run after some steps."""

    def __init__(self, stop_after=None):
        self.stages, self.stop_after = [], stop_after

    def stage(self, text):
        self.stages.append(text)

    @contextmanager
    def batches(self, text, total):
        self.stages.append(text)
        yield lambda done: None

    def training(self, records, total, done):
        for record in records:
            yield record
            if record.step == self.stop_after:
                raise KeyboardInterrupt

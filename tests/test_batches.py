"""Collating samples, and which of them go together."""

import random

import pytest
import torch
from tiny import always_on, echo_model
from torch.utils.data import DataLoader

from echolora_kernels import EchoDataCollator, PromptLengthSampler
from echolora_kernels.batches import columns_to_add

IDS = [[5, 6, 7, 8], [9, 10]]
BATCH = {
    "input_ids": [[5, 6, 7, 8, 3, 3], [9, 10, 3, 3, 3, 3]],
    "attention_mask": [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]],
    "labels": [[-100, -100, -100, 8, -100, -100], [-100, 10, -100, -100, -100, -100]],
}


@pytest.mark.parametrize("answers", [
    [{"labels": [-100, -100, -100, 8]}, {"labels": torch.tensor([-100, 10])}],
    [{"prompt_length": 3}, {"prompt_length": 1}],
    [{"completion_mask": [0, 0, 0, 1]}, {"completion_mask": [False, True]}],
], ids=["labels", "prompt_length", "completion_mask"])  # fmt: skip
def test_every_way_to_say_the_answer(answers):
    features = [{"input_ids": ids, **answer} for ids, answer in zip(IDS, answers, strict=True)]
    batch = EchoDataCollator(3, pad_to_multiple_of=6)(features)
    assert {name: values.tolist() for name, values in batch.items()} == BATCH
    assert all(values.dtype == torch.int64 for values in batch.values())
    assert EchoDataCollator(3)(features)["labels"].shape == (2, 4)


def test_an_attention_mask_is_kept():
    batch = EchoDataCollator(0)([{"input_ids": [0, 4, 5], "attention_mask": [0, 1, 1], "labels": [-100, -100, 5]}])
    assert batch["attention_mask"].tolist() == [[0, 1, 1]]


@pytest.mark.parametrize(("features", "said"), [
    ([], r"features: got none"),
    ([{"input_ids": [1]}], r"features\[0\]: got keys \['input_ids'\], wants input_ids, one of labels"),
    ([{"labels": [1]}], r"features\[0\]: got keys \['labels'\]"),
    ([{"input_ids": [1], "labels": [1], "text": "a"}], r"features\[0\]: got keys .*'text'"),
    ([{"input_ids": [1], "labels": [1], "prompt_length": 0}], r"features\[0\]: got keys"),
    ([{"input_ids": [1, 2], "labels": [1]}], r"features\[0\]: got shapes \(2,\) and \(1,\) of input_ids and labels"),
    ([{"input_ids": [1, 2], "completion_mask": [1]}], r"features\[0\]: got 1 of completion_mask, wants 2"),
    ([{"input_ids": [[1]], "labels": [[1]]}], r"features\[0\]: got shapes \(1, 1\)"),
    ([{"input_ids": [1], "labels": [1], "attention_mask": [1, 1]}], r"of input_ids and attention_mask"),
])  # fmt: skip
def test_bad_samples(features, said):
    with pytest.raises(ValueError, match=said):
        EchoDataCollator(0)(features)


def test_every_epoch_visits_every_sample_once_in_another_order():
    sampler = PromptLengthSampler([n % 3 for n in range(10)], 4, seed=1)
    seen = [sampler.step(step) for step in range(5)]
    flat = [n for step in seen for n in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert PromptLengthSampler([n % 3 for n in range(10)], 4, seed=1).step(3) == seen[3]
    assert PromptLengthSampler([n % 3 for n in range(10)], 4, seed=2).step(3) != seen[3]


def test_prompts_of_a_batch_are_alike():
    lengths = [random.Random(0).randrange(10, 100) for _ in range(1)] + [
        random.Random(n).randrange(10, 100) for n in range(999)
    ]
    sampler = PromptLengthSampler(lengths, 8)

    def padding(order):
        batches = [[lengths[n] for n in order[i : i + 8]] for i in range(0, 1000, 8)]
        return sum(len(batch) * max(batch) for batch in batches) / sum(lengths) - 1

    shuffled = random.Random(1).sample(range(1000), 1000)
    assert padding(shuffled) > 0.5 and padding(sampler.order(0)) < 0.05
    order = sampler.order(0)
    middles = [sum(lengths[n] for n in order[i : i + 8]) / 8 for i in range(0, 1000, 8)]
    assert middles != sorted(middles)  # long and short batches take turns


def test_the_order_is_made_once_an_epoch(monkeypatch):
    made = []
    draw = random.Random
    monkeypatch.setattr(random, "Random", lambda seed: made.append(seed) or draw(seed))
    sampler = PromptLengthSampler([1] * 7, 3, seed=12345)
    for step in range(4):
        sampler.step(step)
    assert made == ["12345/0", "12345/1"]


@pytest.mark.parametrize(("arguments", "said"), [
    (([], 1), "prompt_lengths: got 0"), (([1], 0), "batch_size: got 0"), (([1], 1, 0), "window: got 0"),
])  # fmt: skip
def test_bad_sizes(arguments, said):
    lengths, size, *window = arguments
    with pytest.raises(ValueError, match=said):
        PromptLengthSampler(lengths, size, window=window[0] if window else 50)
    with pytest.raises(ValueError, match="pad_to_multiple_of: got 0"):
        EchoDataCollator(0, 0)


def test_in_a_data_loader():
    samples = [{"input_ids": list(range(1, 4 + n)), "prompt_length": 2 + n} for n in range(6)]
    sampler = PromptLengthSampler([sample["prompt_length"] for sample in samples], 2)
    loader = DataLoader(samples, batch_size=2, sampler=sampler, collate_fn=EchoDataCollator(0))
    sampler.set_epoch(1)
    model = echo_model(config=always_on(step_mode="auto"))
    widths = []
    for batch in loader:
        model(**batch).loss.backward()
        widths.append(batch["input_ids"].shape[1])
    assert sorted(widths) == [4, 6, 8]


def test_a_width_without_a_gradient_on_some_gpus_is_left_out():
    """64 (mod 128)."""
    widths = {
        n: EchoDataCollator(0)([{"input_ids": [1] * n, "prompt_length": 5}])["labels"].shape[1] for n in (64, 128, 192)
    }
    assert widths == {64: 65, 128: 128, 192: 193}
    rounded = {
        m: EchoDataCollator(0, m)([{"input_ids": [1] * 60, "prompt_length": 5}])["labels"].shape[1] for m in (8, 64)
    }
    assert rounded == {8: 72, 64: 128}
    assert [columns_to_add(*each) for each in ((63, 70), (64, 63), (64, 63, 62), (320,))] == [0, 2, 3, 1]

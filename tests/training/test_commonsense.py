"""examples/commonsense on a tiny model: the runs, going on, and what the report makes of them."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from echolora_kernels.errors import DataError
from echolora_kernels.training.data import collate
from echolora_kernels.training.evaluate import exact_match

FOLDER = Path(__file__).parents[2] / "examples" / "commonsense"


@pytest.fixture
def example(monkeypatch):
    """The modules of the example, by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield import_module
    for name in ("report", "experiment"):
        sys.modules.pop(name, None)


@pytest.fixture
def report(example):
    return example("report")


@pytest.fixture(scope="module")
def tasks(data_file, tmp_path_factory):
    """Two tasks of 30 questions to train on and 30 to test."""
    folder, entries = tmp_path_factory.mktemp("tasks"), json.loads(data_file.read_text())
    for index, name in enumerate(["evens", "odds"]):
        (folder / name).mkdir()
        mine = entries[index::2]
        (folder / name / "train.json").write_text(json.dumps(mine))
        (folder / name / "test.json").write_text(json.dumps(mine[::-1]))
    return folder


def words(tasks, model_folder, output, *more):
    options = {"data": tasks, "model": model_folder, "output": output, "steps": 2, "batch-size": 4, "rank": 2}
    options |= {"held-out-size": 6, "test-size": 10, "seeds": 1}
    return [text for name, value in options.items() for text in (f"--{name}", str(value))] + list(more)


def test_an_experiment_runs_goes_on_and_reports(tasks, model_folder, tmp_path, example, capsys):
    def run(*more):
        example("experiment").main(words(tasks, model_folder, tmp_path, "--lrs", "1e-3", "1e-2", *more))
        return capsys.readouterr().out

    table = run("--ablations")
    files = sorted((tmp_path / "runs").iterdir())
    assert len(files) == 1 + 4 * 2 + 4 + 6  # the untrained model, the search, the final runs
    content = json.loads((tmp_path / "results.json").read_text())
    assert len(content["runs"]) == 10 and all(len(run["right"]["odds"]) == 10 for run in content["runs"])
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    by_name = {run["name"]: run for run in content["runs"]}
    for name in ("Echo-LoRA", "no distillation", "always routed"):  # the same start, and other losses from there
        assert by_name[name]["training_loss"][0] == pytest.approx(by_name["LoRA"]["training_loss"][0], rel=1e-5)
        assert by_name[name]["loss"] != by_name["LoRA"]["loss"]
    searched = [json.loads(file.read_text()) for file in files if "seed1000" in file.name]
    for name in ("LoRA", "DoRA"):
        best = min((run for run in searched if run["name"] == name), key=lambda run: sum(run["loss"].values()))
        assert by_name[name]["lr"] == best["lr"]

    made = {file: file.stat().st_mtime_ns for file in files}
    lost = tmp_path / "runs" / f"LoRA_lr{by_name['LoRA']['lr']:g}_seed0.json"
    before = json.loads(lost.read_text())
    lost.unlink()
    assert run("--ablations") == table
    assert [file for file in files if file.stat().st_mtime_ns != made[file]] == [lost]
    after = json.loads(lost.read_text())
    for timed in (before, after):
        del timed["seconds"]
    assert after == before
    assert content["conditions"]["questions"]["odds"]["test"] == 10 and "| the most frequent answer |" in table
    with pytest.raises(SystemExit, match="other settings"):
        run("--max-length", "100")
    for other in (("--held-out-size", "7"), ("--test-size", "9"), ("--tasks", "odds")):
        with pytest.raises(SystemExit, match="other questions"):
            run(*other)


def test_a_search_that_grows_leaves_no_run_of_another_learning_rate(tasks, model_folder, tmp_path, example, capsys):
    def run(*lrs):
        example("experiment").main(words(tasks, model_folder, tmp_path, "--lrs", *lrs))
        return json.loads((tmp_path / "results.json").read_text())["runs"], capsys.readouterr().err

    run("1e-9")
    runs, told = run("1e-9", "1e-2")
    assert [(run["name"], run["lr"]) for run in runs] == [(n, 1e-2) for n in ("LoRA", "Echo-LoRA", "DoRA", "Echo-DoRA")]
    assert len(list(tmp_path.glob("runs/*seed0.json"))) == 8
    assert "LoRA: learning rate 0.01, at an end of --lrs" in told


def test_workers_give_the_results_of_one(tasks, model_folder, tmp_path, example):
    """An interrupt in the second stage ends every process (also where tests run in the background, deaf to it); what is there and what one process adds are as of one."""

    def started(output, *more):
        return words(tasks, model_folder, output, "--lrs", "1e-3", "--seeds", "2", *more)

    shared, alone = tmp_path / "shared", tmp_path / "alone"
    first = subprocess.Popen(
        [
            *("env", "--default-signal=INT", sys.executable, FOLDER / "experiment.py"),
            *started(shared, "--workers", "2", "--seeds", "9"),  # not done soon
        ],
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while not list(shared.glob("runs/*seed0.json")):
        assert first.poll() is None
        time.sleep(0.05)
    while first.poll() is None:  # again where a destructor took it
        first.send_signal(signal.SIGINT)  # to this process alone
        with contextlib.suppress(subprocess.TimeoutExpired):
            first.wait(timeout=5)
    assert first.returncode != 0 and not (shared / "results.json").exists()
    with pytest.raises(ProcessLookupError):  # once the last of its processes has gone
        for _ in range(100):
            os.killpg(first.pid, 0)
            time.sleep(0.05)
    begun = {file: file.stat().st_mtime_ns for file in (shared / "runs").iterdir()}
    assert 1 + 4 + 1 <= len(begun) < 1 + 4 + 8

    contents = []
    for output in shared, alone:
        example("experiment").main(started(output))
        contents.append(json.loads((output / "results.json").read_text()))
        for run in contents[-1]["runs"]:
            del run["seconds"]
    assert contents[0] == contents[1] and len(contents[0]["runs"]) == 8
    assert all(file.stat().st_mtime_ns == when for file, when in begun.items())
    assert {file.name for file in (shared / "runs").iterdir()} == {file.name for file in (alone / "runs").iterdir()}
    assert contents[0]["conditions"]["model"] == model_folder.name  # no path in what is kept
    assert not any(str(model_folder.parent) in file.read_text() for file in (shared / "runs").iterdir())


def test_a_worker_that_fails_ends_the_experiment(tasks, model_folder, tmp_path, example):
    script, options = example("experiment"), words(tasks, model_folder, tmp_path, "--tasks", "threes")
    with pytest.raises(DataError, match="threes"), script.workers(2) as pool:
        list(script.Plan(options, pool).done([None]))
    assert not multiprocessing.active_children()
    for flag in ("--workers", "--test-size"):
        with pytest.raises(SystemExit):
            script.main([*options, flag, "0"])


def test_intervals_cover_what_they_should(report):
    """95 % intervals of draws from a known world hold the truth about as often; nothing is drawn from a constant."""
    random, covered = np.random.default_rng(1), 0
    for _ in range(40):
        by_seed = 0.5 + 0.05 * random.standard_normal((5, 1))
        answers = {"a": (random.random((5, 100)) < by_seed).astype(float)}
        estimate = report.bootstrap(answers)["mean"]
        covered += estimate.low <= 50 <= estimate.high
    assert 30 <= covered <= 39
    constant = report.bootstrap({"a": np.ones((3, 4)), "b": np.zeros((3, 4))})
    assert constant["a"] == (100, 100, 100) and constant["mean"] == (50, 50, 50)


def test_differences_are_paired(report):
    """Ten questions that one method always gets right and the other never: exactly ten points, no spread."""
    right = ["1" * 10 + "10" * 45, "1" * 10 + "01" * 45]
    runs = [
        {"name": name, "seed": seed, "lr": 1e-3, "loss": {"a": 1.0}, "right": {"a": bits if name == "LoRA" else "0" * 10 + bits[10:]}}
        for name in ("LoRA", "Echo-LoRA")
        for seed, bits in enumerate(right)
    ]  # fmt: skip
    results = report.Results({"untrained": {"right": {"a": "01"}, "loss": {"a": 2.0}}, "runs": runs})
    other, estimate = results.difference("Echo-LoRA")
    assert other == "LoRA" and estimate.mean == pytest.approx(-10) and -17 < estimate.low < -10 < estimate.high < -3
    assert results.difference("LoRA") is None


def test_right_is_what_generation_gives(tasks, model_folder, tmp_path, example):
    """Where a model knows some answers, greedy generation gives exactly those."""
    script = example("experiment")
    experiment = script.Experiment(script.parsed(words(tasks, model_folder, tmp_path)))
    optimizer = torch.optim.Adam(experiment.base.parameters(), lr=3e-3)
    batch = collate(experiment.samples[:12], experiment.tokenizer.pad_token_id)
    for _ in range(15):
        experiment.base.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    right = experiment.asked(experiment.base, held_out=False)["right"]
    for task, parts in experiment.tasks.items():
        _, texts = exact_match(experiment.base, experiment.tokenizer, parts.test)
        assert right[task] == "".join(str(int(t == q.target)) for t, q in zip(texts, parts.test, strict=True))
        assert "1" in right[task] and "0" in right[task]

"""One of the two processes of `test_ranks`: every check of this file, and what came of them, as JSON.

    torchrun --nproc-per-node 2 worker.py FOLDER MODEL DATA

FOLDER is where both write to, MODEL and DATA are those of `folders`.
"""

import dataclasses
import json
import shutil
import sys
import traceback
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, DistributedDataParallelKwargs
from cases import (
    MODES,
    WRAPPERS,
    alone,
    assert_same,
    batches,
    gradients,
    model,
    together,
    trainable,
    values,
    wrapped,
)  # fmt: skip
from folders import Silent, run_settings
from run_cases import assert_same_run, cut
from safetensors.torch import load_file
from tiny import pad, sample
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)  # fmt: skip
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import Trainer, TrainingArguments

from echolora_kernels import NonFiniteLoss, fuse
from echolora_kernels.integrations import grouped
from echolora_kernels.integrations.trainer import EchoCallback, EchoTrainer
from echolora_kernels.training import loop
from echolora_kernels.training.checkpoint import latest_checkpoint
from echolora_kernels.training.run import train

CHECKS = {}


def check(*arguments):
    """Register a function, once with each of `arguments`."""

    def register(function):
        for argument in arguments:
            name = f"{function.__name__}[{'-'.join(argument)}]" if argument else function.__name__
            CHECKS[name] = (function, argument)
        return function

    return register


EVERY = [(wrapper, mode) for wrapper in WRAPPERS for mode in MODES]


@check(*EVERY, ("fsdp2, root resharded", "shared"))
def gradients_are_those_of_one_process(wrapper, mode, folder):
    variants = (
        ("native", False, {"dora": True, "dora_echo": "inside"}),
        ("peft", False, {"dora": True, "dora_echo": "inside", "detach_source": False}),
        ("peft", False, {"site": "adapter_input"}),
        ("peft", True, {"dora": True}),
    )
    for kind, fused, choices in variants:
        one, two = model(mode, kind, **choices), model(mode, kind, **choices)
        if fused:
            grouped.MIN_ROWS = 1
            assert fuse(two, strict=True).grouped
        two = wrapped(two, wrapper)
        inner = getattr(two, "module", two)
        for step, routed in enumerate((True, False)):
            assert one.routed == inner.routed == routed
            alone(one, step)
            together(two, step)
            assert_same(gradients(two), gradients(one))
            assert all((grad is not None) == routed for name, grad in gradients(two).items() if "echo_net" in name)
            for module in (one, inner):
                module.zero_grad()
                module.advance()


@check(("ddp",), ("fsdp2",))
def gradients_with_checkpointing_are_those_of_one_process(wrapper, folder):
    one, two = model("two-pass"), model("packed")
    two.model.enable_input_require_grads()
    two.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    two = wrapped(two, wrapper)
    for step in range(2):
        alone(one, step)
        together(two, step)
        assert_same(
            gradients(two), gradients(one), 1e-6
        )  # norms are float32 within, over other rows than in two passes
        for module in (one, getattr(two, "module", two)):
            module.zero_grad()
            module.advance()


@check(*EVERY)
def saved_and_resumed_training_is_that_of_one_process(wrapper, mode, folder):
    """AdamW with weight decay: what has no gradient on a step must not move, nor its moments."""
    one = model(mode)
    optimizer = torch.optim.AdamW(trainable(one), lr=0.01, weight_decay=0.1)
    for step in range(3):
        alone(one, step)
        _update(one, optimizer)

    two, steps = wrapped(model(mode), wrapper), range(2)
    for attempt in range(2):
        inner = getattr(two, "module", two)
        optimizer = torch.optim.AdamW(trainable(two), lr=0.01, weight_decay=0.1)
        if attempt == 1:
            _load(inner, optimizer, folder / f"{wrapper}-{mode}")
            assert inner.step == 2
        for step in steps:
            together(two, step)
            _update(inner, optimizer)
        if attempt == 0:
            _save(inner, optimizer, folder / f"{wrapper}-{mode}")
            two, steps = wrapped(model(mode, start=8), wrapper), range(2, 3)
    assert_same(values(two), values(one), 1e-9)


def _update(echo, optimizer):
    optimizer.step()
    optimizer.zero_grad()
    echo.advance()


def _save(echo, optimizer, path):
    weights, moments = get_state_dict(echo, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=path)


def _load(echo, optimizer, path):
    weights, moments = get_state_dict(echo, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(echo, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


@check(("fsdp2",))
def the_exported_adapter_is_that_of_one_process(wrapper, folder):
    one, two = model("shared"), wrapped(model("shared"), wrapper)
    together(two, 0)
    one.remove().save_pretrained(folder / "one" / str(dist.get_rank()))
    plain = two.remove()
    whole = get_model_state_dict(plain, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        plain.save_pretrained(folder / "two", state_dict=whole)
        wanted, got = (load_file(folder / name / "adapter_model.safetensors") for name in ("one/0", "two"))
        assert wanted.keys() == got.keys() and all(torch.equal(got[name], value) for name, value in wanted.items())
    dist.barrier()


@check(*EVERY)
def accumulated_micro_batches_are_sent_once(wrapper, mode, folder):
    one, two = model(mode), wrapped(model(mode), wrapper)
    for step in range(2):
        alone(one, step)
    if wrapper == "ddp":
        with two.no_sync():
            together(two, 0)
    else:
        two.set_requires_gradient_sync(False)
        together(two, 0)
        two.set_requires_gradient_sync(True)
    together(two, 1)
    assert_same(gradients(two), gradients(one))


@check(*EVERY)
def a_rank_without_any_answer_goes_along(wrapper, mode, folder):
    one, two = model(mode), wrapped(model(mode), wrapper)
    part, items = batches(0)[0][0], int((batches(0)[0][0]["labels"] != -100).sum())
    one(**part, num_items_in_batch=items).loss.backward()
    if dist.get_rank() == 1:
        part["labels"].fill_(-100)
    (two(**part, num_items_in_batch=items).loss * 2).backward()
    assert_same(gradients(two), gradients(one))


@check(*EVERY)
def outside_of_training_it_is_the_plain_model(wrapper, mode, folder):
    one, two = model(mode).eval(), wrapped(model(mode), wrapper).eval()
    ids = batches(0)[0][0]["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(two(ids).logits, one(ids).logits, rtol=1e-12, atol=1e-12)
    inner = getattr(two, "module", two)
    if wrapper == "fsdp2":
        register_fsdp_forward_method(inner, "generate")
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(inner.generate(**prompt), one.generate(**prompt))


@check(*((mode,) for mode in MODES))
def accelerate_prepares_it(mode, folder):
    one, two = model(mode), model(mode)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    prepared, optimizer = accelerator.prepare(two, torch.optim.SGD(trainable(two), lr=0.1))
    assert accelerator.num_processes == 2 and accelerator.unwrap_model(prepared) is two
    for step in range(3):
        alone(one, step)
        parts, items = batches(step)
        output = prepared(**parts[dist.get_rank()], num_items_in_batch=items)
        accelerator.backward(output.loss * accelerator.num_processes)
        assert_same(gradients(two), gradients(one))
        _update(two, optimizer)
        one.zero_grad()
        one.advance()
        one.load_state_dict(two.state_dict())


def settings_of_runs():
    return dataclasses.replace(run_settings(*sys.argv[2:]), dropout=0.0)


@check(("lora",), ("echo-dora",))
def a_broken_run_ends_as_the_unbroken_one(method, folder):
    """With dropout: a resumed run draws the masks that the unbroken one drew."""
    settings = dataclasses.replace(settings_of_runs(), method=method, dropout=0.3, steps=6)
    whole, broken = folder / f"{method}-whole", folder / f"{method}-broken"
    metrics = train(settings, whole, Silent(), save_every=2)
    with pytest.raises(KeyboardInterrupt):  # in both, as torchrun passes an interrupt on
        _stopped_after(3, settings, broken)
    dist.barrier()
    assert latest_checkpoint(broken / "checkpoints").name == "step-000003"
    resumed = train(settings, broken, Silent(), save_every=2, resume=True)
    assert metrics["processes"] == 2 and metrics["routed_steps"] == resumed["routed_steps"]
    ends = [load_file(output / "adapter" / "adapter_model.safetensors") for output in (whole, broken)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert [r["loss"] for r in metrics["history"]] == [r["loss"] for r in resumed["history"]]


def _stopped_after(step, settings, output):
    take = loop.Trainer._take_step

    def stopping(self, at):
        if at == step:
            raise KeyboardInterrupt
        return take(self, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_take_step", stopping)
        train(settings, output, Silent(), save_every=2)


@check(())
def two_processes_go_on_from_the_checkpoint_of_one(folder):
    """The fixture that starts this left a finished run in `one`."""
    copy = folder / "copy"
    if dist.get_rank() == 0:
        cut(shutil.copytree(folder / "one", copy))
    dist.barrier()
    assert train(settings_of_runs(), copy, Silent(), resume=True)["processes"] == 2
    assert_same_run(copy, folder / "one")


@check(())
def a_step_of_one_sample_leaves_the_other_process_without(folder):
    settings = dataclasses.replace(settings_of_runs(), batch_size=1, accumulate=1, steps=3)
    history = train(settings, folder / "one-sample", Silent())["history"]
    assert all(record["loss"] > 0 and record["grad_norm"] > 0 for record in history)


@check(())
def what_the_first_process_refuses_all_refuse(folder):
    (folder / "occupied" / "adapter").mkdir(parents=True, exist_ok=True)
    with pytest.raises(FileExistsError, match="--resume"):
        train(settings_of_runs(), folder / "occupied", Silent())


@check(())
def a_loss_that_is_no_number_in_one_process_stops_all(folder):
    run = loop.Trainer._run

    def poisoned(self, batch, num_items):
        output = run(self, batch, num_items)
        factor = float("nan") if (self.step, self.processes.rank) == (2, 1) else 1.0
        return {**output, "loss": output["loss"] * factor}

    with pytest.MonkeyPatch.context() as patch, pytest.raises(NonFiniteLoss, match="loss became nan at step 3"):
        patch.setattr(loop.Trainer, "_run", poisoned)
        train(settings_of_runs(), folder / "poisoned", Silent())


@check(("Trainer",), ("EchoTrainer",))
def transformers_trainer_wraps_it(kind, folder):
    """Each epoch is one step of all samples, two in each process, whatever their order."""
    one, two = model("shared"), model("shared")
    samples = [sample(*lengths) for lengths in ((5, 3), (8, 2), (3, 4), (4, 6))]
    arguments = TrainingArguments(
        output_dir=folder / kind, use_cpu=True, per_device_train_batch_size=2, max_steps=3, learning_rate=0.01,
        lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, report_to=[], save_strategy="steps", save_steps=2,
        remove_unused_columns=False, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    options = {"args": arguments, "train_dataset": samples, "data_collator": pad}
    kinds = {"Trainer": partial(Trainer, callbacks=[EchoCallback]), "EchoTrainer": EchoTrainer}
    trainer = kinds[kind](model=two, **options)
    trainer.train()
    optimizer = torch.optim.SGD(trainable(one), lr=0.01)
    for log in trainer.state.log_history[:3]:
        output = one(**pad(samples))
        for name in ("loss", "loss_off", "loss_on", "loss_kd"):
            expected = None if output[name] is None else pytest.approx(output[name].item(), rel=1e-5)
            assert log.get(name) == expected, name
        output.loss.backward()
        _update(one, optimizer)
    assert two.step == 3
    assert_same(values(two), values(one), 1e-9)
    resumed = model("shared")
    with torch.no_grad():
        for parameter in trainable(resumed):
            parameter.zero_()
    kinds[kind](model=resumed, **options).train(resume_from_checkpoint=str(folder / kind / "checkpoint-2"))
    assert_same(values(resumed), values(two))


@check(())
def every_rank_draws_the_same_routing(folder):
    echo, draws = model("shared"), []
    for echo.step in range(100):
        draws.append(echo.routed)
    found = [None, None]
    dist.all_gather_object(found, draws)
    assert found[0] == found[1] and 20 < sum(draws) < 80


def main(folder):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="echolora_kernels")
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    rank, outcomes = dist.get_rank(), {}
    for name, (function, arguments) in CHECKS.items():
        try:
            function(*arguments, folder)
            outcomes[name] = None
        except Exception:
            outcomes[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(outcomes))
        if outcomes[name]:
            sys.exit(1)  # the other rank may wait for this one for ever
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

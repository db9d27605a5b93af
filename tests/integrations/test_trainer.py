"""transformers' Trainer with an `EchoLoRA` as the model."""

import copy
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

import echolora_kernels
from echolora_kernels import CheckpointError, EchoDataCollator
from echolora_kernels.integrations.trainer import EchoCallback, EchoTrainer

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
both = pytest.mark.parametrize("kind", [Trainer, EchoTrainer])


def echo_model(seed=0, family="llama", **options):
    """The same model each time; half of the steps are routed."""
    torch.manual_seed(seed)
    config = tiny.always_on(echo_start_probability=0.5, echo_end_probability=0.5, step_mode="auto")
    return tiny.echo_model(config=config, family=family, **options)


def samples(count=14):
    """Prompts of 3 to 5 tokens and answers of 1 to 4."""
    torch.manual_seed(1)
    return [
        dict(zip(("input_ids", "labels"), tiny.sample(3 + index % 3, 1 + index % 4), strict=True))
        for index in range(count)
    ]


def trainer_of(echo, folder, kind=Trainer, callbacks=(), eval_dataset=None, **options):
    defaults = {"max_steps": 6, "per_device_train_batch_size": 3, "learning_rate": 1e-2, "logging_steps": 1}
    args = TrainingArguments(
        folder, **{**defaults, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", **options}
    )
    callbacks = [*callbacks, *([EchoCallback()] if kind is Trainer else [])]
    return kind(
        model=echo,
        args=args,
        train_dataset=samples(),
        eval_dataset=eval_dataset,
        data_collator=EchoDataCollator(0),
        callbacks=callbacks,
    )


def trained(echo):
    return {name: p.detach().clone() for name, p in echo.named_parameters() if p.requires_grad}


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in state.items())


class Gradients(TrainerCallback):
    """Those of every optimizer step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(tiny.gradients(model))


@both
def test_gradients_and_logs_are_those_of_a_plain_loop(kind, tmp_path):
    """With three micro-batches a step, of unequal numbers of tokens, and an incomplete step at the end of an epoch."""
    echo, seen = echo_model(), Gradients()
    ours = copy.deepcopy(echo)
    trainer = trainer_of(
        echo,
        tmp_path,
        kind,
        [seen],
        gradient_accumulation_steps=3,
        per_device_train_batch_size=2,
        max_steps=5,
        logging_steps=2,
        train_sampling_strategy="sequential",
        max_grad_norm=0,
        optim="sgd",
    )
    trainer.train()
    data, collate = samples(), EchoDataCollator(0)
    batches = [collate(data[start : start + 2]) for start in range(0, 14, 2)]
    steps = [batches[:3], batches[3:6], batches[6:]]
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step, gradients in enumerate(seen.seen):
        micro = steps[step % 3]
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro)
        outputs = [ours(**batch, num_items_in_batch=items) for batch in micro]
        sum(output.loss for output in outputs).backward()
        expected = tiny.gradients(ours)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=1e-12)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 5)
        optimizer.step()
        optimizer.zero_grad()
        names = ("loss", "loss_off", "loss_on", "loss_kd") if ours.routed else ("loss", "loss_off")
        summed = {name: sum(output[name].detach() for output in outputs) for name in names}
        losses.append({**summed, "routed": ours.routed, "echo_probability": ours.echo_probability})
        ours.advance()
    assert len(losses) == 5 and echo.step == 5
    assert 0 < sum(step["routed"] for step in losses) < 5
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log, two in zip(logs, (losses[:2], losses[2:4]), strict=True):
        for name in ("loss", "loss_off", "loss_on", "loss_kd", "routed", "echo_probability"):
            values = [float(step[name]) for step in two if name in step]
            if values:
                assert log[name] == pytest.approx(sum(values) / len(values), rel=1e-5), name
            else:
                assert name not in log


@both
def test_models_that_take_no_number_of_items(kind, tmp_path):
    """Then each micro-batch has a mean, and the trainer divides by their number."""
    echo = echo_model()
    echo.model.get_base_model().accepts_loss_kwargs = False
    trainer = trainer_of(echo, tmp_path, kind, gradient_accumulation_steps=2, max_steps=4)
    trainer.train()
    for log in trainer.state.log_history[:4]:
        parts = log["loss_off"] + (log["loss_on"] + log["loss_kd"] if log["routed"] else 0)
        assert log["loss"] == pytest.approx(parts, rel=1e-5)


def test_autocast(tmp_path):
    echo = echo_model(dtype=torch.float32)
    trainer = trainer_of(echo, tmp_path, EchoTrainer, bf16=True)
    trainer.train()
    assert echo.step == 6 and all(torch.isfinite(value).all() for value in trained(echo).values())
    assert "loss_on" in trainer.state.log_history[1]


@both
def test_evaluation_has_no_echo(kind, tmp_path):
    echo = echo_model()
    held_out = samples(5)
    trainer = trainer_of(echo, tmp_path, kind, eval_dataset=held_out, eval_strategy="steps", eval_steps=2)

    def of_the_plain_model():
        plain = copy.deepcopy(echo).remove()
        options = {"eval_dataset": held_out, "data_collator": EchoDataCollator(0)}
        return Trainer(model=plain, args=trainer.args, **options).evaluate()["eval_loss"]

    assert trainer.evaluate()["eval_loss"] == of_the_plain_model()
    trainer.train()
    assert len([log for log in trainer.state.log_history if "eval_loss" in log]) == 3
    assert trainer.state.log_history[-2]["eval_loss"] == of_the_plain_model()


@both
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_resumed_run_is_the_unbroken_one(kind, family, tmp_path):
    """Weights, echo networks, routing and logs, with dropout, from the middle of an epoch."""
    options = {"family": family, "dropout": 0.2}
    whole = echo_model(**options)
    unbroken = trainer_of(whole, tmp_path / "unbroken", kind, save_strategy="steps", save_steps=3)
    unbroken.train()
    resumed = echo_model(**options)
    with torch.no_grad():
        for parameter in resumed.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    trainer = trainer_of(resumed, tmp_path / "resumed", kind)
    trainer.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-3"))
    assert_same(trained(resumed), trained(whole))
    assert resumed.step == whole.step == 6

    def logs(which):
        kept = ("loss", "loss_off", "loss_on", "loss_kd", "routed", "grad_norm", "step")
        return [{k: log.get(k) for k in kept} for log in which.state.log_history if "loss" in log]

    assert logs(trainer) == logs(unbroken) and len(logs(trainer)) == 6


@both
def test_checkpoints_hold_what_trains_alone(kind, tmp_path):
    echo = echo_model()
    trainer_of(echo, tmp_path, kind, save_strategy="steps", save_steps=6).train()
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert saved.pop("_extra_state") == 6
    assert_same(saved, trained(echo))


@both
def test_the_best_checkpoint_is_loaded(kind, tmp_path):
    echo = echo_model()
    trainer = trainer_of(
        echo,
        tmp_path,
        kind,
        eval_dataset=samples(5),
        learning_rate=1.0,  # so that the first is the best
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        max_steps=3,
    )
    trainer.train()
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    assert best.pop("_extra_state") == echo.step
    assert_same(best, trained(echo))


def test_the_package_has_them():
    assert echolora_kernels.EchoCallback is EchoCallback
    assert issubclass(echolora_kernels.EchoTrainer, echolora_kernels.EchoTrainerMixin)
    with pytest.raises(AttributeError, match="no attribute 'EchoTrainers'"):
        _ = echolora_kernels.EchoTrainers


def test_a_plain_trainer_leaves_an_adapter_to_save(tmp_path):
    echo = echo_model(family="llama-tied")
    trainer = trainer_of(echo, tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "checkpoint"))  # what trains
    assert_same(dict(load_file(tmp_path / "checkpoint" / "model.safetensors")), dict(echo.state_dict()))
    echo.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(0)
    stock = PeftModel.from_pretrained(tiny.base_model("llama-tied"), tmp_path / "adapter", autocast_adapter_dtype=False)
    ids = torch.randint(1, tiny.VOCAB, (2, 7))
    assert torch.equal(stock.eval()(ids).logits, echo.eval()(ids).logits)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_save_model_writes_an_adapter_for_stock_peft(family, tmp_path):
    echo = echo_model(family=family)
    trainer = trainer_of(echo, tmp_path, EchoTrainer, save_strategy="steps", save_steps=6)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names >= ADAPTER and names - ADAPTER <= {"README.md", "training_args.bin"}
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    ids = torch.randint(1, tiny.VOCAB, (2, 7))
    with echo.echo_off():
        expected = echo.eval()(ids).logits
    for folder in ("adapter", "checkpoint-6"):
        torch.manual_seed(0)
        base = tiny.base_model(family)
        stock = PeftModel.from_pretrained(base, tmp_path / folder, autocast_adapter_dtype=False).eval()
        assert torch.equal(stock(ids).logits, expected)
    assert trainer.model is echo


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    echo = echo_model()
    trainer = trainer_of(echo, tmp_path)
    state = echo.state_dict()
    state.pop(next(name for name in state if "lora_A" in name))
    with pytest.raises(CheckpointError, match=r"lacks .*lora_A.*, which train"):
        echo.load_state_dict(state, strict=False)
    assert trainer.model is echo


def test_what_reports_logs_sees_the_losses(tmp_path):
    class Reporter(TrainerCallback):
        seen = ()

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen += (set(logs),)

    reporter = Reporter()
    trainer_of(echo_model(), tmp_path, EchoTrainer, [reporter], max_steps=1).train()
    assert {"loss_off", "routed", "echo_probability"} <= reporter.seen[0]
    assert not {"loss_off", "routed"} & reporter.seen[1]  # the summary


def test_prompt_lengths_reach_the_collator(tmp_path):
    echo = echo_model()
    trainer = trainer_of(echo, tmp_path, EchoTrainer, max_steps=1, remove_unused_columns=False)
    trainer.train_dataset = [{"input_ids": s["input_ids"], "prompt_length": s["labels"].count(-100)} for s in samples()]
    trainer.train()
    assert echo.step == 1


def test_generation_while_training_has_no_echo(tmp_path):
    echo = echo_model()
    ids = torch.randint(1, tiny.VOCAB, (2, 5))

    class Generate(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            plain = copy.deepcopy(model)
            seen = model.generate(ids, max_new_tokens=5, do_sample=False)
            assert torch.equal(seen, plain.remove().generate(ids, max_new_tokens=5, do_sample=False))

    trainer_of(echo, tmp_path, callbacks=[Generate()], max_steps=2).train()
    assert echo.step == 2


@both
def test_gradient_checkpointing(kind, tmp_path):
    echo, seen = echo_model(), Gradients()
    trainer_of(echo, tmp_path / "a", kind, [seen], max_steps=2).train()
    again, other = echo_model(), Gradients()
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    trainer_of(again, tmp_path / "b", kind, [other], max_steps=2, **options).train()
    for ours, theirs in zip(seen.seen, other.seen, strict=True):
        for name, gradient in ours.items():
            torch.testing.assert_close(theirs[name], gradient, rtol=1e-8, atol=1e-10)


def test_other_models_and_other_losses_are_refused(tmp_path):
    with pytest.raises(TypeError, match="model: got PeftModel, wants an EchoLoRA"):
        trainer_of(tiny.peft_model(), tmp_path, EchoTrainer)
    with pytest.raises(TypeError, match="wants an EchoLoRA"):
        trainer_of(tiny.peft_model(), tmp_path).train()
    with pytest.raises(ValueError, match=r"args.label_smoothing_factor: got 0.1, wants 0"):
        trainer_of(echo_model(), tmp_path, EchoTrainer, label_smoothing_factor=0.1)

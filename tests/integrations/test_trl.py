"""TRL's SFTTrainer with an `EchoLoRA` as the model; skipped where trl is not installed."""

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from echolora_kernels import EchoLoRA
from echolora_kernels.integrations.trainer import EchoTrainerMixin

trl = pytest.importorskip("trl", reason="trl is not installed (pip install trl)")
datasets = pytest.importorskip("datasets")


class EchoSFTTrainer(EchoTrainerMixin, trl.SFTTrainer):
    pass


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("CI", "1")  # trl reports its use over the network elsewhere


def echo_model(folder):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = tiny.randomise(get_peft_model(base, LoraConfig(r=3, target_modules=tiny.TARGETS)))
    config = tiny.always_on(step_mode="shared", echo_start_probability=0.5, echo_end_probability=0.5)
    return tiny.randomise(EchoLoRA(model, config).train())


def questions():
    """Prompts and completions of different lengths."""
    colours = ["red", "green", "blue red"]
    return datasets.Dataset.from_list(
        [
            {
                "prompt": f"Question : What is the colour of {'the ' * (n % 3)}thing {n} ?",
                "completion": f" {colours[n % 3]}",
            }
            for n in range(10)
        ]
    )


def trainer_of(echo, model_folder, folder, kind=EchoSFTTrainer, callbacks=(), **options):
    defaults = {"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "gradient_accumulation_steps": 2}
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    args = trl.SFTConfig(
        str(folder), **{**defaults, **quiet, "gradient_checkpointing": False, "learning_rate": 1e-2, **options}
    )
    return kind(
        model=echo,
        args=args,
        train_dataset=questions(),
        eval_dataset=questions(),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        callbacks=list(callbacks),
    )


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.step, self.gradients = model.step, tiny.gradients(model)


def test_prompt_completion_data(model_folder, tmp_path):
    """Echo in, adapter out; the collator is TRL's own, evaluation too."""
    echo, seen = echo_model(model_folder), Gradients()
    before = {name: value.clone() for name, value in echo.state_dict().items()}
    trainer = trainer_of(echo, model_folder, tmp_path, callbacks=[seen], max_grad_norm=0)
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4 == echo.step
    assert 0 < sum(log["routed"] for log in logs) < 4
    for log in logs:
        losses = log["loss_off"] + (log["loss_on"] + log["loss_kd"] if log["routed"] else 0)
        assert log["loss"] == pytest.approx(losses, rel=1e-5)
    assert all(not torch.equal(value, before[name]) for name, value in echo.state_dict().items() if "lora_B" in name)
    assert all((batch["labels"][:, :5] == -100).all() for batch in batches)

    trainer.save_model(str(tmp_path / "adapter"))
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    stock = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.randint(4, 20, (2, 7))
    assert torch.equal(stock(ids).logits, echo.eval()(ids).logits)


def test_gradients_are_those_of_a_plain_loop(model_folder, tmp_path):
    echo, seen = echo_model(model_folder), Gradients()
    options = {"train_sampling_strategy": "sequential", "max_steps": 1, "max_grad_norm": 0}
    trainer = trainer_of(echo, model_folder, tmp_path, callbacks=[seen], **options)
    batches = list(trainer.get_train_dataloader())[:2]
    trainer.train()
    ours = echo_model(model_folder)
    items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    sum(ours(**batch, num_items_in_batch=items).loss for batch in batches).backward()
    expected = tiny.gradients(ours)
    assert seen.step == 0 and seen.gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(seen.gradients[name], gradient, rtol=1e-5, atol=1e-6)


def test_evaluation_is_that_of_the_plain_model(model_folder, tmp_path):
    """TRL's loss and accuracy."""
    echo = echo_model(model_folder)
    ours = trainer_of(echo, model_folder, tmp_path / "ours").evaluate()
    plain = trainer_of(echo_model(model_folder).remove(), model_folder, tmp_path / "plain", trl.SFTTrainer).evaluate()
    for name in ("eval_loss", "eval_mean_token_accuracy", "eval_entropy"):
        assert ours[name] == plain[name], name


def test_a_resumed_run_is_the_unbroken_one(model_folder, tmp_path):
    whole, resumed = echo_model(model_folder), echo_model(model_folder)
    trainer_of(whole, model_folder, tmp_path, save_strategy="steps", save_steps=2).train()
    trainer = trainer_of(resumed, model_folder, tmp_path / "resumed")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    state, other = whole.state_dict(), resumed.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())
    assert resumed.step == 4


def test_checkpointed_blocks(model_folder, tmp_path):
    """Gradient checkpointing is TRL's default."""
    echo = echo_model(model_folder)
    echo.echo_config = tiny.always_on(step_mode="packed")
    trainer_of(echo, model_folder, tmp_path, gradient_checkpointing=True, max_steps=1).train()
    assert echo.step == 1


def test_options_that_do_not_go_together(model_folder, tmp_path):
    for name, value in (("loss_type", "dft"), ("packing", True), ("padding_free", True)):
        with pytest.raises(ValueError, match=f"args.{name}: got {value!r}, wants"):
            trainer_of(echo_model(model_folder), model_folder, tmp_path, **{name: value})

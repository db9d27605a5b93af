"""Where an echo can get lost without a sound: recomputation, copies, configuration that does not arrive."""

import copy
import io
import warnings

import pytest
import torch
from tiny import always_on, batch, echo_model, gradients, pad, peft_model, sample
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from echolora_kernels import EchoConfig, EchoLoRA
from echolora_kernels.method.inject import Injector

KINDS = pytest.mark.parametrize("kind", ["peft", "native"])


@pytest.fixture
def echoes(monkeypatch):
    """Every echo that an ON pass was given."""
    seen = []
    injecting = Injector.injecting

    def record(self, echoes):
        if echoes is not None:
            seen.append(echoes)
        return injecting(self, echoes)

    monkeypatch.setattr(Injector, "injecting", record)
    return seen


@KINDS
@pytest.mark.parametrize("implementation", [CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT])
def test_checkpointing_that_cannot_carry_the_echo_is_refused(kind, implementation):
    wrapped = echo_model(kind)
    blocks = set(wrapped.source_blocks) | set(wrapped.injector._blocks)
    wrapped.model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_())
    apply_activation_checkpointing(
        wrapped.model,
        checkpoint_wrapper_fn=lambda block: checkpoint_wrapper(block, checkpoint_impl=implementation),
        check_fn=lambda module: module in blocks,
    )
    with pytest.raises(RuntimeError, match="gradient_checkpointing_enable"):
        wrapped(**batch(), use_cache=False).loss.backward()
    with wrapped.echo_off():  # the plain model may do as it likes
        wrapped(**batch(), use_cache=False).loss.backward()


def test_boundary_states_with_gradient_refuse_reentrant_checkpointing():
    wrapped = echo_model(config=always_on(detach_source=False))
    wrapped.model.enable_input_require_grads()
    wrapped.model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match=r"detach_source: got False.*reentrant"):
        wrapped(**batch())
    wrapped.model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped(**batch()).loss.backward()


def same_step(first, second):
    inputs = batch()
    outputs = [model(**inputs) for model in (first, second)]
    assert outputs[0].loss_on != outputs[0].loss_off
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    for output in outputs:
        output.loss.backward()
    found = [gradients(model) for model in (first, second)]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


@KINDS
def test_a_deep_copy_has_an_echo_of_its_own(kind):
    wrapped = echo_model(kind)
    twin = copy.deepcopy(wrapped)
    same_step(wrapped, twin)
    wrapped.remove()
    assert twin(**batch()).loss_on != twin(**batch()).loss_off


@KINDS
def test_a_saved_and_loaded_wrapper_still_trains_with_the_echo(kind):
    wrapped = echo_model(kind)
    file = io.BytesIO()
    torch.save(wrapped, file)
    file.seek(0)
    same_step(wrapped, torch.load(file, weights_only=False))


def test_the_echo_reaches_every_real_position_without_the_answer_mask(echoes):
    inputs = pad([sample(3, 2), sample(6, 1)], "left")
    for answer_mask, expected in ((True, inputs["labels"] != -100), (False, inputs["attention_mask"] != 0)):
        echo_model(config=always_on(answer_mask=answer_mask))(**inputs)
        assert all(torch.equal(echo.mask, expected) for echo in echoes.pop().values())


@pytest.mark.parametrize("choice", [{"norm_eps": 10.0}, {"source_pooling": "last"}, {"source_layers": (5,)}])
def test_how_the_state_is_pooled_arrives(choice, echoes):
    for config in (always_on(source_layers=(3, 4)), always_on(**{"source_layers": (3, 4), **choice})):
        torch.manual_seed(2)
        echo_model(config=config)(**batch())
    plain, other = echoes
    assert all(not torch.allclose(plain[key].delta, other[key].delta) for key in plain)


def test_adapters_that_do_not_train_are_refused():
    model = peft_model().requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        EchoLoRA(model, EchoConfig())


def test_echo_networks_are_never_narrower_than_float32():
    wrapped = EchoLoRA(peft_model(dtype=torch.bfloat16), EchoConfig()).train()
    assert {p.dtype for p in wrapped.echo_networks.parameters()} == {torch.float32}
    wrapped(**batch()).loss.backward()


def test_an_output_item_that_is_set_is_the_one_a_trainer_reads():
    output = echo_model()(**batch())
    output.loss = output.loss * 2
    assert output["loss"] is output.loss


def test_warnings_point_at_the_caller():
    empty = pad([(sample(6, 0)[0], [-100] * 6)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        echo_model()(**empty)
    ours = [warning for warning in caught if "no supervised token" in str(warning.message)]
    assert [warning.filename for warning in ours] == [__file__]

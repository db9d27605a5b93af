"""The shared and the packed step against the two-pass form: the same losses and gradients, and when each is taken."""

import dataclasses
import logging

import pytest
import torch
from tiny import FAMILIES, VOCAB, always_on, batch, echo_model, gradients, pad, sample
from torch import nn

from echolora_kernels import EchoLoRA, EchoLoRALinear
from echolora_kernels.ops.echo_lora_linear import SITES

FORMS = pytest.mark.parametrize("form", ["shared", "packed"])
LOSSES = ("loss", "loss_off", "loss_on", "loss_kd")


def step(model, mode, data, **options):
    """Losses and gradients of one step in `mode`."""
    model.echo_config = dataclasses.replace(model.echo_config, step_mode=mode)
    model.zero_grad()
    output = model(**data, **options)
    output.loss.backward()
    return output, gradients(model)


def checkpoint(model, use_reentrant):
    model.model.enable_input_require_grads()
    model.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})


def assert_same_step(form, model, data, tolerance=2e-6, prepare=lambda model: None, **options):
    """float32 norms inside float64 models leave about 1e-7. `prepare` changes the model between the two."""
    want, want_grads = step(model, "two-pass", data, **options)
    prepare(model)
    got, got_grads = step(model, form, data, **options)
    for name in LOSSES:
        assert (got[name] is None) == (want[name] is None)
        if want[name] is not None:
            torch.testing.assert_close(got[name], want[name], rtol=tolerance, atol=tolerance)
    assert got.skipped_samples == want.skipped_samples and got.routed == want.routed
    assert got.logits is None
    assert got_grads.keys() == want_grads.keys() and len(got_grads) > 10
    for name, gradient in want_grads.items():
        error = (got_grads[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-6)
        assert error < (tolerance if gradient.dtype == torch.float64 else 1e-4), (name, error)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["peft", "native"])
@pytest.mark.parametrize("family", FAMILIES)
@FORMS
def test_every_family(form, family, kind, dora, side):
    torch.manual_seed(0)
    assert_same_step(form, echo_model(kind, family=family, dora=dora), batch(side))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
def test_checkpointing_in_every_family(site, family, use_reentrant):
    """The packed step's recomputation sees the echo of its own pass."""
    torch.manual_seed(0)
    model = echo_model(family=family, config=always_on(site=site))
    runs = []
    norms = [module for name, module in model.named_modules() if name.endswith("layers.3.input_layernorm")]
    norms[0].register_forward_hook(lambda module, args, output: runs.append(torch._C._current_graph_task_id() != -1))
    assert_same_step("packed", model, batch(), prepare=lambda model: checkpoint(model, use_reentrant))
    assert runs.count(True) == 1 and runs[-1]  # the row, again in its backward pass


@FORMS
def test_plain_rotary_positions_are_exact_in_float64(form):
    """With norms in float64 nothing but the order of sums is left."""
    torch.manual_seed(0)
    model = echo_model()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = lambda x, m=module: m.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        if type(module).__name__ == "LlamaRotaryEmbedding":
            module.inv_freq = module.inv_freq.double()
    data = batch()
    (want, want_grads), (got, got_grads) = (step(model, mode, data) for mode in ("two-pass", form))
    assert abs(got.loss - want.loss) < 1e-12 * want.loss.abs()
    for name, gradient in want_grads.items():
        assert (got_grads[name] - gradient).abs().max() < 1e-9 * gradient.abs().max(), name


@pytest.mark.parametrize("choices", [
    {"site": "adapter_input"}, {"site": "rank"}, {"dora_echo": "inside"}, {"source_pooling": "last"},
    {"detach_source": False}, {"kd_detach": "none"}, {"kd_detach": "off"}, {"kd_temperature": 0.7, "kd_weight": 3.0},
    {"target_modules": ("q_proj", "up_proj")}, {"source_layers": (5,), "target_layers": (0, 1, 2)},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["peft", "native"])
@FORMS
def test_every_choice_of_the_method(form, kind, choices):
    torch.manual_seed(0)
    model = echo_model(kind, always_on(**choices), dora="dora_echo" in choices)
    if form == "packed" and choices.get("detach_source") is False:
        with pytest.raises(RuntimeError, match="got 'packed', which cannot be done: detach_source is False"):
            step(model, form, batch())
    else:
        assert_same_step(form, model, batch())


@pytest.mark.parametrize("lengths", [(64, 5), (60, 5), (55, 5), (192, 7)], ids=str)
@FORMS
def test_widths_without_a_gradient_on_some_gpus_are_left_out(monkeypatch, form, lengths):
    """cuDNN's attention with a mask over 64 (mod 128) keys has NaN for one: prompts, and they with one or two answers."""
    keys, attention = [], nn.functional.scaled_dot_product_attention

    def recorded(query, key, value, attn_mask=None, **options):
        keys.extend([key.shape[2]] if attn_mask is not None else [])
        return attention(query, key, value, attn_mask=attn_mask, **options)

    torch.manual_seed(0)
    model = echo_model()
    assert_same_step(form, model, pad([sample(*lengths), sample(9, 3)]))
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", recorded)
    step(model, form, pad([sample(*lengths), sample(9, 3)]))
    assert keys and all(width % 128 != 64 for width in keys), sorted(set(keys))


@pytest.mark.parametrize("lengths", [
    [(1, 1)], [(1, 5), (1, 2)], [(12, 1), (1, 9)], [(7, 7)], [(3, 2), (3, 2), (3, 2)],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@FORMS
def test_any_mix_of_lengths(form, lengths, attention):
    torch.manual_seed(0)
    # eager attention's float32 softmax turns fully padded float64 rows into NaN
    dtype, tolerance = (torch.float64, 2e-6) if attention == "sdpa" else (torch.float32, 2e-5)
    model = echo_model(dtype=dtype, attn_implementation=attention)
    assert_same_step(form, model, pad([sample(*pair) for pair in lengths]), tolerance)


@FORMS
def test_several_supervised_spans_and_a_tail(form):
    """Everything from the first supervised token on is answer; the mask decides what gets the echo and the loss."""
    torch.manual_seed(0)
    samples = [sample(4, 9), sample(3, 6)]
    for _, labels in samples:
        labels[6:8] = [-100, -100]
    samples[0][1][-2:] = [-100, -100]
    assert_same_step(form, echo_model(), pad(samples, length=15))


@pytest.mark.parametrize("side", ["right", "left"])
@FORMS
def test_samples_without_supervision(form, side):
    torch.manual_seed(0)
    assert_same_step(form, echo_model(), pad([sample(5, 3), sample(9, 0), sample(4, 2)], side))


@FORMS
def test_a_batch_without_supervision(form):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="no supervised token"):
        output, found = step(echo_model(), form, pad([sample(5, 0), sample(3, 0)]))
    assert output.loss == 0 and all(not gradient.any() for gradient in found.values())


@FORMS
def test_no_attention_mask_and_a_divisor(form):
    torch.manual_seed(0)
    data = pad([sample(5, 3), sample(6, 2)])
    del data["attention_mask"]
    assert_same_step(form, echo_model(), data, num_items_in_batch=11)


@FORMS
def test_a_step_that_is_not_routed(form):
    torch.manual_seed(0)
    model = echo_model(config=always_on(echo_start_probability=0.0, echo_end_probability=0.0))
    data = batch()
    output, found = step(model, form, data)
    want, wanted = step(model, "two-pass", data)
    assert not output.routed and output.loss_on is None
    torch.testing.assert_close(output.loss, want.loss)
    assert found.keys() == wanted.keys() and not any("echo_networks" in name for name in found)


@FORMS
def test_autocast(form):
    torch.manual_seed(0)
    model = echo_model(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        data = batch()
        (want, _), (got, _) = (step(model, mode, data) for mode in ("two-pass", form))
    torch.testing.assert_close(got.loss, want.loss, rtol=0.02, atol=0.02)


def test_dropout_draws_one_mask_for_the_prompt():
    """ON and OFF then differ by the answers' masks alone: with no dropout there, not at all where the echo is zero."""
    torch.manual_seed(0)
    model = echo_model(dropout=0.5, moved=False)  # Delta is zero
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.register_forward_hook(lambda m, args, y: args[0] if y.shape[0] == 6 else y)  # the answer pass
    output, _ = step(model, "shared", batch())
    assert output.loss_on == output.loss_off and output.loss_kd.abs() < 1e-12
    output, _ = step(model, "two-pass", batch())
    assert output.loss_on != output.loss_off


@pytest.mark.parametrize("head", ["frozen", "trained", "capped", "unknown"])
@FORMS
def test_prompts_run_once_and_only_what_predicts_gets_logits(form, head):
    torch.manual_seed(0)
    model = echo_model()
    inner = model.model.get_base_model()
    if head == "trained":
        inner.lm_head.weight.requires_grad_(True)
    elif head == "capped":
        inner.register_forward_hook(lambda m, args, y: y.__setitem__("logits", y.logits.tanh()))
    elif head == "unknown":
        inner.get_output_embeddings = lambda: None
    data = pad([sample(20, 3), sample(17, 2)])
    assert_same_step(form, model, data)
    widths, rows = [], []
    inner.model.layers[0].register_forward_hook(lambda m, args, y: widths.append(tuple(args[0].shape[:2])))
    inner.lm_head.register_forward_hook(lambda m, args, y: rows.append(tuple(y.shape)))
    step(model, form, data)
    # the last answer token is no input, the boundary is one again
    assert widths == [(2, 20), (4, 3) if form == "shared" else (2, 25)]
    whole = [(2, 1, VOCAB), (4, 3, VOCAB) if form == "shared" else (2, 6, VOCAB)]
    rows_alone = [(2, 1, 1), (1, 10, VOCAB)]  # 3 + 2 answer tokens in both branches
    assert rows == {"unknown": whole, "frozen": [(2, 1, 1), (1, 1, 1)]}.get(head, rows_alone)


@FORMS
def test_asking_whether_the_head_gives_logits_changes_no_random_number(form):
    """So that a resumed run, which asks again, draws what the first one drew."""
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        model = echo_model(dropout=0.3)
        if drawn:
            model._gives_logits = True
        torch.manual_seed(1)
        drawn.append(step(model, form, batch())[0].loss)
    assert torch.equal(*drawn)


def test_auto_takes_the_first_form_that_can_be_done_and_says_so_once(caplog):
    torch.manual_seed(0)
    model = echo_model(config=always_on(step_mode="auto"))
    with caplog.at_level(logging.INFO):
        model(**batch())
        checkpoint(model, False)
        model(**batch())
        model.echo_config = dataclasses.replace(model.echo_config, answer_mask=False)
        assert model(**batch()).logits is not None
        assert model(**batch()).logits is not None
    told = [record.message for record in caplog.records if "Echo-LoRA takes" in record.message]
    shared, packed, two_pass = told
    assert shared == "Echo-LoRA takes shared steps"
    assert packed == "Echo-LoRA takes packed steps; not shared, since gradient checkpointing keeps no keys and values"
    assert two_pass.startswith("Echo-LoRA takes two-pass steps; not shared, since answer_mask is False")
    model.echo_config = dataclasses.replace(model.echo_config, step_mode="shared", answer_mask=True)
    with pytest.raises(RuntimeError, match="step_mode: got 'shared', which cannot be done: gradient checkpointing"):
        model(**batch())


@FORMS
def test_reasons_for_the_two_pass_form(form):
    def refusal(model, **extra):
        with pytest.raises(RuntimeError, match=f"step_mode: got '{form}'") as error:
            model(**batch(), **extra)
        return str(error.value)

    assert "answer_mask" in refusal(echo_model(config=always_on(step_mode=form, answer_mask=False)))
    model = echo_model(config=always_on(step_mode=form))
    positions = torch.arange(1, 11).expand(3, -1)
    assert "given position_ids, which" in refusal(model, position_ids=positions, use_cache=False)
    assert "given output_hidden_states, which" in refusal(model, output_hidden_states=True)
    assert "given logits_to_keep, which" in refusal(model, logits_to_keep=torch.tensor([0]))


def test_several_samples_in_a_row_are_refused():
    model, rows = echo_model(config=always_on(step_mode="auto")), batch()
    del rows["attention_mask"]
    with pytest.raises(ValueError, match="position_ids: got positions that start again"):
        model(**rows, position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]).expand(3, -1))


@FORMS
@pytest.mark.parametrize("masked", [False, True])
def test_arguments_that_change_nothing(form, masked):
    """What trainers pass to every model; positions of padding are nobody's business."""
    torch.manual_seed(0)
    model, rows = echo_model(config=always_on(step_mode=form)), batch()
    positions = torch.arange(10).expand(3, -1)
    if masked:
        positions = positions * rows["attention_mask"]
    else:
        rows = {name: value[1:2] for name, value in rows.items() if name != "attention_mask"}
        positions = positions[1:2]
    expected = model(**rows).loss
    extra = {"use_cache": True, "return_dict": True, "logits_to_keep": 0, "past_key_values": None}
    quiet = dict.fromkeys(("output_attentions", "output_hidden_states", "output_router_logits"), False)
    assert torch.equal(model(**rows, position_ids=positions, **extra, **quiet).loss, expected)


def test_attention_without_masks_of_our_own():
    model = echo_model(config=always_on(step_mode="packed"))
    model.model.get_base_model().config._attn_implementation = "flash_attention_2"
    with pytest.raises(RuntimeError, match="flash_attention_2 attention takes no mask"):
        model(**batch())


class Plain(nn.Module):
    """Not of transformers: blocks of adapted linears, logits."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.layers = nn.ModuleList(nn.Sequential(EchoLoRALinear(8, 8, r=2)) for _ in range(8))
        self.head = nn.Linear(8, VOCAB)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.head(hidden)


def test_models_of_other_kinds():
    config = always_on(source_layers=(6,), target_layers=(1,), step_mode="auto")
    model = EchoLoRA(Plain(), config).train()
    assert model(**batch()).logits is not None
    model.echo_config = dataclasses.replace(config, step_mode="shared")
    with pytest.raises(RuntimeError, match="Plain is no transformers model"):
        model(**batch())


def test_a_recomputation_that_nobody_announced_is_refused():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model = echo_model()
    blocks = type(model.model.get_base_model().model.layers[0])
    apply_activation_checkpointing(model.model, check_fn=lambda module: isinstance(module, blocks))
    with pytest.raises(RuntimeError, match="recomputed in the backward pass"):
        step(model, "shared", batch())

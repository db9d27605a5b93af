"""The five properties of the method that must hold whatever the numbers are (dropout 0)."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import always_on, base_model, batch, echo_model, network_gradients, pad, peft_model, sample

from echolora_kernels import EchoLoRA
from echolora_kernels.integrations.blocks import decoder_blocks
from echolora_kernels.training.run import save_adapter

KINDS = pytest.mark.parametrize("kind", ["peft", "native"])
SITES = pytest.mark.parametrize("site", ["output", "adapter_input", "rank"])


class BothPasses:
    """Records what every block, and the head, gave in the OFF and in the ON pass of a routed step."""

    def __init__(self, wrapped):
        _, blocks = decoder_blocks(wrapped.model)
        self.blocks = [[] for _ in blocks]
        self.logits = []
        for index, block in enumerate(blocks):
            block.register_forward_hook(lambda m, a, out, i=index: self.blocks[i].append(out))
        wrapped.model.get_output_embeddings().register_forward_hook(lambda m, a, out: self.logits.append(out))


@KINDS
@SITES
@pytest.mark.parametrize("dora", [False, True])
def test_on_equals_off_wherever_no_answer_was_seen(kind, site, dora):
    wrapped = echo_model(kind, always_on(site=site, source_layers=(4, 5), target_layers=(1, 2)), dora=dora)
    seen, inputs = BothPasses(wrapped), batch("left")
    output = wrapped(**inputs)
    answer = inputs["labels"] != -100
    for index, (off, on) in enumerate(seen.blocks):
        if index < 1:
            assert torch.equal(on, off)
        assert torch.equal(on[~answer], off[~answer]), f"block {index} differs at a prompt position"
        if index >= 1:
            assert (on[answer] - off[answer]).abs().min(dim=-1).values.max() > 1e-6, f"block {index} got no echo"
    off, on = seen.logits
    first = answer.int().argmax(dim=1) - 1
    rows = torch.arange(len(first))
    assert torch.equal(on[rows, first], off[rows, first])
    assert output.loss_on != output.loss_off
    assert torch.equal(output.logits, off)


@KINDS
def test_the_echo_depends_on_the_prompt_only(kind):
    wrapped = echo_model(kind)
    echoes = []
    wrapped.echo_networks[0].register_forward_hook(lambda m, a, out: echoes.append((a[0], out)))
    prompts = [sample(n, 3) for n in (5, 8, 3)]
    other_answers = [(ids[:-3] + sample(0, 3)[0], [*labels[:-3], 1, 2, 3]) for ids, labels in prompts]
    other_prompts = [([ids[0] % 60 + 1, *ids[1:]], labels) for ids, labels in prompts]
    for samples in (prompts, other_answers, other_prompts):
        wrapped(**pad(samples))
    assert torch.equal(echoes[0][0], echoes[1][0])
    assert all(torch.equal(delta, echoes[1][1][name]) for name, delta in echoes[0][1].items())
    assert (echoes[0][0] - echoes[2][0]).abs().min(dim=1).values.max() > 0


def test_the_echo_is_read_at_the_last_prompt_token_of_the_source_blocks():
    wrapped = echo_model(config=always_on(source_layers=(3, 5), target_layers=(0,)))
    seen, inputs, read = BothPasses(wrapped), batch("left"), []
    wrapped.echo_networks[0].register_forward_hook(lambda m, a, out: read.append(a[0]))
    wrapped(**inputs)
    for row, labels in enumerate(inputs["labels"]):
        boundary = int((labels != -100).nonzero()[0]) - 1
        z = (seen.blocks[3][0][row, boundary] + seen.blocks[5][0][row, boundary]) / 2
        u = (z - z.mean()) / (z.var(unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(read[0][row], u)


@KINDS
def test_which_echo_parameters_have_a_gradient_at_first(kind):
    wrapped = echo_model(kind, always_on(scale=0.1, gate_bias=-2.0), moved=False)
    inputs = batch()

    def moving():
        wrapped.zero_grad()
        output = wrapped(**inputs)
        output.loss.backward()
        found = [
            {part for part, gradient in each._asdict().items() if gradient.abs().max() > 0}
            for each in network_gradients(wrapped.echo_networks[0]).values()
        ]
        return output, set.union(*found)

    output, moved = moving()
    assert output.loss_on == output.loss_off
    assert output.loss_kd.abs() < 1e-12
    assert moved == {"proj_up"}
    with torch.no_grad():
        wrapped.echo_networks[0].proj_up.normal_(0, 0.1)
    after_w2 = {"proj_up", "proj_down", "gate_up", "gate_bias", "scale"}
    assert moving()[1] == after_w2
    with torch.no_grad():
        wrapped.echo_networks[0].gate_up.normal_(0, 0.1)
    assert moving()[1] == {*after_w2, "gate_down"}


@pytest.mark.parametrize("dora", [False, True])
def test_the_exported_adapter_is_the_off_branch_for_stock_peft(tmp_path, dora):
    model = peft_model(dtype=torch.float32, dora=dora)
    base_state = {name.replace(".base_layer", ""): p for name, p in model.base_model.model.state_dict().items()}
    base_state = {name: p for name, p in base_state.items() if "lora_" not in name}
    wrapped = EchoLoRA(model, always_on()).train()
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        wrapped(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wrapped.advance()
    inputs = batch()
    off = wrapped(**inputs).logits
    save_adapter(wrapped.remove(), tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved and not any("echo" in key or "proj_down" in key for key in saved)

    base = base_model(dtype=torch.float32)
    base.load_state_dict(base_state)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    logits = loaded(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(logits, off)


@pytest.mark.parametrize("dora", [False, True])
def test_eval_mode_and_echo_off_are_the_plain_model(dora):
    wrapped = echo_model(dora=dora)
    inputs = batch()
    plain = wrapped.model(**inputs)
    with wrapped.echo_off() as off:
        output = off(**inputs)
    assert type(output) is type(plain)
    assert torch.equal(output.logits, plain.logits)
    assert torch.equal(output.loss, plain.loss)
    assert "loss_on" in wrapped(**inputs)
    wrapped.eval()
    assert torch.equal(wrapped(**inputs).logits, plain.logits)
    removed = wrapped.remove()
    assert removed is wrapped.model
    removed.train()
    assert torch.equal(removed(**inputs).logits, plain.logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in removed.modules())

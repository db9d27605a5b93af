"""`load_adapter`: everything in the file fits, or nothing is changed; safetensors only."""

import pickle

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from echolora_kernels import AdapterMismatch
from echolora_kernels.integrations.peft import load_adapter

FILE = "adapter_model.safetensors"
lora_or_dora = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


@pytest.fixture
def saved(tmp_path):
    """A folder with another model's adapter, as PEFT saves it."""

    def save(dora=False):
        tiny.peft_model(num_hidden_layers=2, dora=dora).save_pretrained(tmp_path)
        assert (tmp_path / FILE).is_file()
        return tmp_path

    return save


def fresh(dora=False):
    return tiny.peft_model(num_hidden_layers=2, dora=dora)


def state_of(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(t, other[name]) for name, t in state.items())


@lora_or_dora
def test_round_trip(saved, dora):
    """What stock PEFT would load, and nothing of the base model."""
    folder = saved(dora)
    torch.manual_seed(5)  # the same base model twice
    model = fresh(dora)
    torch.manual_seed(5)
    stock = PeftModel.from_pretrained(tiny.base_model(num_hidden_layers=2), folder, autocast_adapter_dtype=False)
    ids = torch.randint(1, tiny.VOCAB, (2, 7))
    expected = stock.eval()(ids).logits
    before = state_of(model)
    assert not torch.allclose(model.eval()(ids).logits, expected)
    load_adapter(model, folder)
    assert_same(get_peft_model_state_dict(model), load_file(folder / FILE))
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed and all(".lora_" in name for name in changed)
    assert torch.equal(model(ids).logits, expected)


def test_only_the_named_adapter_is_loaded(saved):
    folder, model = saved(), fresh()
    model.add_adapter("second", model.peft_config["default"])
    first = {k: t.clone() for k, t in get_peft_model_state_dict(model, adapter_name="default").items()}
    load_adapter(model, folder, "second")
    assert_same(get_peft_model_state_dict(model, adapter_name="second"), load_file(folder / FILE))
    assert_same(get_peft_model_state_dict(model, adapter_name="default"), first)


@lora_or_dora
def test_every_key_that_does_not_fit_is_listed_and_nothing_is_changed(saved, dora):
    folder, model = saved(dora), fresh(dora)
    state = load_file(folder / FILE)
    missing, narrow, *_ = sorted(state)
    if dora:
        missing = next(key for key in state if "magnitude" in key)
    del state[missing]
    state["base_model.model.surprise.weight"] = torch.zeros(2)
    state[narrow] = state[narrow][:, :-1].contiguous() if state[narrow].ndim == 2 else state[narrow][:-1].contiguous()
    save_file(state, folder / FILE)
    before = state_of(model)
    with pytest.raises(AdapterMismatch) as caught:
        load_adapter(model, folder)
    message = str(caught.value)
    assert FILE in message
    assert f"1 missing: {missing};" in message
    assert "1 unexpected: base_model.model.surprise.weight;" in message
    assert f"1 other shape: {narrow} {tuple(state[narrow].shape)} instead of" in message
    assert_same(state_of(model), before)


@pytest.mark.parametrize("problem", ["missing", "unexpected", "other shape"])
def test_one_problem_is_enough(saved, problem):
    folder, model = saved(), fresh()
    state = load_file(folder / FILE)
    key = sorted(state)[0]
    if problem == "missing":
        del state[key]
    elif problem == "unexpected":
        key = "base_model.model.echo_networks.proj_up.weight"
        state[key] = torch.zeros(2)
    else:
        state[key] = state[key].T.contiguous()
    save_file(state, folder / FILE)
    before = state_of(model)
    with pytest.raises(AdapterMismatch, match=f"1 {problem}: ") as caught:
        load_adapter(model, folder)
    assert key in str(caught.value)
    assert_same(state_of(model), before)


@pytest.mark.parametrize("saved_dora", [False, True])
def test_lora_and_dora_do_not_mix(saved, saved_dora):
    folder, model = saved(saved_dora), fresh(not saved_dora)
    before = state_of(model)
    with pytest.raises(AdapterMismatch, match="10 " + ("unexpected" if saved_dora else "missing")) as caught:
        load_adapter(model, folder)
    assert str(caught.value).count("magnitude") == 10  # 2 blocks with 5 targets
    assert_same(state_of(model), before)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:4],
        lambda data: b"",
        lambda data: b"\xff" * len(data),
        lambda data: pickle.dumps({"lora_A": [1.0]}),
        lambda data: data[:8] + b"[" + data[9:],
    ],
    ids=["half", "four bytes", "empty", "noise", "a pickle", "header"],
)
def test_damaged_file(saved, damage):
    folder, model = saved(), fresh()
    path = folder / FILE
    path.write_bytes(damage(path.read_bytes()))
    before = state_of(model)
    with pytest.raises(AdapterMismatch, match=f"{FILE}: damaged safetensors file"):
        load_adapter(model, folder)
    assert_same(state_of(model), before)


class Bomb:
    """Says so when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickled_adapter_is_not_read(saved, tmp_path_factory):
    folder, model = saved(), fresh()
    torch.save(load_file(folder / FILE), folder / "adapter_model.bin")
    (folder / FILE).unlink()
    before = state_of(model)
    with pytest.raises(FileNotFoundError, match=f"{FILE}: no such file; only safetensors"):
        load_adapter(model, folder)
    assert_same(state_of(model), before)
    traces = tmp_path_factory.mktemp("traces") / "executed"
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(traces)))
    with pytest.raises(FileNotFoundError):
        load_adapter(model, folder)
    assert not traces.exists()


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_no_such_folder(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match="adapter_model"):
        load_adapter(fresh(), kind(tmp_path / "nowhere"))

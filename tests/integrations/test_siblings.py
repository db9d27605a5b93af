"""Which children a forward calls with one input, by its source."""

import functools

import pytest
from torch import nn
from transformers.models.gemma3n import modeling_gemma3n
from transformers.models.llama import modeling_llama
from transformers.models.t5 import modeling_t5
from transformers.models.whisper import modeling_whisper

from echolora_kernels.integrations.siblings import called_with_one_input


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Plain(nn.Module):
    @decorated
    def forward(self, x, y):
        z = self.a(x) + self.b(y) * self.c(x)
        return self.d(z, x), self.e(x=x), self.f(y), y.g(x), self.b.h(x), self.i(x + 1)


class BoundAnew(nn.Module):
    def forward(self, x):
        y = self.a(x)
        x = self.b(x)
        z = self.c(x)
        x += self.d(x)
        return y, z, self.e(x), self.f(x)


class Branches(nn.Module):
    def forward(self, x, flag):
        a = self.a(x)
        if flag:
            b, c = self.b(x), self.c(x)
        else:
            d, e = self.d(x), self.e(x)
        f = self.f(x) if flag else self.g(x)
        with flag:
            h = self.h(x)
        return a, b, c, d, e, f, h, self.i(x), flag and self.j(x)


class Leaves(nn.Module):
    def forward(self, x, flag):
        a, b = self.a(x), self.b(x)
        if flag:
            return a, b
        return self.c(x) + self.d(x)


class Twice(nn.Module):
    def forward(self, x):
        return self.a(x) + self.b(x) + self.c(x) + self.a(x)


class Later(nn.Module):
    def forward(self, x):
        def inner(x):
            return self.a(x) + self.b(x)

        return inner(x) + sum(self.c(x) for _ in x) + (lambda: self.d(x))() + self.e(x)


class NoForward(nn.Module):
    pass


@pytest.mark.parametrize(
    ("parent", "groups"),
    [
        (Plain, {"ac", "bf"}),
        (BoundAnew, {"ab", "cd", "ef"}),
        (Branches, {"ai", "bc", "de"}),
        (Leaves, {"ab", "cd"}),
        (Twice, {"bc"}),
        (Later, set()),
        (NoForward, set()),
        (nn.Linear, set()),
        (type("Made", (nn.Module,), {"forward": eval("lambda self, x: self.a(x) + self.b(x)")}), set()),
    ],
)
def test_by_source(parent, groups):
    assert {"".join(names) for names in called_with_one_input(parent.__new__(parent))} == groups


def test_an_instance_with_a_forward_of_its_own():
    parent = Twice()
    parent.forward = Plain.forward
    assert called_with_one_input(parent) == ()


@pytest.mark.parametrize(
    ("parent", "groups"),
    [
        (modeling_llama.LlamaAttention, (("q_proj", "k_proj", "v_proj"),)),
        (modeling_llama.LlamaMLP, (("gate_proj", "up_proj"),)),
        (modeling_whisper.WhisperAttention, (("k_proj", "v_proj"),)),  # q has an input of its own in cross-attention
        (modeling_t5.T5Attention, (("k", "v"),)),
        (modeling_gemma3n.Gemma3nTextAttention, (("k_proj", "v_proj"),)),  # which some blocks leave out
    ],
)
def test_transformers_models(parent, groups):
    assert called_with_one_input(parent.__new__(parent)) == groups

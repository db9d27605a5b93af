"""Models that are known by name, whose shapes are timed and tuned, and the tasks whose lengths are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama; `loss_rows`: rows of each branch that the losses are timed with, none where nothing is timed."""

    name: str
    width: int
    inner: int
    heads: int
    key_heads: int
    head_width: int
    blocks: int
    vocabulary: int
    tied: bool
    loss_rows: tuple[int, ...] = ()

    def parts(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """d_in and every d_out of each linear and each group that has a shape of its own."""
        q, k = self.heads * self.head_width, self.key_heads * self.head_width
        alone = {"q": (self.width, (q,)), "k": (self.width, (k,)), "up": (self.width, (self.inner,))}
        if k == q:
            del alone["k"]
        groups = {"qkv": (self.width, (q, k, k)), "gate_up": (self.width, (self.inner, self.inner))}
        return alone | {"down": (self.inner, (self.width,))} | groups

    def target_widths(self) -> tuple[int, ...]:
        """Widths of the modules that receive an echo by default: q, k, v, up and down of an eighth of the blocks."""
        q, k = self.heads * self.head_width, self.key_heads * self.head_width
        return (q, k, k, self.inner, self.width) * (int(0.25 * self.blocks) - int(0.125 * self.blocks))


MODELS = {
    model.name: model
    for model in (
        Model("smollm2", 576, 1536, 9, 3, 64, 30, 49152, True, (16, 64, 256, 512)),
        Model("llama2-7b", 4096, 11008, 32, 32, 128, 32, 32000, False, (64, 256)),
        Model("llama3-8b", 4096, 14336, 32, 8, 128, 32, 128256, False, (64, 256)),
        Model("llama3-70b", 8192, 28672, 64, 8, 128, 80, 128256, False),
        Model("mistral-7b", 4096, 14336, 32, 8, 128, 32, 32000, False),
        Model("qwen2.5-7b", 3584, 18944, 28, 4, 128, 28, 152064, False),
    )
}

# mean tokens of prompt and answer, as SmolLM2's tokenizer and chat template count the questions of these tasks
TASKS = {"arc-easy": (100, 7), "arc-challenge": (112, 7), "boolq": (61, 6), "openbookqa": (84, 7)}

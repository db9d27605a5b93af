"""Bringing the echo of a pass into the adapted linears, also when a block is recomputed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..integrations.adapters import AdaptedLinear
from ..ops.echo_lora_linear import Echo

EchoPass = dict[str, Echo]


class Injector:
    """Hands each target module the echo of the pass that is running, and nothing outside a pass.

    Args:
        targets: the adapted linears, by the key of their echo network.
        blocks: the blocks that contain them.
    """

    def __init__(self, targets: dict[str, AdaptedLinear], blocks: Iterable[nn.Module]) -> None:
        self._blocks: list[Any] = list(blocks)  # with transformers' checkpointing attributes
        self._current: EchoPass | None = None
        self._handles = [target.install(self._reader(key)) for key, target in targets.items()]

    def _reader(self, key: str) -> Callable[[], Echo | None]:
        return lambda: None if self._current is None else self._current[key]

    def remove(self) -> None:
        """Take the hooks out of the model again."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def injecting(self, echoes: EchoPass) -> Iterator[None]:
        """A forward pass run inside receives `echoes`; so does every later recomputation of that pass."""
        with self._scope(echoes), self._recomputation_sees(echoes):
            yield

    @contextmanager
    def _scope(self, echoes: EchoPass) -> Iterator[None]:
        before, self._current = self._current, echoes
        try:
            yield
        finally:
            self._current = before

    @contextmanager
    def _recomputation_sees(self, echoes: EchoPass) -> Iterator[None]:
        """A checkpointed block is recomputed in the backward pass, when this pass's echo would be gone: bind it."""
        bound: list[tuple[nn.Module, Any]] = []
        try:
            for block in self._blocks:
                if not getattr(block, "gradient_checkpointing", False):
                    continue
                checkpoint = getattr(block, "_gradient_checkpointing_func", None)
                if checkpoint is None:
                    raise RuntimeError(
                        f"gradient checkpointing of {type(block).__name__} cannot carry the echo into its "
                        "recomputation; enable it with the model's gradient_checkpointing_enable()"
                    )
                bound.append((block, checkpoint))
                block._gradient_checkpointing_func = self._with_echoes(checkpoint, echoes)
            yield
        finally:
            for block, checkpoint in bound:
                block._gradient_checkpointing_func = checkpoint

    def _with_echoes(self, checkpoint: Callable[..., Any], echoes: EchoPass) -> Callable[..., Any]:
        def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def run(*inputs: Any, **named: Any) -> Any:
                with self._scope(echoes):
                    return function(*inputs, **named)

            return checkpoint(run, *args, **kwargs)

        return checkpointed

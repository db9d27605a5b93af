"""Bringing the echo of a pass into the adapted linears, also when a block is recomputed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..integrations.adapters import AdaptedLinear
from ..ops.echo_lora_linear import Echo

EchoPass = dict[str, Echo]

_OUTSIDE: Any = "outside"  # no pass is running; an OFF pass is None


class Injector:
    """Hands each target module the echo of the pass that is running, and nothing outside a pass.

    Args:
        targets: the adapted linears, by the key of their echo network.
        blocks: the blocks that contain them.
        scaled: whether an echo is multiplied by the module's DoRA gain.
    """

    def __init__(self, targets: dict[str, AdaptedLinear], blocks: Iterable[nn.Module], scaled: bool = False) -> None:
        self._targets, self._scaled = targets, scaled
        self._blocks: list[Any] = list(blocks)  # with transformers' checkpointing attributes
        self._current: EchoPass | None = _OUTSIDE
        self._unfinished = False  # an ON pass has run whose backward pass may still come
        self._handles = [target.install(EchoReader(self, key)) for key, target in targets.items()]

    def read(self, key: str) -> Echo | None:
        """The echo of one module now. Only the module itself asks: elsewhere its parameters may be sharded."""
        if self._current is not _OUTSIDE:
            echo = None if self._current is None else self._current[key]
            gain = None if echo is None or not self._scaled else self._targets[key].gain()
            return echo if echo is None or gain is None else dataclasses.replace(echo, delta=gain * echo.delta)
        if self._unfinished and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "a block is recomputed in the backward pass by a kind of checkpointing that cannot carry the echo; "
                "use the model's own gradient_checkpointing_enable()"
            )
        return None

    def begin(self) -> None:
        """A forward pass of any kind begins: backward passes from here on are not those of earlier ON passes."""
        self._unfinished = False

    def remove(self) -> None:
        """Take the hooks out of the model again."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def injecting(self, echoes: EchoPass | None) -> Iterator[None]:
        """A forward pass run inside receives `echoes`, or none; so does every later recomputation of that pass."""
        self._unfinished = self._unfinished or echoes is not None
        with self._scope(echoes), self._recomputation_sees(echoes):
            yield

    def checkpointing(self) -> bool:
        """Whether any block is checkpointed."""
        return any(getattr(block, "gradient_checkpointing", False) for block in self._blocks)

    def reentrant(self) -> bool:
        """Whether blocks are checkpointed in the reentrant way."""
        functions = [
            getattr(block, "_gradient_checkpointing_func", None)
            for block in self._blocks
            if getattr(block, "gradient_checkpointing", False)
        ]
        return any(getattr(function, "keywords", {}).get("use_reentrant", False) for function in functions)

    @contextmanager
    def _scope(self, echoes: EchoPass | None) -> Iterator[None]:
        before, self._current = self._current, echoes
        try:
            yield
        finally:
            self._current = before

    @contextmanager
    def _recomputation_sees(self, echoes: EchoPass | None) -> Iterator[None]:
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

    def _with_echoes(self, checkpoint: Callable[..., Any], echoes: EchoPass | None) -> Callable[..., Any]:
        def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def run(*inputs: Any, **named: Any) -> Any:
                with self._scope(echoes):
                    return function(*inputs, **named)

            return checkpoint(run, *args, **kwargs)

        return checkpointed


class EchoReader:
    """Asks an injector for the echo of one module. An object, not a closure, so that deepcopy and pickle follow it."""

    def __init__(self, injector: Injector, key: str) -> None:
        self._injector, self._key = injector, key

    def __call__(self) -> Echo | None:
        return self._injector.read(self._key)

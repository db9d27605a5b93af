"""A pytest plugin for PEFT's own tests: leaves out other methods, fuses every model, writes down what became of a case.

Options: ``--fuse-models`` fuses, ``--record FILE`` writes the records as JSON.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from peft import LoraConfig
from peft.config import PeftConfigMixin
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner

from echolora_kernels import fuse
from echolora_kernels.integrations import grouped
from echolora_kernels.integrations.fused import FusedForward

# of one layer's output, relative to the largest value in it and in the base layer's, which it may cancel
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_NO_HUB = (
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "couldn't connect to",
    "Cannot reach https",
    "outgoing traffic has been disabled",
    "client has been closed",
    "Max retries exceeded",
    "Name or service not known",
    "Temporary failure in name resolution",
    "Network is unreachable",
)


@dataclass
class Case:
    """What became of one case.

    Args:
        outcome: passed, failed or skipped. why: of the latter two, in one line. hub: it failed for want of a hub.
        layers: LoRA layers that were made or called. fused: those that `fuse` took. declined: reason -> how many it
            did not. ours, peft: calls of fused layers that our operators, and that PEFT's forward computed. together: those
            of ours that were computed in groups.
        left: reason -> how many calls of fused layers were PEFT's.
        difference: the largest of our outputs from PEFT's for the same input, as a multiple of what is allowed.
    """

    outcome: str = "passed"
    why: str = ""
    hub: bool = False
    layers: int = 0
    fused: int = 0
    declined: Counter[str] = field(default_factory=Counter)
    ours: int = 0
    peft: int = 0
    together: int = 0
    left: Counter[str] = field(default_factory=Counter)
    difference: float = 0.0


class Recorder:
    """The plugin. `current` is the case that is running; in another process than pytest's first, it is sent there."""

    def __init__(self, record: Path | None) -> None:
        self.record, self.current, self.comparing = record, Case(), False
        self.cases: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.current = Case()
        yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Any:
        report = (yield).get_result()
        case = self.current
        if report.outcome != "passed" and case.outcome != "failed":
            case.outcome = report.outcome
            case.why = _one_line(call.excinfo.value if call.excinfo else getattr(report, "wasxfail", "passed unduly"))
            case.hub = report.outcome == "failed" and any(word in str(report.longrepr) for word in _NO_HUB)
        if report.when == "teardown":
            report.user_properties.append(("case", dict(vars(case))))

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.cases.update((report.nodeid, value) for name, value in report.user_properties if name == "case")

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome != "passed":
            why = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            last = [line for line in why.splitlines() if line.strip()][-1]
            self.cases[report.nodeid] = vars(Case(report.outcome, _one_line(last)))

    def pytest_sessionfinish(self, session: Any) -> None:
        if self.record is not None and not hasattr(session.config, "workerinput"):
            self.record.write_text(json.dumps(self.cases))

    def watch_layers(self) -> None:
        """Count LoRA layers as they are made, and PEFT's own forward of them."""
        make = LoraLayer.__init__

        @functools.wraps(make)
        def made(layer: Any, *args: Any, **kwargs: Any) -> None:
            self.current.layers += 1
            make(layer, *args, **kwargs)

        LoraLayer.__init__ = made
        for kind in _kinds_of(LoraLayer):
            if "forward" in kind.__dict__:
                kind.forward = self._watched(kind.forward)

    def _watched(self, forward: Any) -> Any:
        @functools.wraps(forward)
        def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling() and not self.comparing:
                self.current.layers += 1
                self.current.peft += 1
            return forward(layer, *args, **kwargs)

        return call

    def fuse_models(self) -> None:
        """Fuse after every adapter that PEFT makes in a model, and compare what is computed with PEFT's own."""
        inject, run, run_group = BaseTuner.inject_adapter, FusedForward.__call__, grouped.echo_lora_linear_group

        @functools.wraps(inject)
        def inject_and_fuse(tuner: Any, model: Any, *args: Any, **kwargs: Any) -> None:
            inject(tuner, model, *args, **kwargs)
            if any(isinstance(module, LoraLayer) for module in model.modules()):
                report = fuse(model)
                self.current.fused += len(report.fused)
                self.current.declined.update(report.skipped.values())

        @functools.wraps(run)
        def call(fused: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return run(fused, x, *args, **kwargs)
            before, case = self.current.peft, self.current
            y = run(fused, x, *args, **kwargs)
            if case.peft > before:
                case.left[_why_peft(fused.module, args or kwargs)] += 1
                return y
            case.ours += 1
            case.layers += 1
            if not _drops(fused.module):
                case.difference = max(case.difference, self._difference(fused.module, x, y))
            return y

        @functools.wraps(run_group)
        def call_group(x: Any, projections: Any, **kwargs: Any) -> Any:
            self.current.together += len(projections)
            return run_group(x, projections, **kwargs)

        grouped.MIN_ROWS, grouped.echo_lora_linear_group = 1, call_group  # however small the tests' inputs
        BaseTuner.inject_adapter = inject_and_fuse
        FusedForward.__call__ = call

    def _difference(self, layer: Any, x: torch.Tensor, y: torch.Tensor) -> float:
        self.comparing = True
        try:
            with torch.no_grad():
                wanted, base = type(layer).forward(layer, x), layer.base_layer(x)
        finally:
            self.comparing = False
        if wanted.dtype != y.dtype or wanted.shape != y.shape:
            return float("inf")
        if not y.numel() or y.is_meta:
            return 0.0
        finite = wanted.isfinite()
        if not torch.equal(finite, y.isfinite()):
            return float("inf")
        size = max(float(t[finite].abs().max()) if finite.any() else 0.0 for t in (wanted, base))
        off = float((wanted - y)[finite].abs().max()) if finite.any() else 0.0
        return off / max(size, 1e-6) / TOLERANCES[y.dtype]


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--fuse-models", action="store_true")
    parser.addoption("--record", type=Path)


def pytest_configure(config: Any) -> None:
    recorder = Recorder(config.getoption("--record"))
    config.pluginmanager.register(recorder)
    recorder.watch_layers()
    if config.getoption("--fuse-models"):
        recorder.fuse_models()


class AllSeen(Counter[str]):
    """PEFT's tests ask the hub for what is not among the models they have seen."""

    def __contains__(self, name: object) -> bool:
        return True


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out what is parametrised by the configuration of another method; without a hub ask for nothing."""
    if HF_HUB_OFFLINE and (shared := sys.modules.get("tests.testing_utils")):
        shared._HUB_MODEL_ACCESSES = AllSeen()
    kept = [item for item in items if not _of_another_method(getattr(item, "callspec", None))]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _of_another_method(callspec: Any) -> bool:
    values = [] if callspec is None else callspec.params.values()
    kinds = [value if isinstance(value, type) else type(value) for value in values]
    configs = [kind for kind in kinds if issubclass(kind, PeftConfigMixin)]
    return bool(configs) and LoraConfig not in configs


def _kinds_of(kind: type) -> list[type]:
    return [kind, *(below for child in kind.__subclasses__() for below in _kinds_of(child))]


def _why_peft(layer: Any, beside_x: Any) -> str:
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if beside_x:
        return "arguments beside x, such as adapter_names"
    if layer.disable_adapters:
        return "adapters disabled"
    if layer.merged:
        return "adapters merged"
    if len(active) != 1:
        return "several active adapters" if active else "no active adapter"
    return "dtypes, hooks, or a variant of LoRA"


def _drops(layer: Any) -> bool:
    return any(part.training and getattr(part, "p", 0.0) > 0 for part in layer.lora_dropout.values())


def _one_line(error: Any) -> str:
    text = re.sub(r"\b0x[0-9a-f]+", "0x...", " ".join(str(error).split()))  # an address is another in every run
    name = type(error).__name__ if isinstance(error, BaseException) else ""
    return ": ".join(part for part in (name, text) if part)[:300]

"""Checkpoints of a training run: safetensors and JSON only, written beside and renamed into place."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import CheckpointError
from ..integrations.saving import replacing

_PREFIX = "step-"
_ADVICE = "remove it to fall back on the one before"
_NAME = re.compile(rf"{_PREFIX}\d+")


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step below `folder`, or None."""
    return max(_complete(folder), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def _complete(folder: Path) -> list[Path]:
    # anything else, such as a folder somebody named step-best, is not ours to read or remove
    return [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir() and _NAME.fullmatch(path.name)]


def save_checkpoint(
    folder: Path,
    step: int,
    parameters: Iterable[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `step`'s checkpoint below `folder` and remove all but the newest `keep`.

    Args:
        parameters: names and trainable parameters; the optimizer's state is stored under the same names.
        state: JSON values that belong to it.
    """
    parameters = list(parameters)
    target = folder / f"{_PREFIX}{step:06d}"
    moments = {
        f"{name}/{key}": value.contiguous()
        for name, parameter in parameters
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    weights = {name: parameter.detach().contiguous() for name, parameter in parameters}
    with replacing(target) as unfinished:
        save_file(weights, unfinished / "weights.safetensors")
        save_file(moments, unfinished / "optimizer.safetensors")
        (unfinished / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
    for old in sorted(_complete(folder), key=step_of)[:-keep]:
        shutil.rmtree(old)
    return target


def read_checkpoint(
    path: Path, parameters: Iterable[tuple[str, nn.Parameter]]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """Weights, optimizer state and JSON state, for `restore`.

    Raises:
        CheckpointError: a file is missing or damaged, or holds other parameters than `parameters`.
    """
    named = dict(parameters)
    try:
        weights = load_file(path / "weights.safetensors")
        moments = load_file(path / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {_ADVICE}") from error
    state = read_state(path)
    differing = sorted(
        name
        for name in weights.keys() | named.keys()
        if name not in weights or name not in named or weights[name].shape != named[name].shape
    )
    if differing:
        raise CheckpointError(f"{path}: belongs to another model; parameters that differ: {', '.join(differing)}")
    if not {key.rpartition("/")[0] for key in moments} <= named.keys():
        raise CheckpointError(f"{path}: does not hold what a checkpoint holds; {_ADVICE}")
    return weights, moments, state


def restore(
    parameters: Iterable[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
) -> None:
    """Put weights and optimizer state back."""
    named = dict(parameters)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])
    optimizer.state.clear()
    for key, value in moments.items():
        name, _, moment = key.rpartition("/")
        parameter = named[name]
        # AdamW keeps its step counter on the CPU
        optimizer.state[parameter][moment] = value if moment == "step" else value.to(parameter.device)


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint, without touching anything."""
    return read_json(
        path / "state.json",
        ("settings", "accuracy_before", "history"),
        f"remove {path.name} to fall back on the one before",
    )


def read_json(path: Path, names: Iterable[str], advice: str) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: it cannot be read, is no object, or lacks one of `names`; the message ends with `advice`.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: neither UTF-8 nor JSON
        raise CheckpointError(f"{path}: cannot be read ({error}); {advice}") from error
    if not isinstance(state, dict) or not isinstance(state.get("settings", {}), dict):
        raise CheckpointError(f"{path}: wants an object with the settings of a run; {advice}")
    missing = [name for name in names if name not in state]
    if missing:
        raise CheckpointError(f"{path}: lacks {', '.join(missing)}; {advice}")
    return state

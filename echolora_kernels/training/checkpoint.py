"""Checkpoints of a training run: safetensors and JSON only, written beside and renamed into place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import CheckpointError

_PREFIX, _UNFINISHED = "step-", ".unfinished"


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step below `folder`, or None."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir() and not path.name.endswith(_UNFINISHED)]
    return max(found, key=lambda path: int(path.name.removeprefix(_PREFIX)), default=None)


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
    unfinished = folder / (target.name + _UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(
        {name: parameter.detach().contiguous() for name, parameter in parameters}, unfinished / "weights.safetensors"
    )
    moments = {
        f"{name}/{key}": value.contiguous()
        for name, parameter in parameters
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(moments, unfinished / "optimizer.safetensors")
    save_file(_generators(), unfinished / "generators.safetensors")
    (unfinished / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
    for old in sorted(path for path in folder.glob(f"{_PREFIX}*") if not path.name.endswith(_UNFINISHED))[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(
    path: Path, parameters: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put weights, optimizer state and random generators back; returns the JSON state.

    Raises:
        CheckpointError: a file is missing or damaged, or holds other parameters; then nothing was changed.
    """
    named = dict(parameters)
    try:
        weights = load_file(path / "weights.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        generators = load_file(path / "generators.safetensors")
        state = json.loads((path / "state.json").read_text())
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); remove it to fall back on the one before") from error
    differing = sorted(
        name
        for name in weights.keys() | named.keys()
        if name not in weights or name not in named or weights[name].shape != named[name].shape
    )
    if differing:
        raise CheckpointError(f"{path}: belongs to another model; parameters that differ: {', '.join(differing)}")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])
    optimizer.state.clear()
    for key, value in moments.items():
        name, _, moment = key.rpartition("/")
        parameter = named[name]
        # AdamW keeps its step counter on the CPU
        optimizer.state[parameter][moment] = value if moment == "step" else value.to(parameter.device)
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"])
    return state


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint, without touching anything."""
    try:
        return json.loads((path / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); remove it to fall back on the one before") from error


def _generators() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states

"""An adapter on its own or merged into its base model, in a folder that is complete or not there."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft import __version__ as peft_version
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import AutoTokenizer

from .peft import load_adapter
from .saving import replacing, want_writable
from .transformers import load_model, resolve_model

PROMPT = "The capital of France is"
# how far merged weights may move the logits, relative to the largest: each weight is rounded once more
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}
_MODEL_CONFIG = "config.json"
_ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, "README.md")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        folder: where. size: of all files, in bytes.
        difference: of the merged model's logits to those of base and adapter on one prompt, relative to the largest;
            None for an adapter on its own.
    """

    folder: Path
    size: int
    difference: float | None = None


def adapter_folder(source: Path) -> Path:
    """The adapter that `source`, a finished run's folder or the adapter's own, holds.

    Raises:
        FileNotFoundError: there is none.
    """
    for folder in (source, source / "adapter"):
        if (folder / CONFIG_NAME).is_file():
            return folder
    if (source / "checkpoints").is_dir():
        raise FileNotFoundError(f"adapter: got {source}, a run that is not finished; `echolora train --resume` ends it")
    raise FileNotFoundError(f"adapter: got {source}, wants a folder with {CONFIG_NAME}, or a finished run's folder")


def base_of(adapter: Path) -> str:
    """The base model's name in the adapter's configuration.

    Raises:
        ValueError: it is not there.
    """
    name = _saved_config(adapter).get("base_model_name_or_path")
    if not name:
        raise ValueError(f"model: got none, and {adapter / CONFIG_NAME} names no base model")
    return name


def export_adapter(
    source: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    merged: bool = False,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    stage: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Write an adapter, or the model with the adapter merged into it, to `output`.

    The adapter must fit the base model key by key and be finite. It is copied byte for byte; merged weights are
    loaded again from what was written, and must give the logits of base and adapter.

    Args:
        source: a finished run's folder, or a PEFT adapter's. output: a folder that is new or empty.
        model: the base model as `load_model` takes it; None for the one that the adapter names.
        merged: write the merged model and its tokenizer instead of the adapter.
        dtype: of the model, and so of merged weights. overwrite: replace an earlier export in `output`.
        stage: told about each part of the work as it begins.

    Raises:
        FileNotFoundError, AdapterMismatch, OSError: there is no such adapter or model, or they do not fit.
        FileExistsError: `output` is not empty and not to be replaced, or holds something else than an export.
        ValueError: the installed PEFT does not know the adapter's configuration, the adapter is not finite or cannot be
            merged, or the merged model computes something else; nothing is written.
    """
    adapter = adapter_folder(Path(source).expanduser())
    config = _known_config(adapter)
    spec = base_of(adapter) if model is None else model
    where = resolve_model(spec)
    output = Path(output).expanduser().resolve()
    _want_replaceable(output, overwrite, [Path(source).expanduser(), adapter, Path(where), Path.cwd()])
    stage(f"loading {spec}")
    base, tokenizer = load_model(spec, dtype=dtype)
    adapted = get_peft_model(base, config)
    if merged and not hasattr(adapted, "merge_and_unload"):
        raise ValueError(
            f"merged: got an adapter of {config.peft_type.value}, which cannot be merged; export the adapter alone"
        )
    load_adapter(adapted, adapter)
    _want_finite(adapter, adapted)
    with replacing(output) as unfinished:
        if not merged:
            for name in _ADAPTER_FILES:  # of what else may lie there, such as an optimizer, nothing
                if (adapter / name).is_file():
                    shutil.copyfile(adapter / name, unfinished / name)
                    if not filecmp.cmp(adapter / name, unfinished / name, shallow=False):
                        raise OSError(f"output: the copy of {adapter / name} differs from it")
            difference = None
        else:
            stage("merging and writing")
            inputs = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
            wanted = _logits(adapted, inputs)
            adapted.merge_and_unload().save_pretrained(unfinished)
            AutoTokenizer.from_pretrained(where).save_pretrained(unfinished)
            del base, adapted  # one model at a time
            stage("loading what was written, and comparing")
            again, _ = load_model(str(unfinished), dtype=dtype)
            difference = float((_logits(again, inputs) - wanted).abs().max() / wanted.abs().max())
            most = TOLERANCES[dtype]
            if not difference <= most:
                raise ValueError(
                    f"adapter: the merged model's logits differ from those of base and adapter by {difference:.1e} of "
                    f"the largest, wants at most {most:.0e} in {dtype}; use the adapter on its own, or another dtype"
                )
        size = sum(file.stat().st_size for file in unfinished.rglob("*") if file.is_file())
    return Exported(output, size, difference)


@torch.no_grad()
def _logits(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=inputs).logits.double()


def _saved_config(adapter: Path) -> dict[str, Any]:
    path = adapter / CONFIG_NAME
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: cannot be read (got a {type(saved).__name__}, wants the settings of an adapter)")
    return saved


def _known_config(adapter: Path) -> Any:
    """The adapter's configuration; raises where it asks for what the installed PEFT would leave out."""
    path, saved = adapter / CONFIG_NAME, _saved_config(adapter)
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: PEFT {peft_version} knows no such adapter ({error})") from error
    unknown = sorted(name for name, value in saved.items() if value and not hasattr(config, name))
    if unknown:
        settings = ", ".join(f"{name} = {saved[name]!r}" for name in unknown)
        raise ValueError(
            f"{path}: PEFT {peft_version} does not know {settings}; wants the release that wrote it "
            f"({saved.get('peft_version') or 'not stated'}), or a file without what changes nothing"
        )
    return config


def _want_finite(adapter: Path, model: PeftModel) -> None:
    tensors = get_peft_model_state_dict(model).items()
    broken = [name for name, tensor in tensors if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{adapter / SAFETENSORS_WEIGHTS_NAME}: not finite: {', '.join(broken)}")


def _want_replaceable(output: Path, overwrite: bool, needed: list[Path]) -> None:
    """Raise unless `output` can be made or replaced without losing anything but an earlier export."""
    want_writable(output)
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"output: {output} is not empty; give --overwrite to replace an earlier export")
    inside = [path for path in needed if path.exists() and path.resolve().is_relative_to(output)]
    if inside:
        raise FileExistsError(f"output: got {output}, which {inside[0]} is in; wants another folder")
    if not any((output / name).is_file() for name in (CONFIG_NAME, _MODEL_CONFIG)):
        raise FileExistsError(
            f"output: {output} holds no earlier export ({CONFIG_NAME} or {_MODEL_CONFIG}): not replaced"
        )

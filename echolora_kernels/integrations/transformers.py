"""Loading a causal language model and its tokenizer from a folder, a GGUF file, an installed package or a hub name."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

CACHE_VARIABLE = "ECHOLORA_CACHE"
PACKAGE_PREFIX = "package:"


def load_model(
    spec: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", quantize: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer.

    Args:
        spec: a local folder with safetensors weights, a .gguf file, "package:NAME" for the one GGUF file inside an
            installed Python package, or a hub name.
        dtype: of the weights. device: where they go.
        quantize: "nf4" or "int8", as which bitsandbytes stores the linears but the output head; None for none.

    Raises:
        ModuleNotFoundError: bitsandbytes is wanted and not there.
        FileNotFoundError: a path that does not exist, or a package without a GGUF file.
        OSError: a hub name that cannot be resolved; the message says what to do.
    """
    options = {} if quantize is None else _quantised(quantize, dtype, device)
    source = resolve_model(spec)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        if Path(source).is_dir():
            raise OSError(
                f"model: got folder {source}, from which no causal LM could be loaded "
                f"(weights are read from safetensors alone): {error}"
            ) from error
        raise OSError(
            f"model: got {spec!r}, which is no local folder or .gguf file, and the hub has no safetensors "
            "weights of that name or no answer; check the name and the network, or give a local folder"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if quantize is None:
        model.to(torch.device(device))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # for inference alone: the weight would have no gradient then
            module.support_avx512bf16_for_cpu = False
    return model, tokenizer


def _quantised(kind: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """What from_pretrained is told besides."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            f"quantize: got {kind!r}, which takes bitsandbytes; pip install bitsandbytes",
            name="bitsandbytes",
        )
    if kind == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": config, "device_map": {"": device}}


def resolve_model(spec: str) -> str:
    """What from_pretrained should load for `spec`: a folder, or the hub name itself."""
    if spec.startswith(PACKAGE_PREFIX):
        return str(_converted(_packaged_gguf(spec.removeprefix(PACKAGE_PREFIX))))
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"model: got {spec!r}, no such file")
        return str(_converted(path))
    if spec and path.is_dir():
        return str(path)
    if not spec or path.exists() or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise FileNotFoundError(f"model: got {spec!r}, wants a folder, a .gguf file, package:NAME or a hub name")
    return spec


def _packaged_gguf(package: str) -> Path:
    is_name = all(part.isidentifier() for part in package.split("."))
    try:  # finds without importing, so the package's own needs do not matter
        found = importlib.util.find_spec(package) if is_name else None
    except ModuleNotFoundError:  # of a package that it would lie in
        found = None
    folders = [] if found is None else [Path(folder) for folder in found.submodule_search_locations or []]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if len(files) != 1:
        state = "is not installed" if found is None else f"holds {len(files)} .gguf files, wants exactly one"
        raise FileNotFoundError(f"model: package {package!r} {state}")
    return files[0]


def _converted(gguf: Path) -> Path:
    """A folder with the same model in safetensors, made once: reading GGUF takes many times longer."""
    state = gguf.stat()
    identity = f"{gguf.resolve()}:{state.st_size}:{state.st_mtime_ns}"
    target = cache_folder() / f"{gguf.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        model.hf_quantizer = None  # the weights are dequantised by now; without this they refuse to be saved
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(unfinished)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        if isinstance(model.config.eos_token_id, int):  # some versions of transformers take another token of the file
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
        tokenizer.save_pretrained(unfinished)
        try:
            unfinished.rename(target)
        except OSError:
            if not target.is_dir():  # unless another process was faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def cache_folder() -> Path:
    """Where converted models are kept: $ECHOLORA_CACHE, else ~/.cache/echolora."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "echolora")

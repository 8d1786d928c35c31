"""HF checkpoints in a quantized format, made from bf16 ones: what an engine of that format starts from."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from refit.plan import canonical
from refit.transfer.precision.formats import WEIGHT, PrecisionError
from refit.transfer.precision.fp8 import BLOCK, FP8_BLOCK
from refit.transfer.precision.mxfp8 import MXFP8
from refit.transfer.precision.scheme import quantized

QUANTIZATIONS = (FP8_BLOCK.name, MXFP8.name)
"""Formats that checkpoints can be written in."""
KEPT = re.compile(r".*(embed|lm_head|norm|\.gate\.|router|shared_expert_gate|conv1d|eh_proj).*")
"""What published quantized checkpoints leave as it is: embeddings, heads, norms, routers."""
INDEX_FILE = "model.safetensors.index.json"


def quantize_checkpoint(source: str | Path, target: str | Path, form: str) -> Path:
    """Write the checkpoint in `source` to `target` in a format, one file at a time. Returns `target`.

    Raises PrecisionError for a format that no configuration of vLLM reads, and for a folder without tensors.
    """
    from safetensors.torch import load_file, save_file

    source, target = Path(source), Path(target)
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise PrecisionError(f"{source} has no .safetensors file to quantize")
    target.mkdir(parents=True, exist_ok=True)
    kept: set[str] = set()
    places: dict[str, str] = {}
    for file in files:
        tensors = load_file(file)
        scheme = {canonical(name)[0]: form for name, tensor in tensors.items() if _is_quantized(name, tensor)}
        kept |= {_module(name) for name, tensor in tensors.items() if _is_left_out(name, tensor)}
        written = dict(quantized(tensors.items(), scheme))
        save_file(written, target / file.name, metadata={"format": "pt"})
        places |= dict.fromkeys(written, file.name)
    for path in source.glob("*.json"):
        if path.name != INDEX_FILE:
            shutil.copyfile(path, target / path.name)
    if len(files) > 1:
        (target / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config: dict[str, Any] = json.loads((target / "config.json").read_text())
    config["quantization_config"] = quantization_config(form, sorted(kept))
    (target / "config.json").write_text(json.dumps(config, indent=2))
    return target


def quantization_config(form: str, kept: list[str]) -> Mapping[str, Any]:
    """The entry of config.json by which vLLM knows the format; `kept` are modules that stay as they are."""
    if form == FP8_BLOCK.name:
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": list(BLOCK),
            "modules_to_not_convert": kept,
        }
    if form == MXFP8.name:
        return {"quant_method": "mxfp8", "ignored_layers": kept}
    raise PrecisionError(f"no checkpoints are written in {form!r}; use {' or '.join(QUANTIZATIONS)}")


def _is_quantized(name: str, tensor: Tensor) -> bool:
    return _is_matrix(name, tensor) and not KEPT.fullmatch(name)


def _is_left_out(name: str, tensor: Tensor) -> bool:
    return _is_matrix(name, tensor) and KEPT.fullmatch(name) is not None


def _is_matrix(name: str, tensor: Tensor) -> bool:
    return name.endswith(f".{WEIGHT}") and tensor.ndim == 2


def _module(name: str) -> str:
    return name.removesuffix(f".{WEIGHT}")

"""Names, shapes and dtypes of an HF checkpoint, read from safetensors headers: no tensor is opened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refit.plan.errors import ConfigError

_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "U8": "uint8",
    "I8": "int8",
    "I32": "int32",
    "I64": "int64",
    "BOOL": "bool",
}

HfShapes = dict[str, tuple[tuple[int, ...], str]]
"""HF tensor name -> (shape, dtype name)."""


def read_hf_shapes(model_dir: str | Path) -> HfShapes:
    """Every tensor of the checkpoint in `model_dir`, in name order.

    The files are those of the index when there is one, else every *.safetensors. Raises ConfigError when the
    folder has none, or when one header cannot be read.
    """
    found: HfShapes = {}
    for file in _files(Path(model_dir)):
        for name, entry in _header(file):
            if name in found:
                raise ConfigError(f"{name} is in two files of {model_dir}; keep one")
            if entry["dtype"] not in _DTYPES:
                raise ConfigError(
                    f"{file}: {name} has dtype {entry['dtype']}, known are {', '.join(_DTYPES)}"
                )
            found[name] = (tuple(entry["shape"]), _DTYPES[entry["dtype"]])
    return dict(sorted(found.items()))


def _files(folder: Path) -> list[Path]:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        names = set(json.loads(indexes[0].read_text())["weight_map"].values())
        return [folder / name for name in sorted(names)]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} has no .safetensors file: save the model there, or name its tensors")
    return files


def _header(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ConfigError(f"{file} has no readable safetensors header: {error}") from error
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, entry

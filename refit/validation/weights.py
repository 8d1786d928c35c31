"""Weights whose place can be read off their values, and the next version of them.

Version 1: element i of the checkpoint, counted through its tensors in name order, has its address as its value: the
number i in fp32, the i-th pattern of a normal value in bf16 (32,512 of them, in turn). So a misplaced element names
where it came from. In fp32 no two elements have the same value, so that a model has at most 2^24 elements. Version 2: a
value in [-0.5, 0.5) that depends on that address alone, so that every rank can compute its own part in place, and an
engine can run with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refit.plan import ConfigError, canonical
from refit.train_side.tiny_models import make_tiny_model, rewrite

EXACT_FLOAT32 = 1 << 24
NORMAL_BFLOAT16 = range(0x0080, 0x7F80)
"""Bit patterns of positive finite values; subnormal ones are left out, which kernels flush to zero."""
_ODD = 2654435761  # Knuth's multiplier: neighbours get values far apart


def make_checkpoint(
    model: str, overrides: Mapping[str, Any], precision: str, folder: str | Path
) -> tuple[str, ...]:
    """Write version 1 of `model` (a folder, or a name for `make_tiny_model`) into `folder`; its tensor names.

    Raises ConfigError for an fp32 model whose addresses would not all be different numbers.
    """
    dtype = "float32" if precision == "fp32" else "bfloat16"
    source: str | Path = model
    if not Path(model).is_dir():
        source = make_tiny_model(model, folder, dtype=dtype, overrides=overrides)
    position = 0

    def number(name: str, old: Tensor) -> Tensor:
        nonlocal position
        first, position = position, position + old.numel()
        if precision == "fp32" and position > EXACT_FLOAT32:
            raise ConfigError(
                f"{model} has {position} elements up to {name}, but fp32 counts exactly to {EXACT_FLOAT32} only: "
                'use a smaller model, or precision = "bf16"'
            )
        return _of_address(torch.arange(first, position), precision).reshape(old.shape)

    return rewrite(source, folder, number)


def make_initial(source: str | Path, folder: str | Path, precision: str) -> str:
    """Write values that differ from those of versions 1 and 2 in almost every element; returns the folder."""
    rewrite(source, folder, lambda _, old: -next_version(old, precision))
    return str(folder)


def next_version(values: Tensor, precision: str) -> Tensor:
    """Version 2 of these elements of version 1, element by element."""
    mixed = (_address(values, precision) * _ODD) % (1 << 32)
    new = (mixed >> 8).to(torch.float32) / EXACT_FLOAT32 - 0.5
    return new if precision == "fp32" else new.to(torch.bfloat16)


def _of_address(address: Tensor, precision: str) -> Tensor:
    if precision == "fp32":
        return address.to(torch.float32)
    patterns = NORMAL_BFLOAT16.start + address % len(NORMAL_BFLOAT16)
    return patterns.to(torch.int16).view(torch.bfloat16)


def _address(values: Tensor, precision: str) -> Tensor:
    """The inverse, also for a trainer that keeps a bf16 tensor of the checkpoint in fp32."""
    if precision == "fp32":
        return values.to(torch.int64)
    return values.to(torch.bfloat16).contiguous().view(torch.int16).to(torch.int64)


def stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """HF tensors by canonical name, experts stacked."""
    groups: dict[str, dict[int | None, Tensor]] = {}
    for name, tensor in tensors.items():
        key, expert = canonical(name)
        groups.setdefault(key, {})[expert] = tensor
    return {
        key: group[None] if None in group else torch.stack([group[expert] for expert in range(len(group))])
        for key, group in groups.items()
    }


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by HF name."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found.update(load_file(file))
    return dict(sorted(found.items()))


def first_difference(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], origin: Mapping[str, Tensor]
) -> str:
    """ "" if equal bit for bit, else the first wrong element: where it is, what it holds, what belongs there.

    `origin` are the HF tensors of the version: values that occur once in them are named by their place.
    """
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found or name not in wanted:
            return f"{name} is only on one side"
        mine, theirs = found[name], wanted[name]
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return f"{name}: {tuple(mine.shape)} {mine.dtype}, expected {tuple(theirs.shape)} {theirs.dtype}"
        wrong = (_bits(mine) != _bits(theirs)).flatten().nonzero()
        if len(wrong):
            at = int(wrong[0])
            place = _index(at, tuple(mine.shape))
            has, should = mine.flatten()[at], theirs.flatten()[at]
            return (
                f"{name}{place} holds {_named(has, origin)}, expected {_named(should, origin)} "
                f"({len(wrong)} of {mine.numel()} elements differ)"
            )
    return ""


def _named(value: Tensor, origin: Mapping[str, Tensor]) -> str:
    """The HF element that has this value, if just one has it."""
    places = []
    for name, tensor in origin.items():
        hits = (tensor.flatten() == value.to(tensor.dtype)).nonzero()
        places += [f"{name}{_index(int(hit), tuple(tensor.shape))}" for hit in hits[:2]]
        if len(places) > 1:
            break
    return f"{places[0]} ({value.item()})" if len(places) == 1 else f"{value.item()}"


def _index(flat: int, shape: tuple[int, ...]) -> list[int]:
    place = []
    for size in reversed(shape):
        flat, rest = divmod(flat, size)
        place.append(rest)
    return place[::-1]


def _bits(tensor: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])

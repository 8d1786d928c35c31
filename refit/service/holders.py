"""Holders of weights that `diff` can compare: a running engine and an HF checkpoint on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refit.gen_side.loader.hf_index import HfShapes, read_hf_shapes
from refit.plan import Region, TensorSpec
from refit.plan.naming import canonical, hf_name, is_stacked
from refit.plan.read import HeldCell, plan_read
from refit.service.diff import EXACT, Box, in_dtype
from refit.service.reader import Reader, Session
from refit.transfer import reading
from refit.transfer.digest import MASK, digest
from refit.transfer.inverse import RESOLUTION


class EngineWeights:
    """What one engine holds. All asks must meet one version; VersionMoved is raised otherwise."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._session: Session = reader.session(None)

    @property
    def name(self) -> str:
        return self._reader.engine.name

    @property
    def version(self) -> int | None:
        return self._session.version

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._reader.side.specs

    @property
    def unreadable(self) -> Mapping[str, str]:
        return self._reader.side.misc

    def cells(self, tensor: str) -> tuple[HeldCell, ...]:
        side = self._reader.side
        return plan_read(side, tensor, Region.whole(side.specs[tensor].shape)).cells

    def digests(self, boxes: Sequence[Box]) -> list[int | str]:
        by_rank: dict[int, list[Box]] = {}
        for box in boxes:
            by_rank.setdefault(box.rank, []).append(box)
        asked = {rank: [(b.tensor, b.dtype, b.region) for b in each] for rank, each in by_rank.items()}
        answers = {rank: iter(values) for rank, values in self._session.digests(asked).items()}
        return [next(answers[box.rank]) for box in boxes]

    def values(self, box: Box) -> tuple[Tensor, float]:
        self._session.kinds.clear()
        tensor = self._session.box_of(self._reader.side, box.tensor, box.region, box.rank)
        return in_dtype(tensor, box.dtype), max(map(_grain, self._session.kinds.values()), default=EXACT)

    def who(self, rank: int) -> str:
        return f"{self.name} rank {rank}"


class CheckpointWeights:
    """An HF checkpoint folder. Tensors are mapped from the files, never read as a whole."""

    def __init__(self, folder: Path, shapes: HfShapes) -> None:
        self._folder = folder
        self._shapes = shapes
        self._files = _files_of(folder)
        self._opened: dict[Path, Any] = {}
        self._specs: dict[str, TensorSpec] = {}
        experts: dict[str, int] = {}
        for name, (shape, dtype) in shapes.items():
            tensor, expert = canonical(name)
            if expert is not None:
                experts[tensor] = max(experts.get(tensor, 0), expert + 1)
                shape = (experts[tensor], *shape)
            self._specs[tensor] = TensorSpec(tensor, shape, dtype)

    @classmethod
    def open(cls, folder: str | Path) -> CheckpointWeights:
        """Raises ConfigError when the folder is no checkpoint."""
        return cls(Path(folder), read_hf_shapes(folder))

    @property
    def name(self) -> str:
        return str(self._folder)

    @property
    def version(self) -> int | None:
        return None

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    @property
    def unreadable(self) -> Mapping[str, str]:
        return {}

    def cells(self, tensor: str) -> tuple[HeldCell, ...]:
        return (HeldCell(Region.whole(self._specs[tensor].shape), (0,)),)

    def digests(self, boxes: Sequence[Box]) -> list[int | str]:
        return [self._digest(box) for box in boxes]

    def values(self, box: Box) -> tuple[Tensor, float]:
        parts = [part for _, part in self._parts(box)]
        return torch.cat(parts) if len(parts) > 1 else parts[0], EXACT

    def who(self, rank: int) -> str:  # noqa: ARG002 - it has one
        return self.name

    def _digest(self, box: Box) -> int:
        shape = self._specs[box.tensor].shape
        return sum(digest(part, region, shape) for region, part in self._parts(box)) & MASK

    def _parts(self, box: Box) -> list[tuple[Region, Tensor]]:
        """The box by files: whole, or one part [1, ...] per expert."""
        if not is_stacked(box.tensor):
            return [(box.region, in_dtype(self._view(box.tensor, box.region), box.dtype))]
        inner = Region(box.region.starts[1:], box.region.stops[1:])
        return [
            (
                box.region.with_dim(0, expert, expert + 1),
                in_dtype(self._view(hf_name(box.tensor, expert), inner), box.dtype).unsqueeze(0),
            )
            for expert in range(box.region.starts[0], box.region.stops[0])
        ]

    def _view(self, name: str, region: Region) -> Tensor:
        file = self._files[name]
        if file not in self._opened:  # which costs as much as a digest of some 100 KiB
            from safetensors import safe_open

            self._opened[file] = safe_open(file, framework="pt")
        tensor: Tensor = self._opened[file].get_tensor(name)
        return tensor[region.slices()]


def _grain(kind: str) -> float:
    """How far from what was loaded an element may be that was had in this way."""
    match kind:
        case reading.INVERTED:
            return RESOLUTION
        case reading.THROUGH_KERNEL | reading.SHADOWED:
            return 0.0
        case _:
            return EXACT


def _files_of(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that has it."""
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found

"""Where two holders of weights differ: digests of everything first, then only what differs, down to the element.

A holder is an engine (`EngineWeights`), an HF checkpoint (`CheckpointWeights`) or a job's trainers. Every rank that
holds an element is compared, so a replica that is off shows by its rank. Digests are taken where the weights are; a box
whose digests differ is halved and halved again by digests, so that few elements travel.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from typing import Any, Protocol

import torch
from torch import Tensor

from refit.plan import PlanError, Region, TensorSpec
from refit.plan.dtypes import item_bytes
from refit.plan.match import BoxIndex, match_box
from refit.plan.naming import hf_name, is_stacked
from refit.plan.read import HeldCell
from refit.plan.region import split_rows
from refit.transfer.memory import as_bits, torch_dtype

ASK_BYTES = 256 << 20  # most bytes that one ask for digests covers: how long an engine waits for it
NUM_BLOCKS = 64  # into how many blocks a box that differs is cut, again and again
EXACT = -1.0
READ_BYTES = 1 << 20  # a box that differs and is no larger is compared element by element


@dataclass(frozen=True, slots=True)
class Box:
    """`region` of canonical tensor `tensor` as `rank` holds it, to be taken in `dtype`."""

    tensor: str
    dtype: str
    region: Region
    rank: int

    @property
    def num_bytes(self) -> int:
        return self.region.num_elements * item_bytes(self.dtype)


class Weights(Protocol):
    """A holder of weights. Ranks are its own; one without ranks has rank 0."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int | None: ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Canonical tensors that it holds as they are in a checkpoint."""
        ...

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Tensors that it has only in another form, and why."""
        ...

    def cells(self, tensor: str) -> tuple[HeldCell, ...]:
        """A partition of the tensor, each cell with all ranks that hold it."""
        ...

    def digests(self, boxes: Sequence[Box]) -> list[int | str]:
        """One digest per box, or the reason why there is none."""
        ...

    def values(self, box: Box) -> tuple[Tensor, float]:
        """(the elements, how far off they may be: EXACT, 0.0 where zeros have lost their sign, or more)."""
        ...

    def who(self, rank: int) -> str:
        """How a message names a rank of it."""
        ...


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that two places disagree on. `index` is the element that differs most, in the HF tensor `name`.

    `delta` is the magnitude of `left - right`; infinite where one is no number. `num_elements` differ in all.
    """

    name: str
    left: str
    right: str
    index: tuple[int, ...]
    left_value: float
    right_value: float
    delta: float
    num_elements: int

    def __str__(self) -> str:
        place = ", ".join(map(str, self.index))
        return (
            f"{self.name}[{place}]: {self.left_value!r} on {self.left}, {self.right_value!r} on {self.right} "
            f"(largest difference {self.delta:.6g}; {self.num_elements} elements differ)"
        )


@dataclass(frozen=True, slots=True)
class DiffReport:
    """What was compared and what differs. `skipped`: canonical tensor -> why it was not compared."""

    left: str
    right: str
    versions: tuple[int | None, int | None]
    num_tensors: int
    num_bytes: int
    differences: tuple[Difference, ...]
    skipped: Mapping[str, str]
    seconds: float

    @property
    def equal(self) -> bool:
        """Nothing differs; what was skipped is not known to."""
        return not self.differences


@dataclass(slots=True)
class _Found:
    """Differences of one tensor between two places, while they are gathered."""

    num_elements: int = 0
    delta: float = -1.0
    at: tuple[int, ...] = ()
    values: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two places that should hold the same elements."""

    left: Box
    right: Box
    sides: tuple[Weights, Weights] = field(hash=False)

    def cut(self) -> Iterator[_Pair]:
        for part in split_rows(self.left.region, max(1, self.left.region.num_elements // NUM_BLOCKS)):
            yield _Pair(_on(self.left, part), _on(self.right, part), self.sides)


def diff(left: Weights, right: Weights, pattern: str = "*") -> DiffReport:
    """Compare all tensors that both hold and whose canonical name fits `pattern`. Raises PlanError if there is none."""
    started_s = time.monotonic()
    names = sorted(name for name in {*left.specs, *right.specs} if fnmatch(name, pattern))
    shared, skipped = [], dict[str, str]()
    for name in names:
        reason = _incomparable(name, left, right)
        if reason:
            skipped[name] = reason
        else:
            shared.append(name)
    if not shared:
        raise PlanError(f"{left.name} and {right.name} have no tensor in common that fits {pattern!r}")
    pairs = [pair for name in shared for pair in _pairs(name, left, right)]
    found: dict[tuple[str, str, str], _Found] = {}
    for pair in _differing(pairs, skipped):
        _compare(pair, found, skipped)
    differences = tuple(_difference(*key, each) for key, each in sorted(found.items()) if each.num_elements)
    num_bytes = sum(
        math.prod(left.specs[name].shape) * item_bytes(_dtype(name, left, right)) for name in shared
    )
    seconds = time.monotonic() - started_s
    versions = (left.version, right.version)
    return DiffReport(left.name, right.name, versions, len(shared), num_bytes, differences, skipped, seconds)


def _incomparable(name: str, left: Weights, right: Weights) -> str:
    for side, other in ((left, right), (right, left)):
        if name in side.unreadable:
            return f"{side.name}: {side.unreadable[name]}"
        if name not in side.specs:
            return f"only {other.name} has it"
    mine, theirs = left.specs[name], right.specs[name]
    if mine.shape != theirs.shape:
        return f"{list(mine.shape)} on {left.name}, {list(theirs.shape)} on {right.name}"
    if mine.dtype != theirs.dtype and not all(_is_float(spec.dtype) for spec in (mine, theirs)):
        return (
            f"{mine.dtype} on {left.name}, {theirs.dtype} on {right.name}: compare engines of one precision"
        )
    return ""


def _is_float(dtype: str) -> bool:
    return dtype in ("float64", "float32", "float16", "bfloat16")


def _dtype(name: str, left: Weights, right: Weights) -> str:
    """Where the two store different floats, both are taken in the shorter one."""
    return min((left.specs[name].dtype, right.specs[name].dtype), key=item_bytes)


def _pairs(name: str, left: Weights, right: Weights) -> Iterator[_Pair]:
    """Every place that holds some elements against the first place on the left that does."""
    dtype, mine, theirs = _dtype(name, left, right), left.cells(name), right.cells(name)
    index = BoxIndex.of([cell.region for cell in theirs])
    for cell in mine:
        for part in match_box(index, cell.region):
            first = Box(name, dtype, part.region, cell.ranks[0])
            for rank in cell.ranks[1:]:
                yield _Pair(first, Box(name, dtype, part.region, rank), (left, left))
            for rank in theirs[part.sources[0]].ranks:
                yield _Pair(first, Box(name, dtype, part.region, rank), (left, right))


def _differing(pairs: Sequence[_Pair], skipped: dict[str, str]) -> Iterator[_Pair]:
    """Pairs of at most READ_BYTES whose digests differ, found by cutting larger ones again and again."""
    while pairs:
        smaller: list[_Pair] = []
        for batch in _batches(pairs):
            values = [_digests(batch, number, skipped) for number in (0, 1)]
            for pair, mine, theirs in zip(batch, *values, strict=True):
                if mine == theirs or pair.left.tensor in skipped:
                    continue  # equal, or said to be unknown
                if pair.left.num_bytes <= READ_BYTES:
                    yield pair
                else:
                    smaller += pair.cut()
        pairs = smaller


def _digests(batch: Sequence[_Pair], number: int, skipped: dict[str, str]) -> list[int | str]:
    """The digest of each pair's left (0) or right (1) box; a box that several pairs share is asked for once."""
    wanted: dict[int, dict[Box, None]] = {}
    for pair in batch:
        wanted.setdefault(id(pair.sides[number]), {})[(pair.left, pair.right)[number]] = None
    known: dict[tuple[int, Box], int | str] = {}
    for side in {id(pair.sides[number]): pair.sides[number] for pair in batch}.values():
        boxes = list(wanted[id(side)])
        for box, value in zip(boxes, side.digests(boxes), strict=True):
            known[id(side), box] = value
            if isinstance(value, str):
                skipped.setdefault(box.tensor, f"{side.name}, {side.who(box.rank)}: {value}")
    return [known[id(pair.sides[number]), (pair.left, pair.right)[number]] for pair in batch]


def _batches(pairs: Sequence[_Pair]) -> Iterator[list[_Pair]]:
    batch: list[_Pair] = []
    num_bytes = 0
    for pair in pairs:
        if batch and num_bytes + pair.left.num_bytes > ASK_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(pair)
        num_bytes += pair.left.num_bytes
    if batch:
        yield batch


def _compare(pair: _Pair, found: dict[tuple[str, str, str], _Found], skipped: Mapping[str, str]) -> None:
    """Element by element. What one side cannot tell from the other's is equal: zeros of two signs, or a bit more."""
    if pair.left.tensor in skipped:
        return
    (mine, grain), (theirs, other_grain) = (
        side.values(box) for side, box in zip(pair.sides, (pair.left, pair.right), strict=True)
    )
    wrong = as_bits(mine.contiguous()) != as_bits(theirs.contiguous())
    a, b = mine.to(torch.float64), theirs.to(torch.float64)
    if (
        min(grain, other_grain) <= 0.0
    ):  # two that were computed back alike are equal only where what is stored is
        wrong &= ~((a - b).abs() <= max(grain, other_grain))
    if not bool(wrong.any()):
        return
    delta = torch.where(wrong, (a - b).abs().nan_to_num(math.inf, math.inf, math.inf), -1.0)
    at = int(delta.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), delta.shape)) if delta.ndim else ()
    index = tuple(low + i for low, i in zip(pair.left.region.starts, where, strict=True))
    left_side, right_side = pair.sides
    name, place = _hf_place(pair.left.tensor, index)
    key = (name, left_side.who(pair.left.rank), right_side.who(pair.right.rank))
    one = found.setdefault(key, _Found())
    one.num_elements += int(wrong.sum())
    if float(delta.flatten()[at]) > one.delta:
        one.delta, one.at = float(delta.flatten()[at]), place
        one.values = (float(a.flatten()[at]), float(b.flatten()[at]))


def _hf_place(tensor: str, index: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """An element of a canonical tensor by HF name and index there."""
    return (hf_name(tensor, index[0]), index[1:]) if is_stacked(tensor) else (tensor, index)


def _difference(name: str, left: str, right: str, found: _Found) -> Difference:
    return Difference(name, left, right, found.at, *found.values, found.delta, found.num_elements)


def _on(box: Box, region: Region) -> Box:
    return Box(box.tensor, box.dtype, region, box.rank)


def in_dtype(tensor: Tensor, dtype: str) -> Tensor:
    """By torch's own rounding where the dtypes differ, which is what a refit does too."""
    return tensor.to(torch_dtype(dtype))


def plain_report(report: DiffReport) -> dict[str, Any]:
    """The report as JSON, where no number is infinite."""
    found = asdict(report)
    for one, difference in zip(found["differences"], report.differences, strict=True):
        one |= {key: repr(one[key]) for key in ("left_value", "right_value", "delta")}
        one["text"] = str(difference)
    return found | {"equal": report.equal}

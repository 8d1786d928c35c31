"""Trainers' memory as engines store it: quantized on the sender, before the wire.

`QuantizedSource.prepare` turns a rank's manifest into one that holds, instead of each matrix of the scheme, its
quantized parts: same boxes, block coordinates for scales. Planner and transfer then see ordinary tensors. `params`
quantizes the live weights of this moment:

1. largest magnitude of every shared cell, over the pieces of it that this rank holds;
2. where a cut goes through cells, one all-reduce (maximum) over all trainers of exactly those cells;
3. elements and scales, piece by piece, into new memory that lives as long as the caller keeps it.

Two ranks that hold parts of one block hence hold the same scale for it, and either may send it. Extra memory: the
quantized parts of this rank's shard (for FP8, 0.5 x its bf16 bytes), for the duration of a refit.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from refit.plan import Holding, MiscReason, ParamSpec, RankManifest, Region, TensorSpec
from refit.plan.region import disjoint, first_overlap, merge_adjacent
from refit.transfer.memory import as_bits, strided_box, torch_dtype
from refit.transfer.precision.codecs import Codec, codec_of
from refit.transfer.precision.formats import WHOLE, Part, PrecisionError
from refit.transfer.precision.scheme import Scheme

type Cells = Mapping[str, Sequence[int]]
"""Shared cells by canonical tensor: their numbers in the tensor's own grid, row-major, ascending."""


class Trainers(Protocol):
    """The trainers' own collectives; every trainer calls them in the same order."""

    def gather(self, value: Any) -> Sequence[Any]:
        """The JSON `value` of every trainer, in rank order."""
        ...

    def agree_on_maximum(self, values: Tensor) -> None:
        """Replace each element by the largest of all trainers, in place."""
        ...


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a matrix that one rank holds without gaps, and the strided pieces of memory that it consists of.

    `outputs` names the params of its quantized parts. `cells` are the touched shared cells, a box of the tensor's grid;
    `cut` those of them (flat, in `cells`) that other boxes share too, `slots` their places in the agreed vector.
    """

    codec: Codec
    tensor: str
    region: Region
    pieces: tuple[Holding, ...]
    outputs: tuple[str, ...]
    cells: Region
    cut: Tensor
    slots: Tensor

    @property
    def parts(self) -> Iterator[tuple[str, Part]]:
        return zip(self.outputs, self.codec.format.parts, strict=True)


@dataclass(frozen=True, slots=True)
class QuantizedSource:
    """One trainer rank. `manifest` is what it publishes; `num_agreed` counts the cells that cuts go through."""

    manifest: RankManifest
    boxes: tuple[Box, ...]
    num_agreed: int
    trainers: Trainers

    @classmethod
    def prepare(cls, manifest: RankManifest, scheme: Scheme, trainers: Trainers) -> "QuantizedSource":
        """Collective over the trainers, metadata only: nothing of a tensor's size is allocated.

        Tensors that the manifest holds as their parts already are left as they are.
        """
        stored = stored_in(manifest, scheme)
        scheme = {name: form for name, form in scheme.items() if name not in stored}
        shapes = {spec.name: spec.shape for spec in manifest.tensors if spec.name in scheme}
        misc = {reason.tensor: reason.reason for reason in manifest.misc if reason.tensor in scheme}
        boxes: list[Box] = []
        for name, holdings in _by_tensor(manifest.holdings, shapes).items():
            try:
                boxes += _boxes(codec_of(scheme[name]), name, holdings, shapes[name])
            except PrecisionError as error:
                misc[name] = str(error)
        slots = _Slots.of(trainers.gather(_cut_cells(boxes, shapes)))
        boxes = [slots.placed(box, shapes[box.tensor]) for box in boxes]
        return cls(_described(manifest, scheme, boxes, misc), tuple(boxes), slots.num_slots, trainers)

    def params(self, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`live` (the params of the original manifest) and the quantized params of this moment. Collective."""
        maxima = [_maxima(box, live) for box in self.boxes]
        if self.num_agreed:
            self._agree(maxima, next(iter(live.values())).device)
        found = dict(live)
        for box, cells in zip(self.boxes, maxima, strict=True):
            found |= _encoded(box, live, cells)
        return found

    def _agree(self, maxima: Sequence[Tensor], device: torch.device) -> None:
        """A rank without boxes takes part too, with a tensor where the trainers' collectives take one."""
        agreed = torch.zeros(self.num_agreed, dtype=torch.float32, device=device)
        for box, cells in zip(self.boxes, maxima, strict=True):
            agreed.scatter_reduce_(0, box.slots.to(device), cells.view(-1)[box.cut.to(device)], "amax")
        self.trainers.agree_on_maximum(agreed)
        for box, cells in zip(self.boxes, maxima, strict=True):
            cells.view(-1)[box.cut.to(device)] = agreed[box.slots.to(device)]


def stored_in(manifest: RankManifest, scheme: Scheme) -> frozenset[str]:
    """The tensors of the scheme that the manifest has in their format."""
    return frozenset(
        spec.name
        for spec in manifest.tensors
        if spec.name in scheme and spec.dtype == codec_of(scheme[spec.name]).format.parts[0].dtype
    )


def _by_tensor(holdings: Iterable[Holding], names: Mapping[str, Any]) -> dict[str, list[Holding]]:
    found: dict[str, list[Holding]] = {}
    for holding in holdings:
        if holding.tensor in names and not holding.region.is_empty:
            found.setdefault(holding.tensor, []).append(holding)
    return found


def _boxes(codec: Codec, name: str, holdings: list[Holding], shape: tuple[int, ...]) -> Iterator[Box]:
    """The held part of a tensor as few boxes, each with the pieces that fill it."""
    regions = [holding.region for holding in holdings]
    if first_overlap(regions) is not None:
        regions = list(disjoint(regions))
    nothing = torch.empty(0, dtype=torch.long)
    for number, region in enumerate(merge_adjacent(regions)):
        codec.format.require_whole_units(name, region, shape)
        pieces = tuple(_pieces(holdings, region))
        for piece in pieces:
            codec.format.require_whole_units(name, piece.region, shape)
        outputs = tuple(f"{part_name}@{number}" for part_name in codec.format.names(name))
        cells = _shared_cells(codec, region)
        yield Box(codec, name, region, pieces, outputs, cells, nothing, nothing)


def _pieces(holdings: Iterable[Holding], region: Region) -> Iterator[Holding]:
    for holding in holdings:
        inside = holding.region.intersect(region)
        if inside is not None:
            yield Holding(holding.tensor, inside, holding.param, holding.offset_of(inside), holding.strides)


def _shared_cells(codec: Codec, region: Region) -> Region:
    """The shared cells that `region` touches, as a box of their grid."""
    return Part("", "float32", codec.format.shared).region(region)


def _cut_cells(boxes: Iterable[Box], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The cells that some box of this rank holds only in part."""
    found: dict[str, set[int]] = {}
    for box in boxes:
        partial = ~_filled_cells(box, shapes[box.tensor])
        if partial.any():
            numbers = _cell_numbers(box, shapes[box.tensor])[partial]
            found.setdefault(box.tensor, set()).update(numbers.tolist())
    return {tensor: tuple(sorted(numbers)) for tensor, numbers in found.items()}


def _filled_cells(box: Box, shape: tuple[int, ...]) -> Tensor:
    """For each cell of the box, in the shape of `box.cells`: whether the box holds all of it."""
    if box.codec.format.shared == box.codec.format.unit:  # no cut goes through a unit
        return torch.ones(box.cells.shape, dtype=torch.bool)
    if box.codec.format.shared == WHOLE:
        inside = box.region.starts[-2:] == (0, 0) and box.region.stops[-2:] == shape[-2:]
        return torch.full(box.cells.shape, inside)
    rows, columns = (_filled(box, shape, dim) for dim in (-2, -1))
    return (rows[:, None] & columns).expand(box.cells.shape)


def _filled(box: Box, shape: tuple[int, ...], dim: int) -> Tensor:
    """For each row (or column) of cells of the box: whether the box spans it in that dim."""
    size = box.codec.format.shared[dim]
    cells = torch.arange(box.cells.starts[dim], box.cells.stops[dim])
    stops = ((cells + 1) * size).clamp(max=shape[dim])
    return (box.region.starts[dim] <= cells * size) & (stops <= box.region.stops[dim])


def _cell_numbers(box: Box, shape: tuple[int, ...]) -> Tensor:
    """The number of each cell of the box in the tensor's grid, in the shape of `box.cells`."""
    grid = _shared_cells(box.codec, Region.whole(shape)).stops
    numbers = torch.zeros((), dtype=torch.long)
    for start, stop, size in zip(box.cells.starts, box.cells.stops, grid, strict=True):
        numbers = numbers[..., None] * size + torch.arange(start, stop)
    return numbers


@dataclass(frozen=True, slots=True)
class _Slots:
    """Places in the agreed vector: per tensor, its first slot and the cells that have one."""

    first: Mapping[str, int]
    cells: Mapping[str, Tensor]
    num_slots: int

    @classmethod
    def of(cls, everyone: Iterable[Cells]) -> "_Slots":
        """A slot for each cell that any trainer holds only in part; the same on every trainer."""
        union: dict[str, set[int]] = {}
        for cells in everyone:
            for tensor, numbers in cells.items():
                union.setdefault(tensor, set()).update(numbers)
        first, num_slots = {}, 0
        for tensor in sorted(union):
            first[tensor] = num_slots
            num_slots += len(union[tensor])
        return cls(first, {tensor: torch.tensor(sorted(union[tensor])) for tensor in union}, num_slots)

    def placed(self, box: Box, shape: tuple[int, ...]) -> Box:
        """The box with its share of the slots: also of cells that it holds entirely and another box in part."""
        if box.tensor not in self.first:
            return box
        numbers = _cell_numbers(box, shape).flatten()
        cut = torch.isin(numbers, self.cells[box.tensor]).nonzero().flatten()
        slots = self.first[box.tensor] + torch.searchsorted(self.cells[box.tensor], numbers[cut])
        return replace(box, cut=cut, slots=slots)


def _maxima(box: Box, live: Mapping[str, Tensor]) -> Tensor:
    found: Tensor | None = None
    for piece in box.pieces:
        values = strided_box(live[piece.param], piece.region.shape, piece.strides, piece.offset)
        own = box.codec.maxima(values, _at(piece.region))
        if found is None:
            found = torch.zeros(box.cells.shape, dtype=torch.float32, device=own.device)
        view = found[_inside(box.cells, _shared_cells(box.codec, piece.region))]
        torch.maximum(view, own, out=view)
    assert found is not None, f"box {box.region} of {box.tensor} has no pieces"
    return found


def _encoded(box: Box, live: Mapping[str, Tensor], maxima: Tensor) -> dict[str, Tensor]:
    outputs = {
        name: torch.empty(part.region(box.region).shape, dtype=torch_dtype(part.dtype), device=maxima.device)
        for name, part in box.parts
    }
    for piece in box.pieces:
        values = strided_box(live[piece.param], piece.region.shape, piece.strides, piece.offset)
        cells = maxima[_inside(box.cells, _shared_cells(box.codec, piece.region))]
        encoded = box.codec.encode(values, _at(piece.region), cells)
        for (name, part), value in zip(box.parts, encoded, strict=True):
            view = outputs[name][_inside(part.region(box.region), part.region(piece.region))]
            as_bits(view).copy_(as_bits(value))
    return outputs


def _inside(outer: Region, inner: Region) -> tuple[slice, ...]:
    """`inner` as slices of memory that holds `outer`."""
    return tuple(
        slice(start - first, stop - first)
        for start, stop, first in zip(inner.starts, inner.stops, outer.starts, strict=True)
    )


def _at(region: Region) -> tuple[int, int]:
    return region.starts[-2], region.starts[-1]


def _described(
    manifest: RankManifest, scheme: Scheme, boxes: Sequence[Box], misc: Mapping[str, str]
) -> RankManifest:
    """The manifest with the parts of quantized tensors in their place."""
    tensors, reasons = [], []
    for spec in manifest.tensors:
        if spec.name not in scheme:
            tensors.append(spec)
            continue
        parts = codec_of(scheme[spec.name]).format.parts
        tensors += [TensorSpec(p.name(spec.name), p.shape(spec.shape), p.dtype) for p in parts]
        if spec.name in misc:
            reasons += [MiscReason(p.name(spec.name), misc[spec.name]) for p in parts]
    kept = [box for box in boxes if box.tensor not in misc]
    outputs = [(box, name, part) for box in kept for name, part in box.parts]
    return replace(
        manifest,
        tensors=tuple(tensors),
        params=(
            *manifest.params,
            *(ParamSpec(name, part.region(box.region).shape, part.dtype) for box, name, part in outputs),
        ),
        holdings=(
            *(holding for holding in manifest.holdings if holding.tensor not in scheme),
            *(
                _whole_param(part.name(box.tensor), part.region(box.region), name)
                for box, name, part in outputs
            ),
        ),
        misc=(*(reason for reason in manifest.misc if reason.tensor not in scheme), *reasons),
    )


def _whole_param(tensor: str, region: Region, param: str) -> Holding:
    """A holding of a param that is exactly this box, contiguous."""
    strides, step = [], 1
    for size in reversed(region.shape):
        strides.append(step)
        step *= size
    return Holding(tensor, region, param, 0, tuple(reversed(strides)))

"""Descriptor tables: every box of a bucket as one row of integers, cut into tiles of equal work.

A row says where the box lies in its param (bytes, with up to three outer dims and an inner one) and where in the
bucket (row-major, no gaps). A kernel program takes one tile: it looks up its row and walks `block` units of it. So a
bucket is one launch, whatever number of routes it holds.

Compiled once per plan; only the base addresses of the params may differ between two refits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

import torch
from torch import Tensor

from refit.plan import PlanError, Segment
from refit.transfer.digest import WORD_BYTES, weights
from refit.transfer.memory import torch_dtype

WIDE_BYTES = 16  # one vector access of a thread
OUTER_DIMS = 3
COPY_BLOCK = 2048  # units of one tile: 16 KiB where the widest unit fits
DIGEST_BLOCK = 512  # words of one step of a digest tile
DIGEST_STEPS = 8  # steps that share the weights of their columns
COPY_FIELDS = (
    "param",
    "offset",
    "start",
    "n1",
    "n2",
    "rows",
    "inner",
    "s0",
    "s1",
    "s2",
    "s3",
    "kind",
    "stored",
    "wire",
)
DIGEST_FIELDS = (
    *("param", "offset", "n1", "n2", "rows", "inner", "s0", "s1", "s2", "s3"),
    *("w0", "w1", "w2", "w3", "item", "lead", "factor", "sum"),
)
CAST = 5  # a copy's kind: 0..3 for units of 1, 2, 4, 8 bytes, 4 for pairs of 8 that are 16-byte aligned, or a cast
WIDE = 4
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PAYLOAD = -1  # in place of a param's number: the bucket itself


@dataclass(frozen=True, slots=True)
class Box:
    """One segment of a bucket: `shape` elements at `offset` (elements, from the param's first) with `strides`.

    `param` numbers the base addresses; `start_byte` is its place in the bucket, in the wire dtype; `starts` are its
    coordinates in the full tensor; its digest goes into sum number `sum_index`.
    """

    param: int
    stored: torch.dtype
    wire: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start_byte: int
    starts: tuple[int, ...]
    sum_index: int

    def __post_init__(self) -> None:
        if not len(self.shape) == len(self.strides) == len(self.starts):
            raise PlanError(
                f"shape {self.shape}, strides {self.strides} and starts {self.starts} differ in length"
            )
        if self.stored != self.wire and not {self.stored, self.wire} <= set(FLOATS):
            raise PlanError(f"no kernel casts {self.stored} to {self.wire}; it can cast between {FLOATS}")

    @classmethod
    def of(cls, segment: Segment, param: int, stored: torch.dtype, start_byte: int, sum_index: int) -> "Box":
        """A segment of a plan that lies at `start_byte` of what is packed."""
        wire = torch_dtype(segment.wire_dtype)
        place = (segment.offset, segment.shape, segment.strides, start_byte, segment.region.starts)
        return cls(param, stored, wire, *place, sum_index)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows [num_rows, num_fields + 2] and the row of each tile, both on the device.

    The last two fields of a row are the log2 of its tiles' columns, and its first tile.
    """

    rows: Tensor
    tile_rows: Tensor

    @property
    def num_tiles(self) -> int:
        return self.tile_rows.numel()

    @classmethod
    def of(
        cls,
        rows: Sequence[Sequence[int]],
        fields: Sequence[str],
        block: int,
        steps: int,
        device: torch.device,
    ) -> "Table":
        """Cut rows into tiles of `steps` times `block` units."""
        at_rows, at_inner = fields.index("rows"), fields.index("inner")
        finished: list[list[int]] = []
        tile_rows: list[Tensor] = []
        num_tiles = 0
        for number, row in enumerate(rows):
            shift = min(block, row[at_inner]).bit_length() - 1
            shift += (1 << shift) < min(block, row[at_inner])
            tile_height = (block >> shift) * steps
            count = -(-row[at_rows] // tile_height) * -(-row[at_inner] // (1 << shift))
            finished.append([*row, shift, num_tiles])
            tile_rows.append(torch.full((count,), number, dtype=torch.int32))
            num_tiles += count
        width = len(fields) + 2
        table = torch.tensor(finished, dtype=torch.int64).reshape(len(finished), width)
        order = torch.cat(tile_rows) if tile_rows else torch.empty(0, dtype=torch.int32)
        return cls(table.to(device), order.to(device))


def copy_table(boxes: Sequence[Box], device: torch.device, alignment_bytes: int = WIDE_BYTES) -> Table:
    """The table of pack and unpack. Base addresses and the bucket are multiples of `alignment_bytes`."""
    rows = [
        _copy_row(part, alignment_bytes) for box in boxes if 0 not in box.shape for part in _few_dims(box)
    ]
    return Table.of(rows, COPY_FIELDS, COPY_BLOCK, 1, device)


def _few_dims(box: Box) -> Iterator[Box]:
    """The box with dims merged where its strides allow, or several of them if more than four dims are left."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(box.shape, box.strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    merged = merged or [(1, 1)]
    leading, kept = merged[: -OUTER_DIMS - 1], merged[-OUTER_DIMS - 1 :]
    shape, strides = tuple(size for size, _ in kept), tuple(stride for _, stride in kept)
    part_bytes = prod(shape) * box.wire.itemsize
    for number, index in enumerate(product(*(range(size) for size, _ in leading))):
        offset = box.offset + sum(at * stride for at, (_, stride) in zip(index, leading, strict=True))
        start_byte = box.start_byte + number * part_bytes
        starts = (0,) * len(shape)
        yield replace(box, offset=offset, shape=shape, strides=strides, start_byte=start_byte, starts=starts)


def _copy_row(box: Box, alignment_bytes: int) -> list[int]:
    item_bytes = box.stored.itemsize
    offset = box.offset * item_bytes
    strides = [stride * item_bytes for stride in box.strides]
    inner = box.shape[-1]
    if box.stored != box.wire:
        kind, stored, wire = CAST, FLOATS.index(box.stored), FLOATS.index(box.wire)
    else:
        unit_bytes = _unit_bytes(box, offset, strides, alignment_bytes)
        kind, stored, wire = unit_bytes.bit_length() - 1, 0, 0
        lane_bytes = min(unit_bytes, WORD_BYTES)
        if unit_bytes > item_bytes:
            inner = inner * item_bytes // lane_bytes
            strides[-1] = lane_bytes
    sizes, outer = _outer(box.shape, strides)
    head = [box.param, offset, box.start_byte, *sizes[1:], prod(sizes), inner]
    return [*head, *outer, strides[-1], kind, stored, wire]


def _unit_bytes(box: Box, offset: int, strides: Sequence[int], alignment_bytes: int) -> int:
    """The widest unit that every inner run of the box is made of, on both sides; the item where runs have gaps."""
    item_bytes = box.stored.itemsize
    if box.strides[-1] != 1 and box.shape[-1] != 1:
        return item_bytes
    run_bytes = box.shape[-1] * item_bytes
    facts = (run_bytes, offset, box.start_byte, alignment_bytes, *strides[:-1])
    unit_bytes = WIDE_BYTES
    while any(fact % unit_bytes for fact in facts):
        unit_bytes //= 2
    return max(unit_bytes, item_bytes)


def _outer(shape: Sequence[int], strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """Sizes and strides of the outer dims, filled up to three."""
    missing = OUTER_DIMS - (len(shape) - 1)
    return [1] * missing + list(shape[:-1]), [0] * missing + list(strides[:-1])


@dataclass(frozen=True, slots=True)
class DigestTable:
    """A table with the weights that its rows point into (int64, on the device)."""

    table: Table
    weights: Tensor


def digest_table(
    boxes: Sequence[Box], device: torch.device, *, of_bucket: bool, alignment_bytes: int = WIDE_BYTES
) -> DigestTable:
    """The table of the digests of all boxes: of the packed bucket, or of the params themselves (stored as on the wire).

    The kernel adds each box's digest, as `refit.transfer.digest.digest` defines it, to its sum.
    """
    making = _WeightsInMaking(device)
    rows: list[list[int]] = []
    for box in boxes:
        if not of_bucket and box.stored != box.wire:
            raise PlanError(
                f"a param stored as {box.stored} has no digest of its {box.wire} form; digest the bucket"
            )
        if 0 not in box.shape:
            rows += _digest_rows(box, making, of_bucket, alignment_bytes)
    return DigestTable(Table.of(rows, DIGEST_FIELDS, DIGEST_BLOCK, DIGEST_STEPS, device), making.joined())


def _digest_rows(
    box: Box, making: "_WeightsInMaking", of_bucket: bool, alignment_bytes: int
) -> Iterator[list[int]]:
    item_bytes = box.wire.itemsize
    shape, starts = box.shape or (1,), box.starts or (0,)
    strides = [stride * item_bytes for stride in box.strides or (1,)]
    offset = box.offset * item_bytes
    if of_bucket:
        strides, offset = _row_major(shape, item_bytes), box.start_byte
    per_word = WORD_BYTES // item_bytes
    first_word, lead = divmod(starts[-1], per_word)
    facts = (lead * item_bytes, shape[-1] * item_bytes, offset, alignment_bytes, *strides[:-1])
    is_words = strides[-1] == item_bytes and not any(fact % WORD_BYTES for fact in facts)
    inner = shape[-1] // per_word if is_words else shape[-1]
    inner_stride = WORD_BYTES if is_words else strides[-1]
    last_dim = len(shape) - 1
    at_last = making.at(last_dim, first_word, -(-(starts[-1] + shape[-1]) // per_word))
    kept = [dim for dim in range(last_dim) if shape[dim] != 1][-OUTER_DIMS:]
    folded = [
        dim for dim in range(last_dim) if dim not in kept
    ]  # their weights go into a factor of the whole row
    sizes, outer = _outer([*(shape[dim] for dim in kept), 1], [*(strides[dim] for dim in kept), 1])
    ats = [making.at(dim, starts[dim], starts[dim] + shape[dim]) for dim in kept]
    ats = [making.one] * (OUTER_DIMS - len(ats)) + ats
    item = -item_bytes if is_words else item_bytes
    for index in product(*(range(shape[dim]) for dim in folded)):
        factor = making.product({dim: starts[dim] + at for dim, at in zip(folded, index, strict=True)})
        place = offset + sum(at * strides[dim] for dim, at in zip(folded, index, strict=True))
        head = [
            PAYLOAD if of_bucket else box.param,
            place,
            *sizes[1:],
            prod(sizes),
            inner,
            *outer,
            inner_stride,
        ]
        yield [*head, *ats, at_last, item, lead, factor, box.sum_index]


class _WeightsInMaking:
    """Weight vectors one behind the other, each range once. The first is a single 1, for dims that are not there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parts = [torch.ones(1, dtype=torch.int64, device=device)]
        self._places: dict[tuple[int, int, int], int] = {}
        self._num = 1
        self.one = 0

    def at(self, dim: int, start: int, stop: int) -> int:
        key = (dim, start, stop)
        if key not in self._places:
            self._places[key] = self._num
            self._parts.append(weights(dim, start, stop, self._device))
            self._num += stop - start
        return self._places[key]

    def product(self, index: Mapping[int, int]) -> int:
        """The product of the weights at one index of some dims, as wrapped int64."""
        total = torch.ones(1, dtype=torch.int64)
        for dim, at in index.items():
            total *= weights(dim, at, at + 1, torch.device("cpu"))
        return int(total.item())

    def joined(self) -> Tensor:
        return torch.cat(self._parts)


def _row_major(shape: Sequence[int], item_bytes: int) -> list[int]:
    strides, step = [], item_bytes
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return strides[::-1]

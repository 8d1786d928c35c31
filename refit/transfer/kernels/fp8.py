"""FP8 quantization of many matrices in one Triton launch (two, where some are not aligned). Needs the package `triton`.

Written for CUDA and tested, bit for bit against the codec, under Triton's interpreter on a CPU; not run on a GPU yet.
Elements and scales may be boxes of a bucket, so that what is quantized is packed too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refit.plan import PlanError
from refit.transfer.kernels.fp8_programs import fp8_kernel
from refit.transfer.precision.formats import Cell
from refit.transfer.precision.fp8 import BLOCK

FIELDS = (
    *("source", "elements", "scales", "maxima"),
    *("rows", "columns", "source_pitch", "element_pitch", "scale_pitch", "maxima_pitch"),
    *("above", "left", "kind", "across", "first_tile"),
)
KINDS = {torch.float32: 1, torch.bfloat16: 3}  # as in table.FLOATS
ALIGNED = 16
NUM_WARPS = 8


@dataclass(frozen=True, slots=True)
class Piece:
    """A box [n, k] of a matrix that begins at (row, column) `at`, and where its quantized form goes.

    `elements` is float8 [n, k]; `scales` has one fp32 for each block that the box touches. With `maxima`, in the shape
    of `scales`, blocks have those largest magnitudes; without, those that the box itself holds. Columns are dense
    in all four, rows may be apart.
    """

    source: Tensor
    at: Cell
    elements: Tensor
    scales: Tensor
    maxima: Tensor | None = None

    def __post_init__(self) -> None:
        if self.source.dtype not in KINDS or self.elements.dtype != torch.float8_e4m3fn:
            raise PlanError(f"no kernel quantizes {self.source.dtype} to {self.elements.dtype}")
        tensors = [self.source, self.elements, self.scales, *([] if self.maxima is None else [self.maxima])]
        if any(tensor.ndim != 2 or (tensor.shape[1] > 1 and tensor.stride(1) != 1) for tensor in tensors):
            raise PlanError("a piece to quantize and its parts are matrices with dense rows")
        wanted = [self.source.shape, self.source.shape, *[torch.Size(self.num_blocks)] * 2]
        for tensor, shape in zip(tensors, wanted, strict=False):
            if tensor.shape != shape:
                raise PlanError(f"a part of a piece is {list(tensor.shape)}, expected {list(shape)}")

    @property
    def num_blocks(self) -> tuple[int, int]:
        rows, columns = (
            -(-(start % size + length) // size)
            for start, size, length in zip(self.at, BLOCK, self.source.shape, strict=True)
        )
        return rows, columns

    @property
    def is_aligned(self) -> bool:
        """Whether rows can be read and written 16 bytes at a time."""
        numbers = (
            *(self.source.data_ptr(), self.elements.data_ptr(), self.source.shape[1], self.at[1] % BLOCK[1]),
            *(self.source.stride(0), self.elements.stride(0)),
        )
        return not any(number % ALIGNED for number in numbers)

    def row(self, first_tile: int) -> list[int]:
        maxima = (0, 0) if self.maxima is None else (self.maxima.data_ptr(), self.maxima.stride(0))
        return [
            *(self.source.data_ptr(), self.elements.data_ptr(), self.scales.data_ptr(), maxima[0]),
            *self.source.shape,
            *(self.source.stride(0), self.elements.stride(0), self.scales.stride(0), maxima[1]),
            *(start % size for start, size in zip(self.at, BLOCK, strict=True)),
            *(KINDS[self.source.dtype], self.num_blocks[1], first_tile),
        ]


@dataclass(frozen=True, slots=True)
class QuantizeTable:
    """Pieces as rows of integers, for one launch. Addresses are in it, so the caller keeps the tensors alive."""

    rows: Tensor
    tile_rows: Tensor
    is_aligned: bool


def quantize_tables(pieces: Sequence[Piece], device: torch.device) -> tuple[QuantizeTable, ...]:
    """The launches that quantize all pieces."""
    groups = [[piece for piece in pieces if piece.is_aligned is aligned] for aligned in (True, False)]
    return tuple(_table(group, device) for group in groups if group)


def quantize(tables: Sequence[QuantizeTable]) -> None:
    """Fill elements and scales of every piece."""
    for table in tables:
        fp8_kernel[(len(table.tile_rows),)](
            table.rows,
            table.tile_rows,
            FIELDS=len(FIELDS),
            ALIGNED=table.is_aligned,
            num_warps=NUM_WARPS,
        )


def _table(pieces: Sequence[Piece], device: torch.device) -> QuantizeTable:
    rows = list(_rows(pieces))
    counts = torch.tensor([piece.num_blocks[0] * piece.num_blocks[1] for piece in pieces])
    tile_rows = torch.repeat_interleave(torch.arange(len(pieces), dtype=torch.int32), counts)
    return QuantizeTable(
        torch.tensor(rows, dtype=torch.int64).to(device), tile_rows.to(device), pieces[0].is_aligned
    )


def _rows(pieces: Sequence[Piece]) -> Iterator[list[int]]:
    first_tile = 0
    for piece in pieces:
        yield piece.row(first_tile)
        first_tile += piece.num_blocks[0] * piece.num_blocks[1]

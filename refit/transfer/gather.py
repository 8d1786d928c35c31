"""Where the bytes of a round lie, for a transport that gathers and scatters: what lies in long rows is not packed then.

Runs are listed once. Rows of a box of many, or of equal boxes in a row, are listed only while they are on the wire: 16
bytes each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refit.transfer.memory import torch_dtype
from refit.transfer.runs import HasRuns, inner_dims
from refit.transfer.transports.seam import Pieces

SHORTEST_BYTES = 1024  # on average; a row costs the kernel 0.1 us, about as much as to copy 700 bytes
MOST_LISTED = 64  # rows of one box that are listed for good
SLOT = -1  # in place of a param: the slot of the round


@dataclass(frozen=True, slots=True)
class Rows:
    """A box of runs of `num_bytes`: `sizes` and `steps` (bytes) of its outer dims, from `first_byte` of one param."""

    param: int
    first_byte: int
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    num_bytes: int

    @property
    def count(self) -> int:
        return math.prod(self.sizes)

    @property
    def group(self) -> tuple[object, ...]:
        """Boxes of one group may be listed together: runs of any length, boxes of one geometry."""
        return (self.sizes, self.steps, self.num_bytes) if self.sizes else ()

    def each(self) -> list["Rows"]:
        """Every row by itself."""
        starts = [self.first_byte]
        for size, step in zip(self.sizes, self.steps, strict=True):
            starts = [start + number * step for start in starts for number in range(size)]
        return [Rows(self.param, start, (), (), self.num_bytes) for start in starts]


@dataclass(frozen=True, slots=True)
class Part:
    """Boxes of one geometry, or, without outer dims, runs: `params` and `first_bytes` of each, and bytes per run."""

    params: Tensor
    first_bytes: Tensor
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    num_bytes: Tensor

    @classmethod
    def of(cls, boxes: Sequence[Rows]) -> "Part":
        columns = [(box.param, box.first_byte, box.num_bytes) for box in boxes]
        params, first_bytes, num_bytes = torch.tensor(columns, dtype=torch.int64).t().contiguous()
        return cls(params, first_bytes, boxes[0].sizes, boxes[0].steps, num_bytes)

    @property
    def count(self) -> int:
        """Rows of all boxes."""
        return len(self.params) * math.prod(self.sizes)

    def list_into(self, pieces: Tensor, addresses: Tensor) -> None:
        """Write the address and bytes of every row; `pieces`: int64 [count, 2]."""
        starts = addresses[self.params].add_(self.first_bytes)
        for size, step in zip(self.sizes[:-1], self.steps[:-1], strict=True):
            starts = (starts.unsqueeze(1) + torch.arange(0, size * step, step)).view(-1)
        if self.sizes:
            size, step = self.sizes[-1], self.steps[-1]
            rows = pieces[:, 0].view(len(starts), size)
            torch.add(starts.unsqueeze(1), torch.arange(0, size * step, step), out=rows)
            pieces[:, 1] = self.num_bytes[0]
        else:
            pieces[:, 0] = starts
            pieces[:, 1] = self.num_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Gather:
    """All bytes that a round exchanges with one peer, in their order on the wire."""

    peer: int
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, peer: int, boxes: Sequence[Rows]) -> "Gather":
        groups: list[list[Rows]] = []
        for box in boxes:
            for rows in box.each() if box.count <= MOST_LISTED else (box,):
                if not groups or groups[-1][0].group != rows.group:
                    groups.append([rows])
                elif _follows(groups[-1][-1], rows):
                    last = groups[-1][-1]
                    groups[-1][-1] = replace(last, num_bytes=last.num_bytes + rows.num_bytes)
                else:
                    groups[-1].append(rows)
        return cls(peer, tuple(Part.of(group) for group in groups))

    def pieces(self, addresses: Tensor) -> Pieces:
        """Where they lie; `addresses`: of the stage's params, and last that of the slot."""
        counts = [part.count for part in self.parts]
        found = torch.empty((sum(counts), 2), dtype=torch.int64)
        for part, rows in zip(self.parts, torch.split(found, counts), strict=True):
            part.list_into(rows, addresses)
        return Pieces.of(found)


def rows_of_moves(moves: Sequence[HasRuns], positions: Sequence[int]) -> list[Rows] | None:
    """The boxes of a parcel; None where it has to be packed: for a cast, gaps between segments, or short runs.

    `positions`: of the param of each move.
    """
    found = [_rows(move, position) for move, position in zip(moves, positions, strict=True)]
    ends = [0, *(move.start_byte + move.num_bytes for move in moves)]
    has_gaps = any(move.start_byte != end for move, end in zip(moves, ends, strict=False))
    count = sum(rows.count for rows in found)
    is_short = count > 1 and ends[-1] < SHORTEST_BYTES * count
    return None if has_gaps or is_short or any(move.is_cast for move in moves) else found


def _rows(move: HasRuns, position: int) -> Rows:
    segment = move.segment
    item_bytes = torch_dtype(segment.wire_dtype).itemsize
    num_outer = len(segment.shape) - inner_dims(segment.shape, segment.strides)
    outer = [
        (size, stride * item_bytes)
        for size, stride in zip(segment.shape[:num_outer], segment.strides[:num_outer], strict=True)
        if size != 1
    ]
    sizes, steps = tuple(size for size, _ in outer), tuple(step for _, step in outer)
    return Rows(position, segment.offset * item_bytes, sizes, steps, move.num_bytes // math.prod(sizes))


def _follows(run: Rows, other: Rows) -> bool:
    return not run.sizes and (run.param, run.first_byte + run.num_bytes) == (other.param, other.first_byte)

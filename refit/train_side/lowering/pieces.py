"""The arithmetic of lowering: rows of a local parameter to boxes of HF tensors. No torch, no Megatron."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from refit.plan import Holding, Region


class CannotLowerError(ValueError):
    """A mapping that is no strided copy, or that does not fit its tensor; the message is the misc reason."""


@dataclass(frozen=True, slots=True)
class LocalParam:
    """A parameter as this rank stores it, seen in the rows that tensor parallelism alone would give it.

    Stored row i is row `first_row + i` of the TP-local matrix of `num_tp_rows` rows. Without a further cut
    `first_row` is 0 and all rows are stored. Rows from `num_tp_rows` on are padding. `strides` are the stored
    memory's own, in elements. A 0-dim parameter is given as one row.
    """

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first_row: int
    num_tp_rows: int

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> LocalParam:
        """A parameter that only tensor parallelism cuts."""
        shape, strides = (shape, strides) if shape else ((1,), (1,))
        return cls(name, shape, strides, 0, shape[0])

    @property
    def tp_shape(self) -> tuple[int, ...]:
        return (self.num_tp_rows, *self.shape[1:])


@dataclass(frozen=True, slots=True)
class HfTensor:
    """A canonical tensor, or one expert of it. `shape` is the HF tensor's, without the stacked expert dim."""

    name: str
    shape: tuple[int, ...]
    expert: int | None


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `local_row .. + num_rows` of the TP-local matrix are rows `tensor_row ..` of the HF tensor.

    Both ends may reach outside; what lies outside is clipped. `first_column` is the tensor's column of local
    column 0 in a row-parallel matrix; None: all columns are there. `dims` says which local dim each tensor
    dim is: (1, 0) is transposed.
    """

    tensor: HfTensor
    local_row: int
    tensor_row: int
    num_rows: int
    first_column: int | None = None
    dims: tuple[int, ...] | None = None


def holdings_of(param: LocalParam, pieces: Iterator[Piece]) -> Iterator[Holding]:
    """The non-empty boxes of `pieces` that are in this rank's memory. Raises CannotLowerError on a misfit."""
    for piece in pieces:
        rows = _clip(param, piece)
        if rows is not None:
            yield _holding(param, piece, *rows)


def _clip(param: LocalParam, piece: Piece) -> tuple[int, int] | None:
    """The TP-local rows [start, stop) that are stored here and exist in the tensor."""
    row_dim = _dims(param, piece).index(0)
    size = piece.tensor.shape[row_dim] if piece.tensor.shape else 1
    start = max(piece.local_row, param.first_row, piece.local_row - piece.tensor_row, 0)
    stop = min(
        piece.local_row + piece.num_rows,
        param.first_row + param.shape[0],
        param.num_tp_rows,
        piece.local_row - piece.tensor_row + size,
    )
    return (start, stop) if start < stop else None


def _dims(param: LocalParam, piece: Piece) -> tuple[int, ...]:
    return piece.dims or tuple(range(len(param.shape)))


def _holding(param: LocalParam, piece: Piece, start: int, stop: int) -> Holding:
    tensor, dims = piece.tensor, _dims(param, piece)
    shape = tensor.shape or (1,)
    if len(shape) != len(param.shape):
        raise CannotLowerError(f"{param.name} has {len(param.shape)} dims, {tensor.name} has {len(shape)}")
    starts, stops = [], []
    for dim, local_dim in enumerate(dims):
        is_cut = local_dim == 0 or (local_dim == 1 and piece.first_column is not None)
        if local_dim == 0:
            first, size = piece.tensor_row + start - piece.local_row, stop - start
        else:
            first, size = (piece.first_column or 0) if is_cut else 0, param.shape[local_dim]
        last = first + size
        if last > shape[dim] or (not is_cut and last != shape[dim]):
            raise CannotLowerError(
                f"{param.name} {param.tp_shape} does not fit {tensor.name} {tensor.shape} in dim {dim}"
            )
        starts.append(first)
        stops.append(last)
    offset = (start - param.first_row) * param.strides[0]
    strides = tuple(param.strides[local_dim] for local_dim in dims)
    if not tensor.shape:
        starts, stops, strides = [], [], ()
    if tensor.expert is not None:
        starts, stops = [tensor.expert, *starts], [tensor.expert + 1, *stops]
        strides = (1, *strides)
    return Holding(tensor.name, Region(tuple(starts), tuple(stops)), param.name, offset, strides)

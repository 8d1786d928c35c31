"""Pieces of a matrix on the grid of its blocks."""

import torch
from torch import Tensor

from refit.transfer.memory import as_bits
from refit.transfer.precision.formats import Cell


def blocked(piece: Tensor, at: Cell, block: Cell) -> Tensor:
    """[..., n, k] that begins at (row, column) `at` of its matrix -> [..., R, rows, C, columns]: the touched blocks.

    Elements of a block that the piece does not hold are zero. A view where the piece consists of whole blocks.
    """
    (num_rows, num_columns), lead = piece.shape[-2:], piece.shape[:-2]
    above, left = at[0] % block[0], at[1] % block[1]
    rows = _ceil(above + num_rows, block[0])
    columns = _ceil(left + num_columns, block[1])
    if (rows, columns) != (num_rows, num_columns):
        padded = torch.zeros((*lead, rows, columns), dtype=piece.dtype, device=piece.device)
        inside = padded[..., above : above + num_rows, left : left + num_columns]
        as_bits(inside).copy_(as_bits(piece))
        piece = padded
    return piece.reshape(*lead, rows // block[0], block[0], columns // block[1], block[1])


def unblocked(cells: Tensor, at: Cell, shape: torch.Size) -> Tensor:
    """The inverse of `blocked`, contiguous."""
    rows, columns = cells.shape[-3], cells.shape[-1]
    whole = cells.reshape(*cells.shape[:-4], cells.shape[-4] * rows, cells.shape[-2] * columns)
    above, left = at[0] % rows, at[1] % columns
    return whole[..., above : above + shape[-2], left : left + shape[-1]].contiguous()


def block_maxima(piece: Tensor, at: Cell, block: Cell) -> Tensor:
    """[..., R, C] fp32: the largest magnitude in each touched block, as far as the piece holds it."""
    return blocked(piece, at, block).abs().float().amax(dim=(-3, -1))


def _ceil(size: int, block: int) -> int:
    return -(-size // block) * block

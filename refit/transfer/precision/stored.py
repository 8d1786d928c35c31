"""Blocks that a trainer stores already quantized: where the scales of an engine's tensor lie in the trainer's own.

A trainer quantizes its local matrix [n, k], in which several tensors may be fused and of which each is a part, in
blocks of 128 x 128 from its own corner. An engine's tensor has blocks from a corner of its own. Elements and scales
can be moved as they are where each block of the engine's lies in one block of the trainer's; nowhere else does one
scale stand for it.
"""

from dataclasses import dataclass

from refit.plan import Holding
from refit.transfer.precision.formats import PrecisionError
from refit.transfer.precision.fp8 import BLOCK, FP8_BLOCK

SCALE = FP8_BLOCK.parts[1]
PADDED_TO = 4
"""Transformer Engine pads rows of scales to multiples of this, as its matrix products want them."""


@dataclass(frozen=True, slots=True)
class BlockScales:
    """The scales of a local matrix of `shape`: memory of `memory_shape`, whose rows may end in padding."""

    param: str
    shape: tuple[int, int]
    memory_shape: tuple[int, int]

    def __post_init__(self) -> None:
        rows, columns = SCALE.shape(self.shape)
        padded = -(-columns // PADDED_TO) * PADDED_TO
        if self.memory_shape not in ((rows, columns), (rows, padded)):
            raise PrecisionError(
                f"{self.param} is {list(self.memory_shape)}; a matrix of {list(self.shape)} has {rows} x {columns} "
                f"scales, with padding {rows} x {padded}"
            )

    def of(self, elements: Holding, shape: tuple[int, ...]) -> Holding:
        """The scales of `elements`, a box of a tensor of `shape` in the local matrix, without the padding.

        Raises PrecisionError where a block of the tensor has no scale of its own there.
        """
        if elements.strides[-2:] != (self.shape[1], 1) or any(
            size != 1 for size in elements.region.shape[:-2]
        ):
            raise PrecisionError(
                f"{elements.tensor} does not lie in {elements.param} row by row, as its blocks do"
            )
        local = divmod(elements.offset, self.shape[1])
        whats = ("row", "column")
        first = tuple(
            self._first_block(elements, shape, local[dim], what, dim - 2) for dim, what in enumerate(whats)
        )
        pitch = self.memory_shape[1]
        offset = first[0] * pitch + first[1]
        lead = elements.strides[:-2]
        name = SCALE.name(elements.tensor)
        return Holding(name, SCALE.region(elements.region), self.param, offset, (*lead, pitch, 1))

    def _first_block(self, elements: Holding, shape: tuple[int, ...], local: int, what: str, dim: int) -> int:
        """The trainer's block of the first of the tensor's blocks; the others follow one by one."""
        start, stop, size = elements.region.starts[dim], elements.region.stops[dim], BLOCK[dim]
        for border in (start, stop):
            if border % size and border != shape[dim]:
                raise PrecisionError(
                    f"{elements.tensor}: the trainers' cut at {what} {border} goes through a block of {size} that "
                    "they quantized; choose a layout whose cuts are on block borders"
                )
        longest = min(size, stop - start)
        if local % size + longest > size:
            raise PrecisionError(
                f"{elements.tensor} begins at {what} {local} of {elements.param}, inside a block of {size}, so that "
                "its blocks have two scales each; head sizes and widths per rank must be multiples of it"
            )
        return local // size

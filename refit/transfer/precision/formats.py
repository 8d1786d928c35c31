"""What a quantized format makes of one matrix: its parts, their names, dtypes and cells. No tensor is touched here.

A *cell* is the (rows, columns) of the matrix that one item of a part stands for. A matrix [..., N, K] keeps its leading
dims (stacked experts) in every part. WHOLE is the cell of an item that stands for the entire matrix [N, K].
"""

from collections.abc import Sequence
from dataclasses import dataclass

from refit.plan import PlanError, Region

type Cell = tuple[int, int]

WHOLE: Cell = (0, 0)
WEIGHT = "weight"


class PrecisionError(PlanError):
    """A tensor, a cut or a pair of formats that cannot be quantized; the message names it and the way out."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the quantized form. Its name is the matrix's with `suffix` for the final "weight"."""

    suffix: str
    dtype: str
    cell: Cell

    def name(self, weight_name: str) -> str:
        """The part's tensor name, for example `a.up_proj.weight_scale_inv` of `a.up_proj.weight`."""
        return f"{_base(weight_name)}.{self.suffix}"

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The part's shape for a matrix of `shape`; ragged last cells count."""
        return self.region(Region.whole(shape)).stops

    def region(self, region: Region) -> Region:
        """The part's items that stand for any element of `region` of the matrix."""
        if self.cell == WHOLE:
            return Region(region.starts[:-2], region.stops[:-2])
        starts = tuple(start // size for start, size in zip(region.starts[-2:], self.cell, strict=True))
        stops = tuple(-(-stop // size) for stop, size in zip(region.stops[-2:], self.cell, strict=True))
        return Region((*region.starts[:-2], *starts), (*region.stops[:-2], *stops))


@dataclass(frozen=True, slots=True)
class Format:
    """A quantized format. `parts[0]` holds the elements, the others their scales.

    A scale follows from the largest magnitude in a `shared` cell, which ranks agree on where a cut goes through the
    cell. No cut may go through a `unit`: its elements share a byte, or a scale that one rank makes alone.
    """

    name: str
    parts: tuple[Part, ...]
    shared: Cell
    unit: Cell

    def __post_init__(self) -> None:
        if self.parts[0].suffix != WEIGHT:
            raise PlanError(f"format {self.name}: the first part must be called {WEIGHT!r}")

    def names(self, weight_name: str) -> tuple[str, ...]:
        return tuple(part.name(weight_name) for part in self.parts)

    def require_whole_units(self, weight_name: str, region: Region, shape: Sequence[int]) -> None:
        """Raise PrecisionError if `region` of the matrix begins or ends inside a unit, or a unit is ragged."""
        spans = zip(
            ("row", "column"), region.starts[-2:], region.stops[-2:], shape[-2:], self.unit, strict=True
        )
        for what, start, stop, size, unit in spans:
            if size % unit:
                raise PrecisionError(
                    f"{weight_name} has {size} {what}s, which {self.name} groups of {unit} do not divide; "
                    "leave it out of the quantization"
                )
            for border in (start, stop):
                if border % unit:
                    raise PrecisionError(
                        f"{weight_name}: a cut at {what} {border} goes through a {self.name} group of {unit}; "
                        f"choose a layout whose cuts are multiples of {unit}"
                    )


def _base(weight_name: str) -> str:
    base, dot, last = weight_name.rpartition(".")
    if last != WEIGHT or not dot:
        raise PrecisionError(f"{weight_name} is no '...{WEIGHT}'; only those have a quantized form")
    return base

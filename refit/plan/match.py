"""Matching of box lists: which sources hold which part of a wanted box. Regions only, no ranks, no
tensors."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from refit.plan.region import Region, first_overlap, sweep_dim


@dataclass(frozen=True, slots=True)
class Cell:
    """A part of a wanted box, and the positions of all source boxes that contain it entirely."""

    region: Region
    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BoxIndex:
    """Source boxes sorted along the dim that separates them best, to find the few that meet a wanted box."""

    boxes: tuple[Region, ...]
    dim: int
    order: tuple[int, ...]
    starts: tuple[int, ...]
    longest: int

    @classmethod
    def of(cls, boxes: Sequence[Region]) -> "BoxIndex":
        if not boxes or not boxes[0].starts:
            return cls(tuple(boxes), 0, tuple(range(len(boxes))), (), 0)
        dim = sweep_dim(boxes)
        order = sorted(range(len(boxes)), key=lambda i: (boxes[i].starts[dim], i))
        longest = max(box.stops[dim] - box.starts[dim] for box in boxes)
        return cls(tuple(boxes), dim, tuple(order), tuple(boxes[i].starts[dim] for i in order), longest)

    def near(self, wanted: Region) -> Iterable[int]:
        """Positions of boxes that may meet `wanted`, in ascending order: a superset of those that do."""
        if not self.starts:
            return self.order
        low = bisect_left(self.starts, wanted.starts[self.dim] - self.longest)
        high = bisect_left(self.starts, wanted.stops[self.dim])
        return sorted(self.order[low:high])


@dataclass(slots=True)
class Matcher:
    """Matches box lists and remembers the result per distinct pair of lists. Reusable across plans."""

    indexes: dict[tuple[Region, ...], BoxIndex] = field(default_factory=dict)
    cells: dict[tuple[tuple[Region, ...], Region], tuple[Cell, ...]] = field(default_factory=dict)

    @property
    def num_matches(self) -> int:
        """How many wanted boxes were matched so far; a repeated one costs nothing and is not counted."""
        return len(self.cells)

    def match(self, sources: tuple[Region, ...], wanted: Region) -> tuple[Cell, ...]:
        """Disjoint cells of `wanted` with their sources, sorted by region. Parts that no source holds are
        absent."""
        key = (sources, wanted)
        cells = self.cells.get(key)
        if cells is None:
            index = self.indexes.get(sources)
            if index is None:
                index = self.indexes[sources] = BoxIndex.of(sources)
            cells = self.cells[key] = match_box(index, wanted)
        return cells


def match_box(index: BoxIndex, wanted: Region) -> tuple[Cell, ...]:
    """One wanted box against many source boxes. Linear in the boxes near it, unless sources overlap."""
    by_region: dict[Region, list[int]] = {}
    for position in index.near(wanted):
        common = wanted.intersect(index.boxes[position])
        if common is not None:
            by_region.setdefault(common, []).append(position)
    cells = [Cell(region, tuple(sources)) for region, sources in by_region.items()]
    if first_overlap([cell.region for cell in cells]) is not None:
        cells = _split_overlaps(cells)
    return tuple(sorted(cells, key=lambda cell: cell.region))


def _split_overlaps(cells: Iterable[Cell]) -> list[Cell]:
    """Cells cut so that none overlap; where two did, the common part carries the sources of both."""
    done: list[Cell] = []
    for cell in cells:
        rest: tuple[Region, ...] = (cell.region,)
        cut: list[Cell] = []
        for other in done:
            common = cell.region.intersect(other.region)
            if common is None:
                cut.append(other)
            else:
                cut.append(Cell(common, tuple(sorted(set(other.sources + cell.sources)))))
                cut.extend(Cell(part, other.sources) for part in other.region.subtract(common))
                rest = tuple(part for piece in rest for part in piece.subtract(common))
        done = cut + [Cell(part, cell.sources) for part in rest]
    return done

"""Half-open boxes in the index space of one tensor, and exact set arithmetic on them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from operator import ge, gt, le, sub

from refit.plan.errors import PlanError


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """The box `starts[d] <= i[d] < stops[d]`. A rank-0 tensor has the region `Region((), ())` of one
    element."""

    starts: tuple[int, ...]
    stops: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.starts) != len(self.stops):
            raise PlanError(
                f"region has {len(self.starts)} starts and {len(self.stops)} stops; they must agree"
            )
        if self.starts and (min(self.starts) < 0 or any(map(gt, self.starts, self.stops))):
            raise PlanError(f"region {self.starts}..{self.stops} needs 0 <= start <= stop in every dim")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Region":
        """The box of a whole tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(sub, self.stops, self.starts))

    @property
    def num_elements(self) -> int:
        return prod(map(sub, self.stops, self.starts))

    @property
    def is_empty(self) -> bool:
        return any(map(ge, self.starts, self.stops))

    def intersect(self, other: "Region") -> "Region | None":
        """The common box, or None where the two share no element. Both must have the same number of dims."""
        starts = tuple(map(max, self.starts, other.starts))
        stops = tuple(map(min, self.stops, other.stops))
        if any(map(ge, starts, stops)):
            return None
        return Region(starts, stops)

    def contains(self, other: "Region") -> bool:
        """True if every element of `other` is in this box."""
        inside = all(map(le, self.starts, other.starts)) and all(map(ge, self.stops, other.stops))
        return inside or other.is_empty

    def slices(self, of: "Region | None" = None) -> tuple[slice, ...]:
        """Where this box lies in an array that holds `of`; without it, in one that holds the whole tensor."""
        low = (0,) * len(self.starts) if of is None else of.starts
        spans = zip(self.starts, self.stops, low, strict=True)
        return tuple(slice(start - at, stop - at) for start, stop, at in spans)

    def with_dim(self, dim: int, start: int, stop: int) -> "Region":
        """The same box with another interval in one dim."""
        return Region(
            (*self.starts[:dim], start, *self.starts[dim + 1 :]),
            (*self.stops[:dim], stop, *self.stops[dim + 1 :]),
        )

    def subtract(self, other: "Region") -> tuple["Region", ...]:
        """Disjoint boxes that make up this box without `other`, in a fixed order."""
        common = self.intersect(other)
        if common is None:
            return () if self.is_empty else (self,)
        parts: list[Region] = []
        rest = self
        for dim, (start, stop) in enumerate(zip(common.starts, common.stops, strict=True)):
            if rest.starts[dim] < start:
                parts.append(rest.with_dim(dim, rest.starts[dim], start))
            if stop < rest.stops[dim]:
                parts.append(rest.with_dim(dim, stop, rest.stops[dim]))
            rest = rest.with_dim(dim, start, stop)
        return tuple(parts)

    def __str__(self) -> str:
        spans = zip(self.starts, self.stops, strict=True)
        return "[" + ", ".join(f"{start}:{stop}" for start, stop in spans) + "]"


def sweep_dim(regions: Sequence[Region]) -> int:
    """The dim with the most distinct starts: sorting along it separates the boxes best."""
    num_dims = len(regions[0].starts)
    return max(
        range(num_dims), key=lambda dim: (len({region.starts[dim] for region in regions}), -dim), default=0
    )


def first_overlap(regions: Sequence[Region]) -> tuple[int, int] | None:
    """Positions of two boxes that share an element, or None. Sweep: near linear when boxes are cut along one
    dim."""
    solid = [(region, position) for position, region in enumerate(regions) if not region.is_empty]
    if len(solid) < 2:
        return None
    if not solid[0][0].starts:
        return solid[0][1], solid[1][1]
    dim = sweep_dim([region for region, _ in solid])
    solid.sort(key=lambda item: (item[0].starts[dim], item[1]))
    active: list[tuple[Region, int]] = []
    for region, position in solid:
        active = [item for item in active if item[0].stops[dim] > region.starts[dim]]
        for other, other_position in active:
            if region.intersect(other) is not None:
                return min(position, other_position), max(position, other_position)
        active.append((region, position))
    return None


def uncovered(wanted: Region, boxes: Iterable[Region]) -> tuple[Region, ...]:
    """The part of `wanted` that no box covers, as disjoint boxes."""
    rest: tuple[Region, ...] = () if wanted.is_empty else (wanted,)
    for box in boxes:
        rest = tuple(part for piece in rest for part in piece.subtract(box))
        if not rest:
            return ()
    return rest


def cover_fault(wanted: Region, boxes: Sequence[Region]) -> str | None:
    """Why `boxes` is not an exact partition of `wanted` (each element once, nothing outside), or None if it
    is."""
    for box in boxes:
        if not wanted.contains(box):
            return f"{box} reaches outside {wanted}"
    clash = first_overlap(boxes)
    if clash is not None:
        return f"{boxes[clash[0]]} and {boxes[clash[1]]} overlap in {wanted}"
    num_covered = sum(box.num_elements for box in boxes)
    if num_covered != wanted.num_elements:
        return f"{num_covered} of {wanted.num_elements} elements of {wanted} are covered"
    return None


def disjoint(regions: Iterable[Region]) -> tuple[Region, ...]:
    """Disjoint boxes with the same union. Earlier boxes stay whole; later ones lose what is already
    covered."""
    kept: list[Region] = []
    for region in regions:
        rest: tuple[Region, ...] = () if region.is_empty else (region,)
        for other in kept:
            rest = tuple(part for piece in rest for part in piece.subtract(other))
        kept.extend(rest)
    return tuple(kept)


def merge_adjacent(regions: Iterable[Region]) -> tuple[Region, ...]:
    """Fewer boxes with the same elements: neighbours that differ in one dim only are joined. Input must be
    disjoint.

    Result is sorted; it does not depend on the order of the input where every pass has one way to join.
    """
    boxes = sorted(region for region in regions if not region.is_empty)
    if len(boxes) < 2:
        return tuple(boxes)
    num_dims = len(boxes[0].starts)
    changed = True
    while changed:
        changed = False
        for dim in reversed(range(num_dims)):
            joined = _merge_along(boxes, dim)
            changed = changed or len(joined) < len(boxes)
            boxes = joined
    return tuple(sorted(boxes))


def _merge_along(boxes: list[Region], dim: int) -> list[Region]:
    lines: dict[tuple[tuple[int, ...], ...], list[Region]] = {}
    for box in boxes:
        key = (box.starts[:dim], box.starts[dim + 1 :], box.stops[:dim], box.stops[dim + 1 :])
        lines.setdefault(key, []).append(box)
    joined: list[Region] = []
    for line in lines.values():
        line.sort(key=lambda box: box.starts[dim])
        start, stop = line[0].starts[dim], line[0].stops[dim]
        for box in line[1:]:
            if box.starts[dim] == stop:
                stop = box.stops[dim]
                continue  # the open run grows; it is closed below
            joined.append(box.with_dim(dim, start, stop))
            start, stop = box.starts[dim], box.stops[dim]
        joined.append(line[0].with_dim(dim, start, stop))
    return joined


def split_rows(region: Region, max_elements: int) -> tuple[Region, ...]:
    """Cut a box into boxes of at most `max_elements` elements, in row-major order (outer dims are cut
    first)."""
    if max_elements < 1:
        raise PlanError(f"cannot cut {region} into boxes of {max_elements} elements; at least 1 is needed")
    if region.num_elements <= max_elements:
        return (region,)
    dim = next(d for d, size in enumerate(region.shape) if size > 1)
    row_elements = region.num_elements // region.shape[dim]
    step = max(1, max_elements // row_elements)
    parts: list[Region] = []
    for start in range(region.starts[dim], region.stops[dim], step):
        part = region.with_dim(dim, start, min(start + step, region.stops[dim]))
        parts.extend(split_rows(part, max_elements))
    return tuple(parts)

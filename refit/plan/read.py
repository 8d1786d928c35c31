"""Reading weights back: which rows of which tensor are meant, and which rank gives which elements of them.

    wanted("model.embed_tokens.weight", (9, 10), side)      -> a box of a canonical tensor, or a refusal
    plan_read(side, tensor, box)                            -> cells: every element once, with all ranks that hold it
    memory_of(holdings, box)                                -> on one rank: where these elements lie

The cuts come from manifests, hence from the engine's own loader, never from attributes of parameters.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from refit.plan.errors import PlanError
from refit.plan.manifest import Holding, Manifest
from refit.plan.match import BoxIndex, match_box
from refit.plan.naming import canonical
from refit.plan.region import Region, cover_fault, uncovered
from refit.plan.sides import Side

type Rows = tuple[int | None, int | None]
"""Rows [start, stop) of dim 0; None is the beginning or the end."""

_SLICED = re.compile(r"^(?P<name>[^\[\]]+)(?:\[(?P<start>\d*)(?P<colon>:?)(?P<stop>\d*)\])?$")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A box of canonical tensor `tensor`; the answer has `shape`, which for one expert lacks the expert dim."""

    tensor: str
    region: Region
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HeldCell:
    """A box and every rank of the side that holds all of it, in ascending order."""

    region: Region
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Cells that partition `region` of `tensor`; cell `i` is given by rank `givers[i]`, one of those that hold it."""

    tensor: str
    region: Region
    cells: tuple[HeldCell, ...]
    givers: tuple[int, ...]

    def __post_init__(self) -> None:
        fault = cover_fault(self.region, [cell.region for cell in self.cells])
        if fault is not None:
            raise PlanError(f"tensor {self.tensor!r}: {fault}")
        for cell, giver in zip(self.cells, self.givers, strict=True):
            if giver not in cell.ranks:
                raise PlanError(f"tensor {self.tensor!r}: rank {giver} does not hold {cell.region}")

    @property
    def given(self) -> dict[int, tuple[Region, ...]]:
        """{rank: boxes that it sends}."""
        return self._by_rank(lambda rank, giver: rank == giver)

    @property
    def witnessed(self) -> dict[int, tuple[Region, ...]]:
        """{rank: boxes that another rank sends and this one holds too}: their digests must agree."""
        return self._by_rank(lambda rank, giver: rank != giver)

    def _by_rank(self, is_chosen: Callable[[int, int], bool]) -> dict[int, tuple[Region, ...]]:
        found: dict[int, list[Region]] = {}
        for cell, giver in zip(self.cells, self.givers, strict=True):
            for rank in cell.ranks:
                if is_chosen(rank, giver):
                    found.setdefault(rank, []).append(cell.region)
        return {rank: tuple(regions) for rank, regions in sorted(found.items())}


def parse_slice(text: str) -> tuple[str, Rows]:
    """`NAME`, `NAME[ROW]` or `NAME[START:STOP]`, both optional, as (name, rows). Raises PlanError for anything else."""
    found = _SLICED.match(text)
    if found is None or (found["start"] == "" and found["colon"] == ""):
        raise PlanError(f"{text!r} is no NAME, NAME[ROW] or NAME[START:STOP] with rows counted from 0")
    start = int(found["start"]) if found["start"] else None
    if found["start"] and not found["colon"]:
        return found["name"], (int(found["start"]), int(found["start"]) + 1)
    return found["name"], (start, int(found["stop"]) if found["stop"] else None)


def wanted(name: str, rows: Rows, side: Side) -> Wanted:
    """Rows of an HF tensor: its own name, one expert's, or `...experts.*...` for all experts stacked (rows: experts).

    Raises PlanError for a name that the side does not hold and for rows that are not there, padding included.
    """
    tensor, expert = canonical(name)
    if tensor not in side.specs or (expert is not None and expert >= side.specs[tensor].shape[0]):
        raise PlanError(f"no tensor {name!r} is held here; {_nearest(name, side)}")
    if tensor in side.misc:
        raise PlanError(f"{name!r} cannot be read back as it was loaded: {side.misc[tensor]}")
    whole = side.specs[tensor].shape
    shape = whole if expert is None else whole[1:]
    start, stop = _checked_rows(name, rows, shape, side, tensor)
    kept = (stop - start, *shape[1:]) if shape else ()
    inside = Region.whole(shape).with_dim(0, start, stop) if shape else Region((), ())
    if expert is None:
        return Wanted(tensor, inside, kept)
    return Wanted(tensor, Region((expert, *inside.starts), (expert + 1, *inside.stops)), kept)


def plan_read(side: Side, tensor: str, region: Region) -> ReadPlan:
    """Who gives which elements of a box: each element once, from as few ranks as a first fit finds.

    Raises PlanError when no rank holds some part of the box.
    """
    layout = side.layouts.get(tensor)
    entries = () if layout is None else layout.entries
    cells = []
    for cell in match_box(BoxIndex.of([entry.box for entry in entries]), region):
        ranks = {rank for position in cell.sources for rank in entries[position].ranks}
        cells.append(HeldCell(cell.region, tuple(sorted(ranks))))
    missing = uncovered(region, [cell.region for cell in cells])
    if missing:
        raise PlanError(f"tensor {tensor!r}: no {side.manifest.side} rank holds {missing[0]}; prepare again")
    givers: list[int] = []
    for held in cells:
        givers.append(next((rank for rank in held.ranks if rank in givers), held.ranks[0]))
    return ReadPlan(tensor, region, tuple(cells), tuple(givers))


def memory_of(holdings: Iterable[Holding], region: Region) -> tuple[Holding, ...]:
    """The memory of a box on one rank: holdings that partition it, a second copy of an element left out.

    Raises PlanError when the holdings, all of one tensor, do not cover the box.
    """
    rest: tuple[Region, ...] = () if region.is_empty else (region,)
    found: list[Holding] = []
    for one in holdings:
        parts = [common for piece in rest if (common := piece.intersect(one.region)) is not None]
        found += [Holding(one.tensor, part, one.param, one.offset_of(part), one.strides) for part in parts]
        rest = tuple(left for piece in rest for left in piece.subtract(one.region))
    if rest:
        raise PlanError(f"{rest[0]} of {region} is not held here")
    return tuple(found)


def by_tensor(holdings: Iterable[Holding]) -> Mapping[str, Sequence[Holding]]:
    """Holdings by canonical tensor, in order."""
    found: dict[str, list[Holding]] = {}
    for holding in holdings:
        found.setdefault(holding.tensor, []).append(holding)
    return found


def stored_rows(manifest: Manifest, tensor: str) -> int:
    """Rows of memory that the ranks keep for a tensor that is alone in its params, padding included; 0 if it is not."""
    elements: dict[tuple[Region, ...], int] = {}
    row_elements = 1
    for rank in manifest.ranks:
        held = by_tensor(rank.holdings).get(tensor, ())
        params = {holding.param for holding in held}
        if any(other.tensor != tensor for other in rank.holdings if other.param in params):
            return 0
        if held:
            spec = next(spec for spec in rank.tensors if spec.name == tensor)
            row_elements = max(1, prod(spec.shape[1:]))
            sizes = {spec.name: spec.num_elements for spec in rank.params}
            elements[tuple(one.region for one in held)] = sum(sizes[param] for param in params)
    return sum(elements.values()) // row_elements


def _checked_rows(name: str, rows: Rows, shape: tuple[int, ...], side: Side, tensor: str) -> tuple[int, int]:
    size = shape[0] if shape else 1
    start, stop = rows[0] or 0, size if rows[1] is None else rows[1]
    if 0 <= start < stop <= size or (start, stop) == (0, size):
        return start, stop
    last = f"{name} has {size} rows, 0 to {size - 1}"
    if not 0 <= start < stop:
        raise PlanError(f"rows {start}:{stop} of {name} are none; ask for 0 <= START < STOP <= {size}")
    stored = stored_rows(side.manifest, tensor)
    row = max(start, size)
    if row < stored:
        raise PlanError(
            f"row {row} of {name} is padding: {last}, and the engine pads them to {stored}; ask for rows up to {size}"
        )
    raise PlanError(f"row {row} of {name} is not there: {last}; ask for rows up to {size}")


def _nearest(name: str, side: Side) -> str:
    near = difflib.get_close_matches(canonical(name)[0], side.specs, n=1, cutoff=0.0)
    return f"the nearest of its {len(side.specs)} names is {near[0]!r}" if near else "it holds nothing"

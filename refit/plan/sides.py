"""One side seen as layouts: which ranks hold which boxes of which tensor. Equal layouts are one object.

Work here is per distinct *body* (ranks that share their holdings) and per distinct tuple of regions, so
replicas and repeated layers cost nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from refit.plan.manifest import Holding, Manifest, RankManifest, TensorSpec, coalesce_holdings
from refit.plan.region import Region, disjoint, merge_adjacent


@dataclass(frozen=True, slots=True)
class Copy:
    """One complete set of boxes of a tensor on one rank, with the memory behind it.

    A generator that keeps a tensor twice (tied embeddings in separate memory) has two copies, each to be
    filled. `pattern` numbers the tuple of holding regions, so equal patterns share their matching.
    `overlapping` is True if two holdings share elements, which only trainers may.
    """

    boxes: tuple[Region, ...]
    holdings: tuple[Holding, ...]
    pattern: int
    overlapping: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """One box of a layout: every rank of `ranks` (ranks inside the side) holds it as its copy number
    `copy`."""

    box: Region
    copy: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """How one side holds a tensor. `index` is the layout's number inside its side."""

    index: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Side:
    """Index of a manifest. `copies[b][tensor]` are the copies of body `b`; `body_of_rank[r]` names r's
    body."""

    manifest: Manifest
    bodies: tuple[RankManifest, ...]
    body_ranks: tuple[tuple[int, ...], ...]
    body_of_rank: tuple[int, ...]
    copies: tuple[dict[str, tuple[Copy, ...]], ...]
    specs: dict[str, TensorSpec]
    misc: dict[str, str]
    layouts: dict[str, Layout]

    @classmethod
    def of(cls, manifest: Manifest) -> "Side":
        """Index a manifest. Cost: distinct bodies x their holdings."""
        bodies, body_of_rank = _distinct_bodies(manifest)
        body_ranks: list[list[int]] = [[] for _ in bodies]
        for rank, body in enumerate(body_of_rank):
            body_ranks[body].append(rank)
        copies = _Copies(overlaps_are_copies=manifest.side == "gen")
        tables = tuple(copies.of_body(body) for body in bodies)
        ranks_of_body = tuple(map(tuple, body_ranks))
        return cls(
            manifest=manifest,
            bodies=bodies,
            body_ranks=ranks_of_body,
            body_of_rank=body_of_rank,
            copies=tables,
            specs=_specs(bodies),
            misc=_misc(bodies, ranks_of_body),
            layouts=_layouts(tables, ranks_of_body),
        )


def _distinct_bodies(manifest: Manifest) -> tuple[tuple[RankManifest, ...], tuple[int, ...]]:
    by_identity: dict[tuple[int, ...], int] = {}
    by_value: dict[tuple[object, ...], int] = {}
    bodies: list[RankManifest] = []
    of_rank: list[int] = []
    for rank in manifest.ranks:
        parts = (rank.tensors, rank.params, rank.holdings, rank.misc)
        identity = tuple(map(id, parts))
        body = by_identity.get(identity)
        if body is None:
            body = by_value.setdefault(parts, len(bodies))
            by_identity[identity] = body
            if body == len(bodies):
                bodies.append(rank)
        of_rank.append(body)
    return tuple(bodies), tuple(of_rank)


def _specs(bodies: Iterable[RankManifest]) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    for body in bodies:
        for spec in body.tensors:
            specs.setdefault(spec.name, spec)
    return specs


def _misc(bodies: Iterable[RankManifest], ranks: Sequence[tuple[int, ...]]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for body, body_ranks in zip(bodies, ranks, strict=True):
        for misc in body.misc:
            reasons.setdefault(misc.tensor, f"{body.side} rank {body_ranks[0]}: {misc.reason}")
    return reasons


@dataclass(frozen=True, slots=True)
class _Pattern:
    """What follows from a tuple of holding regions alone. parts: positions of the holdings of each copy."""

    number: int
    boxes: tuple[Region, ...]
    overlapping: bool
    parts: tuple[tuple[int, ...], ...]


@dataclass(slots=True)
class _Copies:
    """Builds copies; remembers what it did for a tuple of regions, because layers and ranks repeat."""

    overlaps_are_copies: bool
    patterns: dict[tuple[Region, ...], _Pattern] = field(default_factory=dict)

    def of_body(self, body: RankManifest) -> dict[str, tuple[Copy, ...]]:
        by_tensor: dict[str, list[Holding]] = {}
        for holding in body.holdings:
            by_tensor.setdefault(holding.tensor, []).append(holding)
        return {
            tensor: copies
            for tensor, holdings in by_tensor.items()
            if (copies := self._of_tensor(_coalesced(holdings)))
        }

    def _of_tensor(self, holdings: tuple[Holding, ...]) -> tuple[Copy, ...]:
        """Copies of one tensor; none if it is held only as empty boxes."""
        if not holdings:
            return ()
        pattern = self._pattern(tuple([holding.region for holding in holdings]))
        if len(pattern.parts) == 1:
            return (Copy(pattern.boxes, holdings, pattern.number, pattern.overlapping),)
        copies: list[Copy] = []
        for part in pattern.parts:
            chosen = tuple(holdings[position] for position in part)
            one = self._pattern(tuple(holding.region for holding in chosen))
            copies.append(Copy(one.boxes, chosen, one.number, one.overlapping))
        return tuple(copies)

    def _pattern(self, regions: tuple[Region, ...]) -> _Pattern:
        pattern = self.patterns.get(regions)
        if pattern is None:
            boxes = merge_adjacent(disjoint(regions))
            num_held = sum(region.num_elements for region in regions)
            overlapping = num_held != sum(box.num_elements for box in boxes)
            parts: tuple[tuple[int, ...], ...] = (tuple(range(len(regions))),)
            if overlapping and self.overlaps_are_copies:
                parts = _split_overlaps(regions)
            pattern = self.patterns[regions] = _Pattern(len(self.patterns), boxes, overlapping, parts)
        return pattern


def _coalesced(holdings: list[Holding]) -> tuple[Holding, ...]:
    """`coalesce_holdings` for one tensor's holdings in manifest order: nothing to join if each has its own param."""
    if len({held.param for held in holdings}) == len(holdings):
        return tuple([held for held in holdings if not held.region.is_empty])
    return coalesce_holdings(holdings)


def _split_overlaps(regions: tuple[Region, ...]) -> tuple[tuple[int, ...], ...]:
    """Positions of the regions, dealt into as few groups as a first fit finds, each without overlaps."""
    groups: list[list[int]] = []
    for position, region in enumerate(regions):
        fitting = (group for group in groups if all(region.intersect(regions[i]) is None for i in group))
        group = next(fitting, None)
        if group is None:
            groups.append(group := [])
        group.append(position)
    return tuple(map(tuple, groups))


def _layouts(
    tables: Sequence[dict[str, tuple[Copy, ...]]], body_ranks: Sequence[tuple[int, ...]]
) -> dict[str, Layout]:
    """Layout of every tensor. Boxes are looked at once per distinct (body, patterns) list, so not per layer."""
    held: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    for body, table in enumerate(tables):
        for tensor, copies in table.items():
            held.setdefault(tensor, []).append((body, tuple([copy.pattern for copy in copies])))
    ranks_of: dict[tuple[int, ...], tuple[int, ...]] = {}
    by_patterns: dict[tuple[tuple[int, tuple[int, ...]], ...], Layout] = {}
    by_entries: dict[tuple[Entry, ...], Layout] = {}
    result: dict[str, Layout] = {}
    for tensor, places in held.items():
        key = tuple(places)
        layout = by_patterns.get(key)
        if layout is None:
            entries = _entries(tensor, tables, [body for body, _ in places], body_ranks, ranks_of)
            layout = by_patterns[key] = by_entries.setdefault(entries, Layout(len(by_entries), entries))
        result[tensor] = layout
    return result


def _entries(
    tensor: str,
    tables: Sequence[dict[str, tuple[Copy, ...]]],
    bodies: Iterable[int],
    body_ranks: Sequence[tuple[int, ...]],
    ranks_of: dict[tuple[int, ...], tuple[int, ...]],
) -> tuple[Entry, ...]:
    found: dict[tuple[Region, int], list[int]] = {}
    for body in bodies:
        for number, copy in enumerate(tables[body][tensor]):
            for box in copy.boxes:
                found.setdefault((box, number), []).append(body)
    return tuple(
        Entry(box, number, _ranks_of(tuple(found[box, number]), body_ranks, ranks_of))
        for box, number in sorted(found)
    )


def _ranks_of(
    bodies: tuple[int, ...],
    body_ranks: Sequence[tuple[int, ...]],
    memo: dict[tuple[int, ...], tuple[int, ...]],
) -> tuple[int, ...]:
    ranks = memo.get(bodies)
    if ranks is None:
        ranks = memo[bodies] = tuple(sorted(rank for body in bodies for rank in body_ranks[body]))
    return ranks

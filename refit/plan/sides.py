"""One side seen as layouts: which ranks hold which boxes of which tensor. Equal layouts are one object.

Work here is per distinct *body* (ranks that share their holdings) and per distinct tuple of regions, so
replicas and repeated layers cost nothing.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter

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
    """Index of a manifest. `held[b][tensor]` is what body `b` holds, `copies(b, tensor)` the same as copies;
    `body_of_rank[r]` names r's body.

    `digest` (sha256, hex) covers who holds what where: places, tensors, boxes, params, offsets, strides.
    """

    manifest: Manifest
    bodies: tuple[RankManifest, ...]
    body_ranks: tuple[tuple[int, ...], ...]
    body_of_rank: tuple[int, ...]
    held: tuple[dict[str, "Held"], ...]
    specs: dict[str, TensorSpec]
    misc: dict[str, str]
    layouts: dict[str, Layout]
    digest: str

    @classmethod
    def of(cls, manifest: Manifest) -> "Side":
        """Index a manifest. Cost: distinct bodies x their holdings, and little more than that per holding."""
        reader = _Reader(overlaps_are_copies=manifest.side == "gen")
        read, body_of_rank = _distinct_bodies(manifest, reader)
        bodies = tuple(one.body for one in read)
        body_ranks: list[list[int]] = [[] for _ in bodies]
        for rank, body in enumerate(body_of_rank):
            body_ranks[body].append(rank)
        ranks_of_body = tuple(map(tuple, body_ranks))
        return cls(
            manifest=manifest,
            bodies=bodies,
            body_ranks=ranks_of_body,
            body_of_rank=body_of_rank,
            held=tuple(one.held for one in read),
            specs=_specs(bodies),
            misc=_misc(bodies, ranks_of_body),
            layouts=_layouts(read, ranks_of_body),
            digest=_digest(manifest, body_of_rank, read, reader),
        )

    def copies(self, body: int, tensor: str) -> tuple[Copy, ...]:
        """The copies of a tensor that a body holds; made when asked for. KeyError where it holds none."""
        form, held = self.held[body][tensor]
        if form.joined:
            held = coalesce_holdings(held)
        return tuple(
            Copy(
                pattern.boxes,
                tuple(held[position] for position in part),
                pattern.number,
                pattern.overlapping,
            )
            for pattern, part in form.copies
        )


@dataclass(frozen=True, slots=True)
class _Pattern:
    """What follows from a tuple of holding regions alone. parts: positions of the holdings of each copy."""

    number: int
    boxes: tuple[Region, ...]
    overlapping: bool
    parts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class _Form:
    """All about one tensor's holdings on one rank but the names: the same for equal layers, hence worked out once.

    `copies` are the pattern and the positions of each copy, among the holdings as they are, or where `joined` among
    those that `coalesce_holdings` makes of them.
    """

    number: int
    joined: bool
    copies: tuple[tuple[_Pattern, tuple[int, ...]], ...]
    patterns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Read:
    """One body, read. `text` spells its holdings: tensor, number of the form, params."""

    body: RankManifest
    held: dict[str, "Held"]
    text: str


type Held = tuple[_Form, tuple[Holding, ...]]
type _FormKey = tuple[tuple[object, ...], ...]


@dataclass(slots=True)
class _Reader:
    """Builds copies; remembers what it did for a form, because layers and ranks repeat."""

    overlaps_are_copies: bool
    forms: dict[_FormKey, _Form] = field(default_factory=dict)
    known_patterns: dict[tuple[Region, ...], _Pattern] = field(default_factory=dict)

    def read(self, body: RankManifest) -> _Read:
        """A body's holdings are sorted by tensor; each tensor's are one form."""
        table: dict[str, Held] = {}
        words: list[object] = []
        for tensor, group in groupby(body.holdings, attrgetter("tensor")):
            held = tuple(group)
            key = _form_key(held)
            form = self.forms.get(key)
            if form is None:
                form = self.forms[key] = self._form(held)
            words += (tensor, form.number, *[one.param for one in held])
            if form.copies:
                table[tensor] = (form, held)
        return _Read(body, table, json.dumps(words, separators=(",", ":")))

    def _form(self, held: tuple[Holding, ...]) -> _Form:
        solid = {position for position, one in enumerate(held) if not one.region.is_empty}
        joined = coalesce_holdings(held)
        is_joined = len(joined) < len(solid)
        places = [(position, one) for position, one in enumerate(joined if is_joined else held)]
        if not is_joined:
            places = [place for place in places if place[0] in solid]
        copies: list[tuple[_Pattern, tuple[int, ...]]] = []
        if places:
            whole = self._pattern(tuple([one.region for _, one in places]))
            for part in whole.parts:
                chosen = [places[number] for number in part]
                pattern = self._pattern(tuple([one.region for _, one in chosen]))
                copies.append((pattern, tuple([position for position, _ in chosen])))
        numbers = tuple([pattern.number for pattern, _ in copies])
        return _Form(len(self.forms), is_joined, tuple(copies), numbers)

    def _pattern(self, regions: tuple[Region, ...]) -> _Pattern:
        pattern = self.known_patterns.get(regions)
        if pattern is None:
            boxes = merge_adjacent(disjoint(regions))
            num_held = sum(region.num_elements for region in regions)
            overlapping = num_held != sum(box.num_elements for box in boxes)
            parts: tuple[tuple[int, ...], ...] = (tuple(range(len(regions))),)
            if overlapping and self.overlaps_are_copies:
                parts = _split_overlaps(regions)
            pattern = _Pattern(len(self.known_patterns), boxes, overlapping, parts)
            self.known_patterns[regions] = pattern
        return pattern


def _form_key(held: tuple[Holding, ...]) -> _FormKey:
    """Boxes, offsets, strides, and which of the holdings share a param. Tuples of ints hash without Python code."""
    if len(held) == 1:
        only = held[0]
        return (only.region.starts, only.region.stops, (only.offset,), only.strides)
    first: dict[str, int] = {}
    return (
        tuple([one.region.starts for one in held]),
        tuple([one.region.stops for one in held]),
        tuple([one.offset for one in held]),
        tuple([one.strides for one in held]),
        tuple([first.setdefault(one.param, len(first)) for one in held]),
    )


def _distinct_bodies(manifest: Manifest, reader: _Reader) -> tuple[tuple[_Read, ...], tuple[int, ...]]:
    """Ranks that share a body in memory are one body; so are those whose bodies are equal in every value."""
    by_identity: dict[tuple[int, ...], int] = {}
    by_text: dict[str, list[int]] = {}
    read: list[_Read] = []
    of_rank: list[int] = []
    for rank in manifest.ranks:
        identity = tuple(map(id, _parts(rank)))
        body = by_identity.get(identity)
        if body is None:
            one = reader.read(rank)
            alike = by_text.setdefault(one.text, [])
            equal = (number for number in alike if _parts(read[number].body) == _parts(rank))
            body = next(equal, len(read))
            by_identity[identity] = body
            if body == len(read):
                alike.append(body)
                read.append(one)
        of_rank.append(body)
    return tuple(read), tuple(of_rank)


def _parts(rank: RankManifest) -> tuple[tuple[object, ...], ...]:
    return rank.tensors, rank.params, rank.holdings, rank.misc


def _digest(manifest: Manifest, body_of_rank: Sequence[int], read: Iterable[_Read], reader: _Reader) -> str:
    """Text of ints and strings only: no hash order, no floats. Forms are numbered as they occur, rank by rank."""
    places = [(rank.rank, rank.stage, rank.replica) for rank in manifest.ranks]
    head = [manifest.side, places, body_of_rank, list(reader.forms)]
    state = hashlib.sha256(json.dumps(head, separators=(",", ":")).encode())
    for one in read:
        state.update(b"\n" + one.text.encode())
    return state.hexdigest()


def _specs(bodies: Sequence[RankManifest]) -> dict[str, TensorSpec]:
    """The spec of every tensor, from the first body that names it."""
    specs: dict[str, TensorSpec] = {}
    for body in reversed(bodies):
        specs.update([(spec.name, spec) for spec in body.tensors])
    return specs


def _misc(bodies: Iterable[RankManifest], ranks: Sequence[tuple[int, ...]]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for body, body_ranks in zip(bodies, ranks, strict=True):
        for misc in body.misc:
            reasons.setdefault(misc.tensor, f"{body.side} rank {body_ranks[0]}: {misc.reason}")
    return reasons


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


def _layouts(read: Sequence[_Read], body_ranks: Sequence[tuple[int, ...]]) -> dict[str, Layout]:
    """Layout of every tensor. Boxes are looked at once per distinct (body, patterns) list, so not per layer."""
    held: dict[str, list[object]] = {}
    for body, one in enumerate(read):
        for tensor, (form, _) in one.held.items():
            places = held.get(tensor)
            if places is None:
                held[tensor] = [body, form.patterns]
            else:
                places += (body, form.patterns)
    tables = [one.held for one in read]
    ranks_of: dict[tuple[int, ...], tuple[int, ...]] = {}
    by_patterns: dict[tuple[object, ...], Layout] = {}
    by_entries: dict[tuple[Entry, ...], Layout] = {}
    result: dict[str, Layout] = {}
    for tensor, places in held.items():
        key = tuple(places)
        layout = by_patterns.get(key)
        if layout is None:
            bodies = [body for body, table in enumerate(tables) if tensor in table]
            entries = _entries(tensor, tables, bodies, body_ranks, ranks_of)
            layout = by_patterns[key] = by_entries.setdefault(entries, Layout(len(by_entries), entries))
        result[tensor] = layout
    return result


def _entries(
    tensor: str,
    tables: Sequence[dict[str, Held]],
    bodies: Iterable[int],
    body_ranks: Sequence[tuple[int, ...]],
    ranks_of: dict[tuple[int, ...], tuple[int, ...]],
) -> tuple[Entry, ...]:
    found: dict[tuple[Region, int], list[int]] = {}
    for body in bodies:
        for number, (pattern, _) in enumerate(tables[body][tensor][0].copies):
            for box in pattern.boxes:
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

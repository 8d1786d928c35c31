"""Which tensors go in bulk. A tensor is bulk only if it is whitelisted and both sides prove it; else misc,
with a reason."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from refit.plan.dtypes import can_cast, item_bytes
from refit.plan.errors import PlanError
from refit.plan.manifest import TensorSpec
from refit.plan.match import Cell, Matcher
from refit.plan.naming import peft_factor
from refit.plan.options import PlanOptions
from refit.plan.region import Region, uncovered
from refit.plan.sides import Layout, Side

BULK, MISC = "bulk", "misc"


@dataclass(frozen=True, slots=True)
class Classified:
    """One tensor with its class. dtype is the wire dtype; num_bytes counts each logical element once."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    reason: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Matched:
    """A distinct pair of layouts: the cells of every wanted box, or why the pair cannot be moved in bulk."""

    train: Layout
    gen: Layout
    cells: tuple[tuple[Cell, ...], ...]
    fault: str


@dataclass(frozen=True, slots=True)
class Classification:
    """All tensors by name, in plan order, and the match of every layout pair that occurs."""

    tensors: dict[str, Classified]
    pairs: dict[tuple[int, int, tuple[int, ...]], Matched]


def classify(train: Side, gen: Side, options: PlanOptions, matcher: Matcher) -> Classification:
    """Put every tensor of either side into exactly one class. Raises PlanError with all contradictions
    found."""
    names = sorted(train.specs.keys() | gen.specs.keys(), key=natural_key)
    problems = tuple(_contradictions(train, gen, names))
    if problems:
        raise PlanError.collected("the two manifests contradict each other", problems)
    whitelist = [re.compile(pattern) for pattern in options.whitelist]
    pairs: dict[tuple[int, int, tuple[int, ...]], Matched] = {}
    tensors: dict[str, Classified] = {}
    for name in names:
        stored, wanted = train.specs.get(name), gen.specs.get(name)
        spec = wanted if wanted is not None else stored
        assert spec is not None, f"tensor {name} is on neither side"
        reason = _misc_reason(name, train, gen, whitelist) or _pair_fault(name, train, gen, matcher, pairs)
        kind = MISC if reason else BULK
        num_bytes = prod(spec.shape) * item_bytes(spec.dtype)
        tensors[name] = Classified(
            name, spec.shape, spec.dtype, kind, reason or "proven by both sides", num_bytes
        )
    return Classification(tensors, pairs)


def natural_key(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Sort key that orders `layers.2` before `layers.10`."""
    parts = re.split(r"(\d+)", name)
    return tuple((part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts)


def _contradictions(train: Side, gen: Side, names: Iterable[str]) -> Iterable[str]:
    for name in names:
        stored, wanted = train.specs.get(name), gen.specs.get(name)
        if wanted is None:
            pass  # named by the trainer only: classified misc below, with that reason
        elif stored is None:
            yield f"tensor {name!r} is wanted by the generators but no trainer names it, not even as misc"
        elif stored.shape != wanted.shape:
            yield (
                f"tensor {name!r} has shape {stored.shape} on trainers and {wanted.shape} on generators; "
                f"{_way_out(stored, wanted)}"
            )


def _way_out(stored: TensorSpec, wanted: TensorSpec) -> str:
    """What to do about two shapes of one tensor. Factors of one layer's adapter differ in one dim alone: the rank."""
    factor = peft_factor(stored.name)
    if factor is not None:
        dim = "AB".index(factor)
        return (
            f"trainers learn adapters of rank {stored.shape[dim]}, the engine was built for {wanted.shape[dim]}: "
            "build both with one policy.lora_rank"
        )
    return "build both from one checkpoint"


def _misc_reason(name: str, train: Side, gen: Side, whitelist: Iterable[re.Pattern[str]]) -> str:
    """Why the tensor is misc before any matching, or an empty string."""
    if not any(pattern.fullmatch(name) for pattern in whitelist):
        return "no whitelist pattern matches its name"
    for side in (train, gen):
        if name in side.misc:
            return f"not described: {side.misc[name]}"
        if name not in side.layouts:
            return f"no {side.manifest.side} rank holds it"
    return _dtype_fault(train.specs[name], gen.specs[name])


def _dtype_fault(stored: TensorSpec, wanted: TensorSpec) -> str:
    if can_cast(stored.dtype, wanted.dtype):
        return ""
    return f"trainers store {stored.dtype} and engines {wanted.dtype}, which no element-wise cast connects"


def _pair_fault(
    name: str,
    train: Side,
    gen: Side,
    matcher: Matcher,
    pairs: dict[tuple[int, int, tuple[int, ...]], Matched],
) -> str:
    source, wanted = train.layouts[name], gen.layouts[name]
    shape = gen.specs[name].shape
    key = (source.index, wanted.index, shape)
    pair = pairs.get(key)
    if pair is None:
        pair = pairs[key] = _match_pair(source, wanted, shape, gen, matcher)
    return pair.fault


def _match_pair(
    source: Layout, wanted: Layout, shape: tuple[int, ...], gen: Side, matcher: Matcher
) -> Matched:
    boxes = tuple(entry.box for entry in source.entries)
    cells = tuple(matcher.match(boxes, entry.box) for entry in wanted.entries)
    fault = _replica_fault(wanted, shape, gen)
    for entry, found in zip(wanted.entries, cells, strict=True):
        missing = entry.box.num_elements - sum(cell.region.num_elements for cell in found)
        if missing and not fault:
            hole = uncovered(entry.box, (cell.region for cell in found))[0]
            fault = (
                f"no trainer holds {hole}, which gen rank {entry.ranks[0]} wants ({missing} elements missing)"
            )
    return Matched(source, wanted, cells, fault)


def _replica_fault(wanted: Layout, shape: tuple[int, ...], gen: Side) -> str:
    """Every replica must hold every element; a gap means that the description of the engine is incomplete."""
    ranks = gen.manifest.ranks
    boxes: dict[int, list[Region]] = {rank.replica: [] for rank in ranks}
    for entry in wanted.entries:
        for replica in sorted({ranks[rank].replica for rank in entry.ranks}):
            boxes[replica].append(entry.box)
    whole = Region.whole(shape)
    checked: set[tuple[Region, ...]] = set()
    for replica, held in boxes.items():
        key = tuple(held)
        if key not in checked:
            checked.add(key)
            hole = uncovered(whole, held)
            if hole:
                return f"replica {replica} does not hold {hole[0]} on any of its ranks"
    return ""

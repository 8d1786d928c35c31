"""What the ranks of one side hold: the input of a plan. Values check themselves when they are built."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from operator import gt, mul, sub

from refit.plan.dtypes import item_bytes
from refit.plan.errors import PlanError
from refit.plan.region import Region

SIDES = ("train", "gen")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One canonical tensor: HF name, full logical shape, dtype that this side stores."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        _check_sizes(f"tensor {self.name!r}", self.name, self.shape)
        item_bytes(self.dtype)


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One piece of memory that a framework stores on one rank.

    `strides`: in elements, of memory that is not row-major; None where it is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_sizes(f"param {self.name!r}", self.name, self.shape)
        item_bytes(self.dtype)
        if self.strides is not None and len(self.strides) != len(self.shape):
            raise PlanError(
                f"param {self.name!r}: shape {self.shape} has {len(self.shape)} dims"
                f" but strides {self.strides} are given"
            )

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Holding:
    """Where the elements of one box of a tensor live in one param.

    Element at tensor index `i` of `region` is flat element `offset + sum((i[d] - region.starts[d]) *
    strides[d])`, counted in elements from the param's own first element.
    """

    tensor: str
    region: Region
    param: str
    offset: int
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.strides) != len(self.region.starts):
            raise PlanError(
                f"holding of {self.tensor!r} in param {self.param!r}:"
                f" region has {len(self.region.starts)} dims but {len(self.strides)} strides are given"
            )
        if self.offset < 0 or any(stride < 0 for stride in self.strides):
            raise PlanError(
                f"holding of {self.tensor!r} in param {self.param!r}: offset {self.offset} and strides"
                f" {self.strides} must not be negative"
            )

    def offset_of(self, region: Region) -> int:
        """Flat element of the first element of `region`, which must lie inside this holding's region."""
        steps: Iterable[int] = map(sub, region.starts, self.region.starts)
        offset: int = sum(map(mul, steps, self.strides), self.offset)
        return offset

    @property
    def last_element(self) -> int:
        """The highest flat element that the box touches; `offset` itself for an empty box."""
        if self.region.is_empty:
            return self.offset
        sizes = zip(self.region.shape, self.strides, strict=True)
        return self.offset + sum([(size - 1) * stride for size, stride in sizes])


@dataclass(frozen=True, slots=True)
class MiscReason:
    """A tensor that a side cannot describe as strided boxes, and why."""

    tensor: str
    reason: str


@dataclass(frozen=True, slots=True)
class RankManifest:
    """All that one rank of one side holds.

    `rank` counts inside the side; `stage` is the pipeline stage; `replica` is the engine index (0 for
    trainers).
    """

    side: str
    rank: int
    stage: int
    replica: int
    tensors: tuple[TensorSpec, ...]
    params: tuple[ParamSpec, ...]
    holdings: tuple[Holding, ...]
    misc: tuple[MiscReason, ...]

    def __post_init__(self) -> None:
        self._check_place()
        object.__setattr__(self, "tensors", tuple(sorted(self.tensors, key=lambda spec: spec.name)))
        object.__setattr__(self, "params", tuple(sorted(self.params, key=lambda spec: spec.name)))
        object.__setattr__(self, "holdings", tuple(sorted(self.holdings, key=_holding_key)))
        object.__setattr__(self, "misc", tuple(sorted(self.misc, key=lambda misc: misc.tensor)))
        problems = tuple(_body_problems(self))
        if problems:
            raise PlanError.collected(f"manifest of {self.side} rank {self.rank}", problems)

    def _check_place(self) -> None:
        if self.side not in SIDES:
            raise PlanError(f"side {self.side!r} of rank {self.rank} must be 'train' or 'gen'")
        if min(self.rank, self.stage, self.replica) < 0:
            raise PlanError(
                f"{self.side} rank {self.rank}, stage {self.stage}, replica {self.replica}:"
                " none may be negative"
            )
        if self.side == "train" and self.replica != 0:
            raise PlanError(f"train rank {self.rank} has replica {self.replica}; trainers have replica 0")

    def sibling(self, rank: int, replica: int) -> "RankManifest":
        """The same holdings on another rank and replica, shared and not checked again. Cost: constant."""
        twin = object.__new__(RankManifest)
        for field in ("side", "stage", "tensors", "params", "holdings", "misc"):
            object.__setattr__(twin, field, getattr(self, field))
        object.__setattr__(twin, "rank", rank)
        object.__setattr__(twin, "replica", replica)
        twin._check_place()
        return twin


@dataclass(frozen=True, slots=True)
class Manifest:
    """One whole side. Ranks are 0..n-1 in order and agree on the shape and dtype of every tensor."""

    side: str
    ranks: tuple[RankManifest, ...]

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise PlanError(f"side {self.side!r} must be 'train' or 'gen'")
        if not self.ranks:
            raise PlanError(f"the {self.side} manifest has no ranks; at least one must describe itself")
        problems = tuple(_rank_problems(self)) + tuple(_shape_problems(self))
        if problems:
            raise PlanError.collected(f"{self.side} manifest", problems)


def coalesce_holdings(holdings: Iterable[Holding]) -> tuple[Holding, ...]:
    """Fewer holdings with the same meaning: boxes that touch in the tensor and continue in memory are joined.

    Empty boxes vanish. The result is sorted by tensor, region, param, offset.
    """
    found = tuple(holdings)
    if len(found) == 1 and not found[0].region.is_empty:
        return found
    groups: dict[tuple[str, str], list[Holding]] = {}
    for holding in found:
        if not holding.region.is_empty:
            groups.setdefault((holding.tensor, holding.param), []).append(holding)
    joined: list[Holding] = []
    for group in groups.values():
        joined += group if len(group) == 1 else _coalesce_group(group)
    return tuple(sorted(joined, key=_holding_key))


def _holding_key(holding: Holding) -> tuple[str, tuple[int, ...], tuple[int, ...], str, int]:
    return holding.tensor, holding.region.starts, holding.region.stops, holding.param, holding.offset


def _coalesce_group(group: list[Holding]) -> list[Holding]:
    changed = len(group) > 1
    while changed:
        before = len(group)
        for dim in reversed(range(len(group[0].strides))):
            group = _coalesce_along(group, dim)
        changed = 1 < len(group) < before
    return group


def _coalesce_along(group: list[Holding], dim: int) -> list[Holding]:
    lines: dict[tuple[tuple[int, ...], ...], list[Holding]] = {}
    for holding in group:
        starts, stops = holding.region.starts, holding.region.stops
        others = holding.strides[:dim] + holding.strides[dim + 1 :]
        key = (starts[:dim], starts[dim + 1 :], stops[:dim], stops[dim + 1 :], others)
        lines.setdefault(key, []).append(holding)
    joined: list[Holding] = []
    for line in lines.values():
        line.sort(key=lambda holding: (holding.region.starts[dim], holding.offset))
        run = line[0]
        for holding in line[1:]:
            longer = _join(run, holding, dim)
            if longer is None:
                joined.append(run)
            run = holding if longer is None else longer
        joined.append(run)
    return joined


def _join(first: Holding, second: Holding, dim: int) -> Holding | None:
    """Both boxes as one holding, or None where the second is not the continuation of the first in dim
    `dim`."""
    size = first.region.stops[dim] - first.region.starts[dim]
    if second.region.starts[dim] != first.region.stops[dim]:
        return None
    step, rest = divmod(second.offset - first.offset, size)
    if rest or step < 1:
        return None
    second_size = second.region.stops[dim] - second.region.starts[dim]
    if (size > 1 and first.strides[dim] != step) or (second_size > 1 and second.strides[dim] != step):
        return None
    region = first.region.with_dim(dim, first.region.starts[dim], second.region.stops[dim])
    strides = (*first.strides[:dim], step, *first.strides[dim + 1 :])
    return Holding(first.tensor, region, first.param, first.offset, strides)


def _check_sizes(subject: str, name: str, shape: tuple[int, ...]) -> None:
    if not name:
        raise PlanError(f"{subject}: a name must not be empty")
    if any(size < 0 for size in shape):
        raise PlanError(f"{subject}: shape {shape} has a negative size")


def _repeated(names: Iterable[str]) -> tuple[str, ...]:
    seen: set[str] = set()
    twice = [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
    return tuple(twice)


def _body_problems(manifest: RankManifest) -> Iterable[str]:
    yield from (
        f"tensor {name!r} is listed twice" for name in _repeated(spec.name for spec in manifest.tensors)
    )
    yield from (
        f"param {name!r} is listed twice" for name in _repeated(spec.name for spec in manifest.params)
    )
    tensors = {spec.name: spec for spec in manifest.tensors}
    params = {spec.name: spec for spec in manifest.params}
    for reason in manifest.misc:
        if reason.tensor not in tensors:
            yield f"misc tensor {reason.tensor!r} is not among the tensors; add its TensorSpec"
    for holding in manifest.holdings:
        fault = _holding_fault(holding, tensors, params, manifest.side)
        if fault is not None:
            yield f"holding of {holding.tensor!r} {holding.region} in param {holding.param!r}: {fault}"


def _holding_fault(
    holding: Holding, tensors: dict[str, TensorSpec], params: dict[str, ParamSpec], side: str
) -> str | None:
    tensor, param = tensors.get(holding.tensor), params.get(holding.param)
    if tensor is None:
        return "its tensor is not among the tensors; add a TensorSpec"
    if param is None:
        return "its param is not among the params; add a ParamSpec"
    stops = holding.region.stops
    if len(stops) != len(tensor.shape) or any(map(gt, stops, tensor.shape)):
        return f"the region does not fit the tensor's shape {tensor.shape}"
    if holding.region.is_empty:
        return None
    if holding.last_element >= param.num_elements:
        return f"it reaches flat element {holding.last_element}, the param has {param.num_elements}"
    if param.dtype != tensor.dtype:
        return f"the tensor says dtype {tensor.dtype} and the param {param.dtype}; one side stores one dtype"
    if side == "gen" and _aliases(holding):
        return f"strides {holding.strides} write one element of the param more than once"
    return None


def _aliases(holding: Holding) -> bool:
    """True if two elements of the box may share memory: sorted by stride, each must step over all smaller
    dims."""
    sizes = zip(holding.strides, holding.region.shape, strict=True)
    steps = sorted((stride, size) for stride, size in sizes if size > 1)
    reach = 0
    for stride, size in steps:
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _rank_problems(manifest: Manifest) -> Iterable[str]:
    for position, rank in enumerate(manifest.ranks):
        if rank.side != manifest.side:
            yield f"rank {rank.rank} is of side {rank.side!r} in a manifest of side {manifest.side!r}"
        if rank.rank != position:
            last = len(manifest.ranks) - 1
            yield f"position {position} holds rank {rank.rank}; ranks must be 0..{last} in order"


def _shape_problems(manifest: Manifest) -> Iterable[str]:
    known: dict[str, tuple[TensorSpec, int]] = {}
    seen: set[int] = set()
    for rank in manifest.ranks:
        if id(rank.tensors) not in seen:
            seen.add(id(rank.tensors))
            for spec in rank.tensors:
                first, first_rank = known.setdefault(spec.name, (spec, rank.rank))
                if first.shape != spec.shape or first.dtype != spec.dtype:
                    yield (
                        f"tensor {spec.name!r} is {first.dtype}{list(first.shape)} on rank {first_rank}"
                        f" and {spec.dtype}{list(spec.shape)} on rank {rank.rank}"
                    )

"""What every generator rank should hold, from full tensors: independent of plan, routes and trainers' holdings.

The trainers export by Bridge's own gathers; each generator rank's share is cut out by its manifest and digested in the
dtype that the engine stores. Comparing this with an audit checks the whole refit path, lowering included.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from refit.plan import Manifest, Region, TensorSpec
from refit.plan.naming import canonical
from refit.plan.region import uncovered
from refit.transfer.digest import MASK, digest

type Shares = dict[str, tuple[TensorSpec, dict[int, tuple[Region, ...]]]]
"""Tensor -> its spec on the generators, and by gen rank disjoint regions that cover what the rank holds.

Where a rank's loader makes something of a tensor, so that it holds no part of it as such, the region is all of it."""


def shares_of(gen: Manifest) -> Shares:
    """Every tensor and who holds which part of it; an element that a rank holds twice counts once."""
    shares: Shares = {}
    for rank in gen.ranks:
        specs = {spec.name: spec for spec in rank.tensors}
        for holding in rank.holdings:
            _, by_rank = shares.setdefault(holding.tensor, (specs[holding.tensor], {}))
            by_rank[rank.rank] = _joined(by_rank.get(rank.rank, ()), holding.region)
        for reason in rank.misc:
            spec, by_rank = shares.setdefault(reason.tensor, (specs[reason.tensor], {}))
            by_rank[rank.rank] = (Region.whole(spec.shape),)
    return shares


def digests_of(
    exported: Iterable[tuple[str, torch.Tensor]], shares: Shares, first_gen_rank: int
) -> dict[str, dict[str, str]]:
    """{tensor: {joint rank: hex digest}} for every generator rank that holds a part of an exported tensor.

    `exported` gives full HF tensors by name; experts come one by one and add up to their stacked tensor.
    """
    sums: dict[str, dict[int, int]] = {}
    for name, tensor in exported:
        canonical_name, expert = canonical(name)
        if canonical_name not in shares:
            continue  # no generator holds it, for example an lm_head that is tied
        spec, by_rank = shares[canonical_name]
        wire = tensor.detach().to(getattr(torch, spec.dtype))
        totals = {  # ranks of one place in their engines hold the same
            regions: sum(_part(wire, region, expert, spec) for region in regions)
            for regions in set(by_rank.values())
        }
        for gen_rank, regions in by_rank.items():
            parts = sums.setdefault(canonical_name, {})
            parts[gen_rank] = (parts.get(gen_rank, 0) + totals[regions]) & MASK
    return {
        name: {str(first_gen_rank + gen_rank): f"{total:016x}" for gen_rank, total in parts.items()}
        for name, parts in sums.items()
    }


def box_digests(
    exported: Iterable[tuple[str, torch.Tensor]],
    boxes: Sequence[tuple[str, str, Region]],
    specs: Mapping[str, TensorSpec],
) -> list[str]:
    """Hex digests of boxes (canonical tensor, dtype to be cast to, region) of full HF tensors, in order."""
    wanted: dict[str, list[int]] = {}
    for number, (name, _, _) in enumerate(boxes):
        wanted.setdefault(name, []).append(number)
    totals = [0] * len(boxes)
    for name, tensor in exported:
        canonical_name, expert = canonical(name)
        for number in wanted.get(canonical_name, ()):
            _, dtype, region = boxes[number]
            wire = tensor.detach().to(getattr(torch, dtype))
            totals[number] += _part(wire, region, expert, specs[canonical_name])
    return [f"{total & MASK:016x}" for total in totals]


def box_of(exported: Iterable[tuple[str, torch.Tensor]], dtype: str, region: Region) -> torch.Tensor:
    """A box of one tensor from its full export, experts one by one; the export is taken to its end."""
    parts = []
    for name, tensor in exported:
        _, expert = canonical(name)
        inner = region if expert is None else Region(region.starts[1:], region.stops[1:])
        if expert is None or region.starts[0] <= expert < region.stops[0]:
            parts.append(tensor.detach()[inner.slices()].to(getattr(torch, dtype), copy=True))
    return torch.stack(parts) if parts[0].ndim < len(region.starts) else parts[0].contiguous()


def _part(tensor: torch.Tensor, region: Region, expert: int | None, spec: TensorSpec) -> int:
    """The digest of what a full tensor, or one expert of a stacked one, has inside `region`."""
    if expert is None:
        return digest(tensor[region.slices()], region, spec.shape)
    whole = Region((expert, *(0 for _ in tensor.shape)), (expert + 1, *tensor.shape))
    inside = region.intersect(whole)
    if inside is None:
        return 0
    local = Region((0, *inside.starts[1:]), (1, *inside.stops[1:]))
    return digest(tensor.unsqueeze(0)[local.slices()], inside, spec.shape)


def _joined(regions: tuple[Region, ...], new: Region) -> tuple[Region, ...]:
    """Add what of `new` is not covered yet."""
    return (*regions, *uncovered(new, regions))

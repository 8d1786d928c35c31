"""The proof: every wanted element arrives exactly once, from a rank that has it.

It reads the finished flows and the manifests, not the matching that made them, and collects every fault. The
layers of the argument, each checked once per distinct value:

1. a copy's boxes are a partition of the elements of its holdings (per form of holdings);
2. all tensors of a flow have the layouts of its first tensor, so what holds for one holds for each;
3. the flows towards one layout entry partition the entry's box, and every flow belongs to exactly one entry;
4. the rows of a flow are dealt to its holders without gap or overlap, and each of them holds the flow's box.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from refit.plan.classify import BULK, Classified
from refit.plan.flows import Flow
from refit.plan.match import BoxIndex
from refit.plan.region import Region, cover_fault, first_overlap, uncovered
from refit.plan.sides import Entry, Layout, Side


def cover_faults(
    tensors: Mapping[str, Classified], flows: Sequence[Flow], train: Side, gen: Side
) -> Iterator[str]:
    """Every reason why the flows are not an exact cover; nothing if they are."""
    for side in (train, gen):
        yield from _copy_faults(side)
    yield from _membership_faults(tensors, flows, train, gen)
    yield from _entry_faults(flows, gen)
    yield from _source_faults(flows, train)


def _copy_faults(side: Side) -> Iterator[str]:
    distinct: dict[int, tuple[int, str]] = {}
    for body, table in enumerate(side.held):
        for tensor, (form, _) in table.items():
            if form.number not in distinct:
                distinct[form.number] = (body, tensor)
    for body, tensor in distinct.values():
        for copy in side.copies(body, tensor):
            fault = _copy_fault(copy.boxes, [holding.region for holding in copy.holdings], side)
            if fault is not None:
                yield f"{side.manifest.side} rank {side.body_ranks[body][0]}, tensor {tensor!r}: {fault}"


def _copy_fault(boxes: Sequence[Region], held: Sequence[Region], side: Side) -> str | None:
    if first_overlap(boxes) is not None:
        return "its boxes overlap"
    if side.manifest.side == "gen" and first_overlap(held) is not None:
        return "its holdings overlap inside one copy"
    outside = [part for region in held for part in uncovered(region, boxes)]
    if outside:
        return f"holding part {outside[0]} is in no box"
    missing = [part for box in boxes for part in uncovered(box, held)]
    return f"box part {missing[0]} is in no holding" if missing else None


def _membership_faults(
    tensors: Mapping[str, Classified], flows: Sequence[Flow], train: Side, gen: Side
) -> Iterator[str]:
    group_of: dict[str, tuple[str, ...]] = {}
    for group in {id(flow.tensors): flow.tensors for flow in flows}.values():
        for name in group:
            if group_of.setdefault(name, group) != group:
                yield f"tensor {name!r} belongs to two groups of flows"
    for name, group in group_of.items():
        for side in (train, gen):
            if side.layouts[name] is not side.layouts[group[0]]:
                yield f"tensor {name!r} is planned like {group[0]!r} but {side.manifest.side} layouts differ"
    for tensor in tensors.values():
        wanted = any(not entry.box.is_empty for entry in _entries(gen.layouts.get(tensor.name)))
        if (tensor.kind == BULK and wanted) != (tensor.name in group_of):
            yield f"tensor {tensor.name!r} is {tensor.kind}; its flows say otherwise"


def _entries(layout: Layout | None) -> Sequence[Entry]:
    return () if layout is None else layout.entries


def _entry_faults(flows: Sequence[Flow], gen: Side) -> Iterator[str]:
    arriving: dict[str, dict[tuple[int, tuple[int, ...]], list[Flow]]] = {}
    for flow in flows:
        arriving.setdefault(flow.tensors[0], {}).setdefault((flow.copy, flow.receivers), []).append(flow)
    for tensor, by_receivers in arriving.items():
        num_used = 0
        for entry in gen.layouts[tensor].entries:
            near = by_receivers.get((entry.copy, entry.ranks), [])
            regions = [flow.region for flow in near if entry.box.contains(flow.region)]
            num_used += len(regions)
            fault = cover_fault(entry.box, regions)
            if fault is not None:
                yield f"tensor {tensor!r} on gen rank {entry.ranks[0]}: {fault}"
        num_flows = sum(map(len, by_receivers.values()))
        if num_used != num_flows:
            yield f"tensor {tensor!r}: {num_flows - num_used} of {num_flows} flows lead to no wanted box"


def _source_faults(flows: Sequence[Flow], train: Side) -> Iterator[str]:
    indexes: dict[int, BoxIndex] = {}
    for flow in flows:
        name = f"flow {flow.index} of {flow.tensors[0]!r}"
        yield from (f"{name}: {fault}" for fault in _row_faults(flow))
        layout = train.layouts[flow.tensors[0]]
        index = indexes.get(layout.index)
        if index is None:
            index = indexes[layout.index] = BoxIndex.of([entry.box for entry in layout.entries])
        ranks = [
            layout.entries[position].ranks
            for position in index.near(flow.region)
            if index.boxes[position].contains(flow.region)
        ]
        if flow.holders not in ranks:
            having = {rank for some in ranks for rank in some}
            for holder in flow.holders:
                if holder not in having:
                    yield f"{name}: train rank {holder} does not hold {flow.region}"


def _row_faults(flow: Flow) -> Iterator[str]:
    line = flow.num_rows * len(flow.tensors) * len(flow.receivers)
    rising = all(low <= high for low, high in pairwise(flow.cuts))
    if flow.cuts[0] != 0 or flow.cuts[-1] != line or len(flow.cuts) != len(flow.holders) + 1 or not rising:
        yield f"rows {flow.cuts} do not deal out 0..{line} once"
    if flow.num_rows != (flow.region.shape[flow.row_dim] if flow.region.starts else 1):
        yield f"{flow.num_rows} rows do not match {flow.region}"

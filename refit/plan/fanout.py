"""Intra-node fan-out: bytes that several generators of one node want cross the network once and spread over NVLink.

A second plan over a proven direct one. For each flow, the receivers of one node are a *group*. In the first hop each
member takes a stretch of the group's rows from the trainers (it *enters* there); in the second hop every member sends
its stretch to the other members. Groups of one have no second hop. It is a value like the plan: deterministic, proven,
priced and simulated. The executor of `refit.transfer` runs direct plans only; see docs/planner.md.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from refit.plan.balance import cut_points, nic_weights, share_out
from refit.plan.cost import Cost, Link, Topology, busiest_link, capacity, loads, lower_bound, predicted_s
from refit.plan.errors import PlanError
from refit.plan.flows import Flow
from refit.plan.plan import Plan
from refit.plan.schedule import StageTotals


@dataclass(frozen=True, slots=True)
class FanFlow:
    """A flow in two hops. `line_rows` rows (all tensors of the flow) enter each group once.

    `entry_cuts[g]`: member `i` of group `g` enters rows `[cuts[i], cuts[i + 1])` of the group's line.
    `holder_cuts`: holder `i` sends rows `[cuts[i], cuts[i + 1])` of all groups' lines, one after the other.
    """

    flow: Flow
    groups: tuple[tuple[int, ...], ...]
    entry_cuts: tuple[tuple[int, ...], ...]
    holder_cuts: tuple[int, ...]

    @property
    def line_rows(self) -> int:
        return len(self.flow.tensors) * self.flow.num_rows

    def stretches(self) -> Iterator[tuple[int, int, int, int]]:
        """First hop as (holder, receiver, first, stop): rows of a group's line, group by group."""
        for number, (group, cuts) in enumerate(zip(self.groups, self.entry_cuts, strict=True)):
            base = number * self.line_rows
            for receiver, (first, stop) in zip(group, pairwise(cuts), strict=True):
                position = bisect_right(self.holder_cuts, base + first) - 1
                while first < stop:
                    end = min(stop, self.holder_cuts[position + 1] - base)
                    if first < end:
                        yield self.flow.holders[position], receiver, first, end
                    first, position = end, position + 1


@dataclass(frozen=True, slots=True, eq=False)
class FanOut:
    """All flows of a plan in two hops. `totals` are the first hop's, by stage.

    `relayed_out` and `relayed_in` are bytes per (stage, gen rank) of the second hop.
    """

    plan: Plan
    topology: Topology
    flows: tuple[FanFlow, ...]
    totals: tuple[StageTotals, ...]
    relayed_out: Mapping[tuple[int, int], int]
    relayed_in: Mapping[tuple[int, int], int]

    def faults(self) -> Iterator[str]:
        """Why this is no exact cover, given that the direct plan is one; nothing if it is.

        Each receiver is in one group, on one node. The lines of all groups are dealt to the holders, which have the
        flow's box (the direct plan's proof), and each line to the members: so a member gets each row once, in the first
        hop or from the one member that entered it.
        """
        if tuple(one.flow for one in self.flows) != self.plan.flows:
            yield "the flows are not those of the plan"
        for one in self.flows:
            name = f"flow {one.flow.index} of {one.flow.tensors[0]!r}"
            if sorted(rank for group in one.groups for rank in group) != sorted(one.flow.receivers):
                yield f"{name}: groups {one.groups} are not its receivers {one.flow.receivers}, each once"
            for group in one.groups:
                if len({rank // self.topology.ranks_per_node for rank in group}) != 1:
                    yield f"{name}: group {group} is not on one node"
            deals = [(one.holder_cuts, len(one.flow.holders), len(one.groups) * one.line_rows)]
            deals += [(c, len(g), one.line_rows) for c, g in zip(one.entry_cuts, one.groups, strict=True)]
            for cuts, num_ranks, num_rows in deals:
                rising = all(low <= high for low, high in pairwise(cuts))
                if (cuts[0], cuts[-1], len(cuts)) != (0, num_rows, num_ranks + 1) or not rising:
                    yield f"{name}: rows {cuts} do not deal out 0..{num_rows} once to {num_ranks} ranks"

    def require_exact_cover(self) -> None:
        """Raise PlanError with every fault."""
        if found := tuple(self.faults()):
            raise PlanError.collected("the fan-out is not an exact cover", found)

    @property
    def nvlink_s(self) -> float:
        """Seconds of the second hop on its busiest rank and direction, all stages."""
        busiest = 0
        for relayed in (self.relayed_out, self.relayed_in):
            by_rank: dict[int, int] = {}
            for (_, rank), num_bytes in relayed.items():
                by_rank[rank] = by_rank.get(rank, 0) + num_bytes
            busiest = max(busiest, *by_rank.values(), 0)
        return busiest / self.topology.nvlink_bytes_per_s

    def cost(self, num_streams: int | None = None) -> Cost:
        """NIC links, their bound over all plans that relay inside generator nodes only, and predicted seconds.

        The second hop of a stage starts when its first hop is done; the prediction does not let the two overlap.
        """
        plan, topology = self.plan, self.topology
        sent, received = loads(self.totals, plan.num_train, plan.num_gen)
        demands: dict[tuple[int, ...], int] = {}
        nodes: dict[int, int] = {}
        for one in self.flows:
            num_bytes = one.flow.bytes_per_receiver
            demands[one.flow.holders] = demands.get(one.flow.holders, 0) + num_bytes * len(one.groups)
            for group in one.groups:
                node = group[0] // topology.ranks_per_node
                nodes[node] = nodes.get(node, 0) + num_bytes
        into = max((self._into(node, total) for node, total in nodes.items()), key=lambda link: link.seconds)
        bound_s, bound_link = lower_bound(sent, demands, into, topology)
        busiest = busiest_link(sent, received, topology)
        first_hop_s = predicted_s(self.totals, plan.options, topology, num_streams)
        second_hop_s = self.nvlink_s + len(self.totals) * topology.latency_s
        return Cost(sent, received, busiest, bound_s, bound_link, first_hop_s + second_hop_s)

    def pairs(self) -> dict[tuple[int, int], int]:
        """First-hop bytes of every (train rank, gen rank) pair."""
        found: dict[tuple[int, int], int] = {}
        for one in self.flows:
            for holder, receiver, first, stop in one.stretches():
                key = (holder, receiver)
                found[key] = found.get(key, 0) + (stop - first) * one.flow.row_bytes
        return found

    def _into(self, node: int, num_bytes: int) -> Link:
        first = node * self.topology.ranks_per_node
        ranks = range(first, min(first + self.topology.ranks_per_node, self.plan.num_gen))
        return Link(
            f"into gen node {node}, each byte once", num_bytes, num_bytes / capacity(ranks, self.topology)
        )


def fan_out(plan: Plan, topology: Topology) -> FanOut | None:
    """The two-hop form of a plan, proven; None where no two generators of a node want the same bytes."""
    grouped = [_groups(flow.receivers, topology.ranks_per_node) for flow in plan.flows]
    if all(len(group) == 1 for groups in grouped for group in groups):
        return None
    by_holders: dict[tuple[int, ...], int] = {}
    by_group: dict[tuple[int, ...], int] = {}
    for flow, groups in zip(plan.flows, grouped, strict=True):
        num_bytes = flow.bytes_per_receiver
        by_holders[flow.holders] = by_holders.get(flow.holders, 0) + num_bytes * len(groups)
        for group in groups:
            by_group[group] = by_group.get(group, 0) + num_bytes
    weights = nic_weights(plan.num_train, topology.ranks_per_node, topology.nics_per_node)
    sending, entering = share_out(by_holders, weights), share_out(by_group)
    flows = tuple(
        _fan_flow(flow, groups, sending, entering) for flow, groups in zip(plan.flows, grouped, strict=True)
    )
    totals, out, into = _totals(plan, flows)
    result = FanOut(plan, topology, flows, totals, out, into)
    result.require_exact_cover()
    return result


def _groups(receivers: Sequence[int], ranks_per_node: int) -> tuple[tuple[int, ...], ...]:
    nodes: dict[int, list[int]] = {}
    for rank in receivers:
        nodes.setdefault(rank // ranks_per_node, []).append(rank)
    return tuple(map(tuple, nodes.values()))


def _fan_flow(
    flow: Flow,
    groups: tuple[tuple[int, ...], ...],
    sending: Mapping[tuple[int, ...], Sequence[int]],
    entering: Mapping[tuple[int, ...], Sequence[int]],
) -> FanFlow:
    line = len(flow.tensors) * flow.num_rows
    return FanFlow(
        flow,
        groups,
        tuple(cut_points(entering[group], line) for group in groups),
        cut_points(sending[flow.holders], line * len(groups)),
    )


def _totals(
    plan: Plan, flows: Sequence[FanFlow]
) -> tuple[tuple[StageTotals, ...], dict[tuple[int, int], int], dict[tuple[int, int], int]]:
    """First hop by stage; second hop out of and into each (stage, gen rank), in the latest stage of the holders."""
    stage_of = [rank.stage for rank in plan.train.manifest.ranks]
    sent: dict[int, dict[int, int]] = {totals.stage: {} for totals in plan.totals}
    received: dict[int, dict[int, int]] = {totals.stage: {} for totals in plan.totals}
    out: dict[tuple[int, int], int] = {}
    into: dict[tuple[int, int], int] = {}
    for one in flows:
        row_bytes, last_stage = one.flow.row_bytes, max(stage_of[holder] for holder in one.flow.holders)
        for holder, receiver, first, stop in one.stretches():
            num_bytes, stage = (stop - first) * row_bytes, stage_of[holder]
            sent[stage][holder] = sent[stage].get(holder, 0) + num_bytes
            received[stage][receiver] = received[stage].get(receiver, 0) + num_bytes
        for group, cuts in zip(one.groups, one.entry_cuts, strict=True):
            for rank, (low, high) in zip(group, pairwise(cuts), strict=True):
                key = (last_stage, rank)
                out[key] = out.get(key, 0) + (high - low) * row_bytes * (len(group) - 1)
                into[key] = into.get(key, 0) + (one.line_rows - high + low) * row_bytes
    totals = tuple(
        StageTotals(one.stage, one.train_ranks, one.num_gen, sent[one.stage], received[one.stage])
        for one in plan.totals
    )
    return totals, out, into

"""The plan: a pure, deterministic, proven value made from two manifests."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from refit.plan.classify import BULK, MISC, Classified, classify
from refit.plan.collector import collector_paused
from refit.plan.errors import PlanError
from refit.plan.flows import Flow, Stripe, build_flows
from refit.plan.manifest import Manifest
from refit.plan.match import Matcher
from refit.plan.naming import hf_names
from refit.plan.options import PlanOptions
from refit.plan.proof import cover_faults
from refit.plan.rank_plan import RankPlan
from refit.plan.region import Region
from refit.plan.schedule import Load, Pieces, StageTotals, Stream, stage_plan
from refit.plan.sides import Side

PLAN_SCHEMA = 2


@dataclass(frozen=True, slots=True)
class Route:
    """One planned copy: a box of a tensor from one joint rank to another, in one trainer stage."""

    tensor: str
    region: Region
    src_rank: int
    dst_rank: int
    stage: int


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Who sends what to whom. Joint ranks: trainers first, then generators.

    `tensors` are all tensors of both sides with their class, in plan order; `stages` are the trainers'
    pipeline stages; `digest` (sha256, hex) is equal wherever inputs and options are equal.
    """

    options: PlanOptions
    train: Side = field(repr=False)
    gen: Side = field(repr=False)
    tensors: Mapping[str, Classified] = field(repr=False)
    flows: tuple[Flow, ...] = field(repr=False)
    totals: tuple[StageTotals, ...] = field(repr=False)
    flows_of_holders: Mapping[tuple[int, ...], tuple[int, ...]] = field(repr=False)
    flows_of_receivers: Mapping[tuple[int, ...], tuple[int, ...]] = field(repr=False)
    matcher: Matcher = field(repr=False)
    digest: str

    @property
    def num_train(self) -> int:
        return len(self.train.manifest.ranks)

    @property
    def num_gen(self) -> int:
        return len(self.gen.manifest.ranks)

    @property
    def stages(self) -> tuple[int, ...]:
        return tuple(totals.stage for totals in self.totals)

    @property
    def bulk_bytes(self) -> int:
        """Bytes of the bulk tensors on the wire format, each element counted once."""
        return sum(tensor.num_bytes for tensor in self.tensors.values() if tensor.kind == BULK)

    @property
    def misc_bytes(self) -> int:
        """Bytes of the misc tensors, each element counted once."""
        return sum(tensor.num_bytes for tensor in self.tensors.values() if tensor.kind == MISC)

    @property
    def misc_names(self) -> tuple[str, ...]:
        """HF names of the misc tensors in plan order, experts spelled out."""
        misc = (tensor for tensor in self.tensors.values() if tensor.kind == MISC)
        return tuple(name for tensor in misc for name in hf_names(tensor.name, tensor.shape))

    @property
    def num_routes(self) -> int:
        """How many routes `routes` yields, without listing them."""
        return sum(flow.num_stripes for flow in self.flows)

    def routes(self) -> Iterator[Route]:
        """Every planned copy, flow by flow. There may be millions; this is a generator."""
        ranks = self.train.manifest.ranks
        for flow in self.flows:
            for position in range(len(flow.holders)):
                for stripe in flow.sent_by(position):
                    region = flow.part(stripe.first_row, stripe.stop_row)
                    stage = ranks[stripe.holder].stage
                    yield Route(stripe.tensor, region, stripe.holder, self.num_train + stripe.receiver, stage)

    def require_exact_cover(self) -> None:
        """Raise PlanError with every fault unless each wanted element arrives exactly once from a rank that
        has it."""
        faults = tuple(cover_faults(self.tensors, self.flows, self.train, self.gen))
        if faults:
            raise PlanError.collected("the plan is not an exact cover", faults)

    @collector_paused()
    def rank_plan(self, rank: int) -> RankPlan:
        """The share of one joint rank. Cost is that share alone. Raises PlanError for a rank outside the
        plan."""
        if not 0 <= rank < self.num_train + self.num_gen:
            last = self.num_train + self.num_gen - 1
            raise PlanError(f"rank {rank} is not in this plan; joint ranks are 0..{last}")
        mine = "train" if rank < self.num_train else "gen"
        own = rank if mine == "train" else rank - self.num_train
        streams = self._streams(mine, own)
        stages = [
            stage_plan(totals, streams.get(totals.stage, ()), mine, self.num_train, self.options)
            for totals in self.totals
            if mine == "gen" or rank in totals.train_ranks
        ]
        return RankPlan(rank, tuple(stages))

    def _streams(self, mine: str, own: int) -> dict[int, Sequence[Stream]]:
        """This rank's streams per stage, each stage in order of the peer."""
        pieces = Pieces(self.train, self.gen)
        ranks = self.train.manifest.ranks
        found: dict[int, dict[int, Stream]] = {}
        for flow, stripe in self._stripes(mine, own):
            cut, source, target = pieces.of(flow, stripe)
            peer = stripe.receiver if mine == "train" else stripe.holder
            streams = found.setdefault(ranks[stripe.holder].stage, {})
            stream = streams.get(peer)
            if stream is None:
                stream = streams[peer] = Stream(stripe.holder, stripe.receiver)
            holdings = source.holdings if mine == "train" else target.holdings
            stream.loads.append(Load(stripe.tensor, flow.wire_dtype, cut, holdings))
            stream.num_bytes += (stripe.stop_row - stripe.first_row) * flow.row_bytes
        return {stage: [streams[peer] for peer in sorted(streams)] for stage, streams in found.items()}

    def _stripes(self, mine: str, own: int) -> Iterator[tuple[Flow, Stripe]]:
        """This rank's stripes in flow order, which is the same on both ends of every pair."""
        by_ranks = self.flows_of_holders if mine == "train" else self.flows_of_receivers
        numbers = [number for ranks, flows in by_ranks.items() if own in ranks for number in flows]
        for number in sorted(numbers):
            flow = self.flows[number]
            if mine == "train":
                stripes = flow.sent_by(flow.holders.index(own))
            else:
                stripes = flow.received_by(flow.receivers.index(own))
            for stripe in stripes:
                yield flow, stripe


@collector_paused()
def build_plan(
    train: Manifest, gen: Manifest, options: PlanOptions | None = None, matcher: Matcher | None = None
) -> Plan:
    """Classify, match, balance, prove. Raises PlanError with all contradictions found.

    `matcher` carries matches over from an earlier plan (`plan.matcher`).
    """
    _check_sides(train, gen)
    options = PlanOptions() if options is None else options
    matcher = Matcher() if matcher is None else matcher
    return _planned(Side.of(train), Side.of(gen), options, matcher)


@collector_paused()
def replan(plan: Plan, gen: Manifest) -> Plan:
    """The plan of the same trainers and options for other generators; equal to a fresh one in every value.

    Reused: the index of the trainers, every match of boxes that occurred before. Made anew: balance, proof, digest.
    """
    _check_sides(plan.train.manifest, gen)
    return _planned(plan.train, Side.of(gen), plan.options, plan.matcher)


def _check_sides(train: Manifest, gen: Manifest) -> None:
    if train.side != "train" or gen.side != "gen":
        raise PlanError(f"a plan wants (train, gen) manifests, got ({train.side}, {gen.side})")


def _planned(train: Side, gen: Side, options: PlanOptions, matcher: Matcher) -> Plan:
    classes = classify(train, gen, options, matcher)
    flows = build_flows(classes, train, gen, options)
    plan = Plan(
        options=options,
        train=train,
        gen=gen,
        tensors=classes.tensors,
        flows=flows,
        totals=_stage_totals(flows, train.manifest, len(gen.manifest.ranks)),
        flows_of_holders=_by_ranks((flow.holders, flow.index) for flow in flows),
        flows_of_receivers=_by_ranks((flow.receivers, flow.index) for flow in flows),
        matcher=matcher,
        digest=_digest(options, train, gen, classes.tensors, flows),
    )
    plan.require_exact_cover()
    return plan


def _by_ranks(pairs: Iterator[tuple[tuple[int, ...], int]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    found: dict[tuple[int, ...], list[int]] = {}
    for ranks, index in pairs:
        found.setdefault(ranks, []).append(index)
    return {ranks: tuple(indexes) for ranks, indexes in found.items()}


def _stage_totals(flows: Sequence[Flow], train: Manifest, num_gen: int) -> tuple[StageTotals, ...]:
    stages = sorted({rank.stage for rank in train.ranks})
    sent: dict[int, dict[int, int]] = {stage: {} for stage in stages}
    received: dict[int, dict[int, int]] = {stage: {} for stage in stages}
    together: dict[tuple[int, tuple[int, ...]], int] = {}
    stage_of = [rank.stage for rank in train.ranks]
    for flow in flows:
        for position, holder in enumerate(flow.holders):
            bytes_sent = (flow.cuts[position + 1] - flow.cuts[position]) * flow.row_bytes
            stage = stage_of[holder]
            sent[stage][holder] = sent[stage].get(holder, 0) + bytes_sent
        flow_stages = {stage_of[holder] for holder in flow.holders}
        if len(flow_stages) == 1:
            key = (flow_stages.pop(), flow.receivers)
            together[key] = together.get(key, 0) + flow.bytes_per_receiver
        else:
            _add_mixed(flow, stage_of, received)
    for (stage, receivers), num_bytes in together.items():
        for receiver in receivers:
            received[stage][receiver] = received[stage].get(receiver, 0) + num_bytes
    return tuple(
        StageTotals(
            stage,
            tuple(rank.rank for rank in train.ranks if rank.stage == stage),
            num_gen,
            sent[stage],
            received[stage],
        )
        for stage in stages
    )


def _add_mixed(flow: Flow, stage_of: Sequence[int], received: dict[int, dict[int, int]]) -> None:
    """Receive totals of a flow whose holders are in several stages (tied embeddings)."""
    for position, holder in enumerate(flow.holders):
        totals = received[stage_of[holder]]
        for stripe in flow.sent_by(position):
            num_bytes = (stripe.stop_row - stripe.first_row) * flow.row_bytes
            totals[stripe.receiver] = totals.get(stripe.receiver, 0) + num_bytes


def _digest(
    options: PlanOptions, train: Side, gen: Side, tensors: Mapping[str, Classified], flows: Sequence[Flow]
) -> str:
    """sha256 over all that decides what any rank does. Text forms of ints and strings only: no hash order,
    no floats."""
    state = hashlib.sha256(f"refit plan {PLAN_SCHEMA}\n{options!r}\n{train.digest}\n{gen.digest}\n".encode())
    state.update(_text([(one.name, one.shape, one.dtype, one.kind) for one in tensors.values()]))
    state.update(
        _text(
            [
                (
                    flow.tensors[0],
                    len(flow.tensors),
                    flow.region.starts,
                    flow.region.stops,
                    flow.copy,
                    flow.cuts,
                )
                for flow in flows
            ]
        )
    )
    return state.hexdigest()


def _text(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()

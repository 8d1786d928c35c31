"""The record of one refit: where its seconds and bytes went, rank by rank. Progress, TensorBoard, Prometheus and the
report page read from it.

Phases of the driver follow each other and add up to `total_s`: `pause` (until nothing samples any more; 0.0 where the
loop samples nothing during a refit), `stage` (until every rank has reported), `verify` (digests compared), `commit`
(until every engine serves the version, or has dropped it). Phases of the ranks lie inside: `pack`, `wire`, `unpack`,
`digest` and `misc` in `stage`, `finalize` (vLLM's own processing) in `commit`; of each the slowest rank counts. `halt`
is the part of `commit` in which a replica samples no token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refit.plan import MISC, Plan
from refit.plan.cost import Topology, cost_of
from refit.transfer.endpoint import name_of
from refit.transfer.protocol import FinishReport
from refit.transfer.report import DIGEST, PACK, UNPACK, WIRE, Span

DRIVER_PHASES = ("pause", "stage", "verify", "commit")
OWN_PHASES = (PACK, UNPACK, DIGEST)
BULK_PHASES = (*OWN_PHASES, WIRE)
FINALIZE, NO_STAGE = "finalize", -1


@dataclass(frozen=True, slots=True)
class RankRecord:
    """One rank's share. `late_s` is how much later than the first rank it began; `spans` count from that first rank.

    `bytes_sent` and `bytes_received` are those of the plan, `wire_bytes_sent` and `wire_bytes_received` what had to
    travel: with deltas fewer. `staged_bytes` is the memory of the new version beside the old one (0 on trainers).
    `bytes_per_s` is what went over the busier direction of its network while it moved bulk, packing and waiting
    included (None if it moved none), and `line_share` that over the line rate, where the configuration says what it is.
    """

    rank: int
    name: str
    late_s: float
    bytes_sent: int
    bytes_received: int
    wire_bytes_sent: int
    wire_bytes_received: int
    misc_bytes: int
    seconds: Mapping[str, float]
    peak_extra_bytes: int
    staged_bytes: int
    bytes_per_s: float | None
    line_share: float | None
    spans: tuple[Span, ...]

    @property
    def own_s(self) -> float:
        """What the others had to wait for: a late start and its own work. Time on the wire is mostly waiting itself."""
        return self.late_s + sum(self.seconds.get(phase, 0.0) for phase in OWN_PHASES)


@dataclass(frozen=True, slots=True)
class RefitRecord:
    """One attempt to bring a version to all replicas.

    `bulk_bytes` and `misc_bytes` count each element of the model once, `wire_bytes` what all trainers sent point to
    point, and `delta_share` is that over what they would have sent without deltas (None where deltas are off).
    `bound_ratio` is the time of the plan's busiest link over that of the best direct plan. `line_share` is the share of
    the line rate that the busiest rank's network had, from the first rank's start of bulk to the last one's end; None
    where no line rate is configured. `straggler` is the rank with the most of its own to do, `straggler_s` by how much
    more than the median rank. Digests are compared per tensor and generator rank. `reason` is empty when `committed`.
    `replicas` and `incidents` say what each replica serves afterwards and what went wrong on the way.
    """

    version: int
    attempt: int
    plan: str
    started_s: float
    seconds: Mapping[str, float]
    total_s: float
    bulk_bytes: int
    misc_bytes: int
    bulk_share: float
    wire_bytes: int
    bound_ratio: float
    peak_extra_bytes: int
    staged_bytes: int
    straggler: str
    straggler_s: float
    digests_compared: int
    digests_differing: int
    committed: bool
    reason: str
    line_share: float | None = None
    delta_share: float | None = None
    replicas: Mapping[str, str] = field(default_factory=dict)
    incidents: tuple[str, ...] = ()
    ranks: tuple[RankRecord, ...] = ()

    @classmethod
    def failed(cls, plan: PlanRecord, version: int, reason: str, total_s: float) -> RefitRecord:
        """An attempt that a lost rank or a time-out ended: nothing was compared, and what moved counts for nothing."""
        return cls(
            version=version,
            attempt=0,
            plan=plan.digest,
            started_s=time.time() - total_s,
            seconds={},
            total_s=total_s,
            bulk_bytes=0,
            misc_bytes=0,
            bulk_share=0.0,
            wire_bytes=0,
            bound_ratio=plan.bound_ratio,
            peak_extra_bytes=0,
            staged_bytes=0,
            straggler="",
            straggler_s=0.0,
            digests_compared=0,
            digests_differing=0,
            committed=False,
            reason=reason,
        )

    @property
    def digest_state(self) -> str:
        """In words: "1424 equal" or "3 of 1424 differ"."""
        if self.digests_differing:
            return f"{self.digests_differing} of {self.digests_compared} differ"
        return f"{self.digests_compared} equal"


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """What a plan moves over which link, the same for every refit under it. `links`: (source, destination, bytes).

    `misc`: why tensors go by broadcast, as (reason, number of tensors, the first of them), the most frequent first.
    """

    digest: str
    num_train: int
    num_gen: int
    bulk_bytes: int
    misc_bytes: int
    num_bulk: int
    num_misc: int
    bound_ratio: float
    bound_link: str
    busiest_link: str
    links: tuple[tuple[int, int, int], ...]
    misc: tuple[tuple[str, int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Round:
    """What the coordinator has seen of one attempt. `reports` by joint rank, `finished` by generator rank.

    `line_bytes_per_s` is the line rate of a rank's network in one direction, None if nobody said it. `is_delta`: what
    had not changed was left out.
    """

    version: int
    attempt: int
    reports: Mapping[int, Any]
    finished: Mapping[int, FinishReport]
    num_differing: int
    reason: str
    driver: Mapping[str, float]
    line_bytes_per_s: float | None = None
    is_delta: bool = False
    replicas: Mapping[str, str] = field(default_factory=dict)
    incidents: tuple[str, ...] = ()


def record_plan(plan: Plan) -> PlanRecord:
    """Sum a plan up by link. Cost: one step per route."""
    cost = cost_of(plan, Topology())
    links: dict[tuple[int, int], int] = {}
    for flow in plan.flows:
        for position in range(len(flow.holders)):
            for stripe in flow.sent_by(position):
                link = (stripe.holder, plan.num_train + stripe.receiver)
                links[link] = links.get(link, 0) + (stripe.stop_row - stripe.first_row) * flow.row_bytes
    kinds = [tensor.kind for tensor in plan.tensors.values()]
    return PlanRecord(
        digest=plan.digest,
        num_train=plan.num_train,
        num_gen=plan.num_gen,
        bulk_bytes=plan.bulk_bytes,
        misc_bytes=plan.misc_bytes,
        num_bulk=kinds.count("bulk"),
        num_misc=kinds.count(MISC),
        bound_ratio=cost.bound_ratio,
        bound_link=cost.bound_link,
        busiest_link=cost.busiest.name,
        links=tuple((src, dst, num_bytes) for (src, dst), num_bytes in sorted(links.items())),
        misc=misc_by_reason(plan),
    )


def misc_by_reason(plan: Plan) -> tuple[tuple[str, int, str], ...]:
    """(reason, number of tensors, the first of them by name), the most frequent reason first."""
    names: dict[str, list[str]] = {}
    for name, tensor in sorted(plan.tensors.items()):
        if tensor.kind == MISC:
            names.setdefault(tensor.reason, []).append(name)
    rows = [(reason, len(found), found[0]) for reason, found in names.items()]
    return tuple(sorted(rows, key=lambda row: (-row[1], row[0])))


def record_round(plan: PlanRecord, seen: Round) -> RefitRecord:
    """The record of one attempt whose ranks have all reported."""
    ranks = _rank_records(plan, seen)
    straggler = max(ranks, key=lambda rank: rank.own_s)
    phases = sorted({phase for rank in ranks for phase in rank.seconds})
    slowest = {phase: max(rank.seconds.get(phase, 0.0) for rank in ranks) for phase in phases}
    return RefitRecord(
        version=seen.version,
        attempt=seen.attempt,
        plan=plan.digest,
        started_s=_first_start_s(seen),
        seconds={**slowest, **seen.driver},
        total_s=sum(seen.driver[phase] for phase in DRIVER_PHASES),
        bulk_bytes=plan.bulk_bytes,
        misc_bytes=plan.misc_bytes,
        bulk_share=plan.bulk_bytes / (plan.bulk_bytes + plan.misc_bytes),
        wire_bytes=sum(rank.wire_bytes_sent for rank in ranks),
        bound_ratio=plan.bound_ratio,
        peak_extra_bytes=max(rank.peak_extra_bytes for rank in ranks),
        staged_bytes=max(rank.staged_bytes for rank in ranks),
        straggler=straggler.name,
        straggler_s=straggler.own_s - statistics.median(rank.own_s for rank in ranks),
        digests_compared=_num_compared(plan, seen.reports),
        digests_differing=seen.num_differing,
        committed=not seen.reason,
        reason=seen.reason,
        line_share=_line_share(ranks, seen.line_bytes_per_s),
        delta_share=_delta_share(ranks) if seen.is_delta else None,
        replicas=dict(seen.replicas),
        incidents=seen.incidents,
        ranks=ranks,
    )


def _first_start_s(seen: Round) -> float:
    return min(float(report["started_s"]) for report in seen.reports.values())


def _rank_records(plan: PlanRecord, seen: Round) -> tuple[RankRecord, ...]:
    first_s = _first_start_s(seen)
    return tuple(_rank_record(plan, rank, seen, first_s) for rank in sorted(seen.reports))


def _rank_record(plan: PlanRecord, rank: int, seen: Round, first_s: float) -> RankRecord:
    report, finished = seen.reports[rank], seen.finished.get(rank - plan.num_train)
    late_s = float(report["started_s"]) - first_s
    spans = [_later(Span(*span), late_s) for span in report["spans"]]
    rate = _rate(max(report["wire_bytes_sent"], report["wire_bytes_received"]), spans)
    seconds = dict(report["seconds"])
    if finished is not None:
        start_s = finished.started_s - first_s
        spans.append(Span(FINALIZE, NO_STAGE, 0, start_s, start_s + finished.finalize_s))
        seconds[FINALIZE] = finished.finalize_s
    return RankRecord(
        rank=rank,
        name=name_of(rank, plan.num_train),
        late_s=late_s,
        bytes_sent=report["bytes_sent"],
        bytes_received=report["bytes_received"],
        wire_bytes_sent=report["wire_bytes_sent"],
        wire_bytes_received=report["wire_bytes_received"],
        misc_bytes=report["misc_bytes"],
        seconds=seconds,
        peak_extra_bytes=report["peak_extra_bytes"],
        staged_bytes=0 if finished is None else finished.staged_bytes,
        bytes_per_s=rate,
        line_share=None if rate is None or seen.line_bytes_per_s is None else rate / seen.line_bytes_per_s,
        spans=tuple(spans),
    )


def _line_share(ranks: Sequence[RankRecord], line_bytes_per_s: float | None) -> float | None:
    """That of the busiest direction of any rank, over the time from the first start of bulk to its last end."""
    busiest = max(max(rank.wire_bytes_sent, rank.wire_bytes_received) for rank in ranks)
    rate = _rate(busiest, [span for rank in ranks for span in rank.spans])
    return None if rate is None or line_bytes_per_s is None else rate / line_bytes_per_s


def _delta_share(ranks: Sequence[RankRecord]) -> float | None:
    """Bytes on the wire over planned bytes; None where no bulk was planned."""
    planned = sum(rank.bytes_sent for rank in ranks)
    return sum(rank.wire_bytes_sent for rank in ranks) / planned if planned else None


def _rate(num_bytes: int, spans: Sequence[Span]) -> float | None:
    """Bytes per second from the first to the last of the spans of bulk; None where nothing moved."""
    moving = [span for span in spans if span.phase in BULK_PHASES]
    if not num_bytes or not moving:
        return None
    seconds = max(span.stop_s for span in moving) - min(span.start_s for span in moving)
    return num_bytes / seconds if seconds > 0 else None


def _later(span: Span, by_s: float) -> Span:
    return Span(span.phase, span.stage, span.lane, span.start_s + by_s, span.stop_s + by_s)


def _num_compared(plan: PlanRecord, reports: Mapping[int, Any]) -> int:
    held: Sequence[Any] = [report for rank, report in reports.items() if rank >= plan.num_train]
    return sum(len(report["digests"]) + len(report["misc_digests"]) for report in held)

"""What one rank did in one refit."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from refit.transfer.digest import MASK

PACK, WIRE, UNPACK, DIGEST = "pack", "wire", "unpack", "digest"
MAX_STAGE_SPANS = 64


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of one phase of a stage, on one stream of a rank; seconds of time.perf_counter()."""

    phase: str
    stage: int
    lane: int
    start_s: float
    stop_s: float


@dataclass(frozen=True, slots=True)
class BulkReport:
    """Bytes are payload (elements times wire item size, no padding). Seconds add up over the streams of the rank.

    `wire_bytes_sent` and `wire_bytes_received` are those that a delta had to move, its lengths included; without deltas
    the payload.

    digests[tensor][dst_rank]: on a trainer of what it sent there, on a generator of what it now holds (its own rank).
    `spans` of one lane do not overlap and follow each other in time.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    digests: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    peak_extra_bytes: int = 0
    spans: tuple[Span, ...] = ()
    wire_bytes_sent: int = 0
    wire_bytes_received: int = 0

    def placed(self, stage: int, lane: int) -> "BulkReport":
        """The same report with its spans labelled."""
        return replace(self, spans=tuple(replace(span, stage=stage, lane=lane) for span in self.spans))


class Tally:
    """The running sums behind a BulkReport. One thread at a time.

    `saved_bytes_sent` and `saved_bytes_received`: by how much fewer bytes than the payload's went over the wire.
    """

    def __init__(self) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self.seconds = {PACK: 0.0, WIRE: 0.0, UNPACK: 0.0, DIGEST: 0.0}
        self.digests: dict[str, dict[int, int]] = {}
        self.peak_extra_bytes = 0
        self.spans: list[Span] = []
        self.saved_bytes_sent = 0
        self.saved_bytes_received = 0

    def add_digest(self, tensor: str, dst_rank: int, value: int) -> None:
        """Add a part's digest; parts of one (tensor, dst_rank) sum up to the digest of all of it."""
        sums = self.digests.setdefault(tensor, {})
        sums[dst_rank] = (sums.get(dst_rank, 0) + value) & MASK

    def add_digests(self, keys: Sequence[tuple[str, int]], values: Sequence[int]) -> None:
        """The same for the first digests of all, of (tensor, dst_rank) that differ from each other, in [0, 2**64)."""
        assert not self.digests, "there are digests already"
        for (tensor, rank), value in zip(keys, values, strict=True):
            self.digests.setdefault(tensor, {})[rank] = value

    def clock(self, phase: str, since: float) -> float:
        """Add the seconds since `since` (a time.perf_counter()) to a phase; returns now, the start of the next one."""
        now = time.perf_counter()
        self.seconds[phase] += now - since
        self.spans.append(Span(phase, 0, 0, since, now))
        return now

    def report(self) -> BulkReport:
        return BulkReport(
            self.bytes_sent,
            self.bytes_received,
            self.seconds,
            self.digests,
            self.peak_extra_bytes,
            condensed(self.spans, MAX_STAGE_SPANS),
            self.bytes_sent - self.saved_bytes_sent,
            self.bytes_received - self.saved_bytes_received,
        )


def condensed(spans: Sequence[Span], max_spans: int) -> tuple[Span, ...]:
    """At most `max_spans` spans with the same seconds per phase.

    Neighbours are grouped; a group starts where its first span starts, and its phases lie one after the other there,
    each as long as its spans together. So a place is exact up to the length of a group, a sum always.
    """
    if len(spans) <= max_spans:
        return tuple(spans)
    num_phases = len({span.phase for span in spans})
    size = -(-len(spans) // max(1, max_spans // num_phases))
    found: list[Span] = []
    for first in range(0, len(spans), size):
        group = spans[first : first + size]
        sums: dict[str, float] = {}
        for span in group:
            sums[span.phase] = sums.get(span.phase, 0.0) + span.stop_s - span.start_s
        at = group[0].start_s
        for phase, seconds in sums.items():
            found.append(replace(group[0], phase=phase, start_s=at, stop_s=at + seconds))
            at += seconds
    return tuple(found)


def merged(reports: Sequence[BulkReport], peak_extra_bytes: int) -> BulkReport:
    """One report over stages. The peak is not a sum: stages of one stream follow each other."""
    if len(reports) == 1:
        return replace(reports[0], peak_extra_bytes=peak_extra_bytes)
    tally = Tally()
    spans: list[Span] = []
    for report in reports:
        tally.bytes_sent += report.bytes_sent
        tally.bytes_received += report.bytes_received
        tally.saved_bytes_sent += report.bytes_sent - report.wire_bytes_sent
        tally.saved_bytes_received += report.bytes_received - report.wire_bytes_received
        for phase, seconds in report.seconds.items():
            tally.seconds[phase] += seconds
        for tensor, by_rank in report.digests.items():
            for rank, value in by_rank.items():
                tally.add_digest(tensor, rank, value)
        spans += report.spans
    tally.peak_extra_bytes = peak_extra_bytes
    return replace(tally.report(), spans=tuple(spans))

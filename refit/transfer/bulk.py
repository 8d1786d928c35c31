"""The bulk path: one stage of a rank plan, as pack -> point-to-point -> unpack per round.

Three rounds are in work at once, over two slots of memory: while the wire carries round i, round i-1 is unpacked and
round i+1 is packed. A bucket that is one contiguous run of the wire dtype on this rank is sent from, or received into,
the param itself. Buckets are laid out by the plan, so the two ends may choose differently.

Extra memory of a call: two slots of the largest round, that is at most 2 * bucket_bytes of the plan's options.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from refit.plan import Bucket, Plan, Round, Segment, StagePlan
from refit.transfer.digest import digest
from refit.transfer.errors import TransportError
from refit.transfer.groups import Group
from refit.transfer.memory import as_bytes, copy_cast, strided_box, torch_dtype
from refit.transfer.report import DIGEST, PACK, UNPACK, WIRE, BulkReport, Tally
from refit.transfer.transport import Parcel, Ticket

NUM_SLOTS = 2


@dataclass(frozen=True, slots=True)
class StageJob:
    """One stage's work on one rank: the same input for `bulk.move_stage` and `golden.move_stage`.

    `deadline` is a time.monotonic() value that bounds every wait of the call.
    """

    plan: Plan
    stage_plan: StagePlan
    rank: int
    params: Mapping[str, Tensor]
    group: Group
    deadline: float
    device: torch.device
    with_digests: bool = True


@dataclass(frozen=True, slots=True)
class Boxed:
    """A bucket with the memory that holds its bytes. `is_direct`: that memory is the param itself."""

    bucket: Bucket
    payload: Tensor
    is_direct: bool


@dataclass(frozen=True, slots=True)
class Flight:
    """A round that is on the wire."""

    round: Round
    sends: tuple[Boxed, ...]
    receives: tuple[Boxed, ...]
    ticket: Ticket


def move_stage(job: StageJob) -> BulkReport:
    """Move all bytes of one stage of this rank. Raises TransportError naming stage, round and peer."""
    mover = _StageMover(job)
    flight: Flight | None = None
    for number, round_ in enumerate(job.stage_plan.rounds):
        started = mover.start(round_, number % NUM_SLOTS)
        if flight is not None:
            mover.finish(flight)
        flight = started
    if flight is not None:
        mover.finish(flight)
    report = mover.tally.report()
    planned = planned_bytes(job.stage_plan)
    done = (report.bytes_sent, report.bytes_received)
    assert done == planned, (
        f"stage {job.stage_plan.stage}: {done} bytes (sent, received) done, {planned} planned"
    )
    return report


def planned_bytes(stage_plan: StagePlan) -> tuple[int, int]:
    """Payload bytes that the stage plan sends and receives, without the padding of buckets."""
    sent = sum(segment_bytes(s) for r in stage_plan.rounds for b in r.sends for s in b.segments)
    received = sum(segment_bytes(s) for r in stage_plan.rounds for b in r.receives for s in b.segments)
    return sent, received


def segment_bytes(segment: Segment) -> int:
    return segment.region.num_elements * torch_dtype(segment.wire_dtype).itemsize


class _StageMover:
    def __init__(self, job: StageJob) -> None:
        self.job = job
        self.tally = Tally()
        slot_bytes = max(map(self._slot_bytes, job.stage_plan.rounds), default=0)
        num_slots = min(NUM_SLOTS, len(job.stage_plan.rounds))
        self._slots = [
            torch.empty(slot_bytes, dtype=torch.uint8, device=job.device) for _ in range(num_slots)
        ]
        self.tally.peak_extra_bytes = slot_bytes * num_slots

    def start(self, round_: Round, slot: int) -> Flight:
        """Pack a round into a slot and put it on the wire."""
        clock = time.perf_counter()
        sends, used = self._boxed(round_.sends, slot, 0)
        receives, _ = self._boxed(round_.receives, slot, used)
        for boxed in sends:
            self._pack(boxed)
        self.tally.clock(PACK, clock)
        self._digest_sends(sends)
        outward, inward = self._outward(sends), self._outward(receives)
        try:
            ticket = self.job.group.transport.post(outward, inward, round_.index)
        except TransportError as error:
            raise self._explained(round_, error) from error
        return Flight(round_, sends, receives, ticket)

    def finish(self, flight: Flight) -> None:
        """Wait for a round and unpack it."""
        clock = time.perf_counter()
        try:
            self.job.group.transport.wait(flight.ticket, self.job.deadline)
        except TransportError as error:
            raise self._explained(flight.round, error) from error
        clock = self.tally.clock(WIRE, clock)
        self._copy_local(flight)
        for boxed in flight.receives:
            for segment in boxed.bucket.segments:
                if not boxed.is_direct:
                    copy_cast(self._param_box(segment), _packed(segment, boxed.payload))
                self.tally.bytes_received += segment_bytes(segment)
        self.tally.clock(UNPACK, clock)
        self._digest_receives(flight)

    def _boxed(self, buckets: tuple[Bucket, ...], slot: int, used: int) -> tuple[tuple[Boxed, ...], int]:
        found: list[Boxed] = []
        for bucket in buckets:
            if self._is_direct(bucket):
                found.append(Boxed(bucket, as_bytes(self._param_box(bucket.segments[0])), True))
            else:
                found.append(Boxed(bucket, self._slots[slot][used : used + bucket.num_bytes], False))
                used += bucket.num_bytes
        return tuple(found), used

    def _pack(self, boxed: Boxed) -> None:
        for segment in boxed.bucket.segments:
            if not boxed.is_direct:
                copy_cast(_packed(segment, boxed.payload), self._param_box(segment))
            self.tally.bytes_sent += segment_bytes(segment)

    def _digest_sends(self, sends: tuple[Boxed, ...]) -> None:
        """Of the packed bytes: they are contiguous, in the wire dtype, and still in the cache."""
        if not self.job.with_digests:
            return
        clock = time.perf_counter()
        for boxed in sends:
            for segment in boxed.bucket.segments:
                value = digest(_packed(segment, boxed.payload), segment.region, self._shape(segment))
                self.tally.add_digest(segment.tensor, boxed.bucket.peer, value)
        self.tally.clock(DIGEST, clock)

    def _digest_receives(self, flight: Flight) -> None:
        """Of the params themselves, so that a wrong unpack shows as well as a wrong wire."""
        if not self.job.with_digests:
            return
        clock = time.perf_counter()
        for boxed in flight.receives:
            for segment in boxed.bucket.segments:
                value = digest(self._param_box(segment), segment.region, self._shape(segment))
                self.tally.add_digest(segment.tensor, self.job.rank, value)
        self.tally.clock(DIGEST, clock)

    def _outward(self, boxes: tuple[Boxed, ...]) -> list[Parcel]:
        return [
            Parcel(boxed.bucket.peer, boxed.payload) for boxed in boxes if boxed.bucket.peer != self.job.rank
        ]

    def _copy_local(self, flight: Flight) -> None:
        """A rank may be on both sides (xferdtensor): what it sends to itself does not touch the transport."""
        sends = [boxed for boxed in flight.sends if boxed.bucket.peer == self.job.rank]
        receives = [boxed for boxed in flight.receives if boxed.bucket.peer == self.job.rank]
        for source, target in zip(sends, receives, strict=True):
            target.payload.copy_(source.payload)

    def _slot_bytes(self, round_: Round) -> int:
        return sum(b.num_bytes for b in (*round_.sends, *round_.receives) if not self._is_direct(b))

    def _is_direct(self, bucket: Bucket) -> bool:
        if len(bucket.segments) != 1 or segment_bytes(bucket.segments[0]) != bucket.num_bytes:
            return False
        segment = bucket.segments[0]
        box = self._param_box(segment)
        return box.dtype == torch_dtype(segment.wire_dtype) and box.is_contiguous()

    def _param_box(self, segment: Segment) -> Tensor:
        return strided_box(self.job.params[segment.param], segment.shape, segment.strides, segment.offset)

    def _shape(self, segment: Segment) -> tuple[int, ...]:
        return self.job.plan.tensors[segment.tensor].shape

    def _explained(self, round_: Round, error: TransportError) -> TransportError:
        stage = self.job.stage_plan
        return TransportError(
            f"rank {self.job.rank}, stage {stage.stage}, round {round_.index} of {stage.rounds[-1].index}: {error}"
        )


def _packed(segment: Segment, payload: Tensor) -> Tensor:
    """The segment inside a bucket's bytes, in the wire dtype."""
    raw = payload[segment.start_byte : segment.start_byte + segment_bytes(segment)]
    return raw.view(torch_dtype(segment.wire_dtype)).view(segment.shape)

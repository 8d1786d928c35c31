"""The bulk path: one stage of a rank plan, as pack -> point-to-point -> unpack per round.

While the wire carries round i, round i-1 is unpacked and round i+1 is packed. Two rounds or more are on the wire at a
time, each in a slot of its own: as many, up to MOST_SLOTS, as the memory of two full buckets holds.

A parcel that is one contiguous run of the wire dtype on this rank is sent from, or received into, the param itself.
Parcels are cut by the plan, so the two ends may choose differently. A transport that gathers takes all parcels of a
round and peer as one, from the params or to them, but for those of few bytes per place, with gaps or a cast.

Digests are of what was sent, and of what the params hold afterwards, so that a wrong unpack shows as well as a wrong
wire: a receiver packs its params once more, into the slot of the round, or weighs them where they lie.

Extra memory of a call: the slots, at most 2 * bucket_bytes of the plan's options.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from refit.plan import Plan
from refit.transfer.compiled import CompiledParcel, CompiledRound, CompiledStage
from refit.transfer.errors import TransportError
from refit.transfer.gather import Gather
from refit.transfer.groups import Group
from refit.transfer.packing import Boxed, Packing, is_copied
from refit.transfer.report import DIGEST, PACK, UNPACK, WIRE, BulkReport, Tally
from refit.transfer.transports.seam import Parcel, Ticket
from refit.transfer.workspace import Workspace

MOST_SLOTS = 16
NO_BYTES = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class StageJob:
    """One stage's work on one rank: the same input for `bulk.move_stage` and `golden.move_stage`.

    `deadline` is a time.monotonic() value that bounds every wait of the call. Jobs that share a `workspace` must not
    run at the same time.
    """

    plan: Plan
    stage: CompiledStage
    rank: int
    params: Mapping[str, Tensor]
    group: Group
    deadline: float
    device: torch.device
    with_digests: bool = True
    workspace: Workspace = field(default_factory=Workspace)


@dataclass(frozen=True, slots=True)
class Flight:
    """A round that is on the wire."""

    round: CompiledRound
    sends: tuple[Boxed, ...]
    receives: tuple[Boxed, ...]
    ticket: Ticket


def move_stage(job: StageJob) -> BulkReport:
    """Move all bytes of one stage of this rank. Raises TransportError naming stage, round and peer."""
    mover = _StageMover(job)
    flights: deque[Flight] = deque()
    for number, round_ in enumerate(job.stage.rounds):
        if len(flights) == mover.num_slots:
            mover.finish(flights.popleft())
        flights.append(mover.start(round_, number % mover.num_slots))
    while flights:
        mover.finish(flights.popleft())
    if job.with_digests:
        mover.tally.add_digests(job.stage.sums, mover.digests)
    report = mover.tally.report()
    planned, done = job.stage.payload_bytes, (report.bytes_sent, report.bytes_received)
    assert done == planned, f"stage {job.stage.stage}: {done} bytes (sent, received) done, {planned} planned"
    return report


def num_slots(stage: CompiledStage, bucket_bytes: int) -> int:
    """Rounds that may be on the wire at once: each needs a slot, and all slots have to fit into two full buckets."""
    fitting = 2 * bucket_bytes // max(1, stage.slot_bytes)
    return min(MOST_SLOTS, len(stage.rounds), max(2, fitting))


class _StageMover(Packing):
    def __init__(self, job: StageJob) -> None:
        stage = job.stage
        super().__init__(stage, job.workspace.live_params(stage, job.params), job.device)
        self.job = job
        self.tally = Tally()
        assert job.group.transport.gathers or not stage.gathers, (
            "the stage was compiled for another transport"
        )
        self.num_slots = num_slots(stage, job.plan.options.bucket_bytes)
        self._slots = job.workspace.slots(self.num_slots, stage.slot_bytes, job.device)
        self.tally.peak_extra_bytes = stage.slot_bytes * self.num_slots

    def start(self, round_: CompiledRound, slot: int) -> Flight:
        """Pack a round into a slot and put it on the wire."""
        clock = time.perf_counter()
        sends = self._touched(round_.sends, slot)
        receives = self._touched(round_.receives, slot)
        for boxed in sends:
            if is_copied(boxed.parcel):
                self.copy(boxed, is_pack=True)
        self.tally.bytes_sent += sum(parcel.payload_bytes for parcel in round_.sends)
        self.tally.clock(PACK, clock)
        if self.job.stage.gathers:
            out, into = (
                self._gathered(round_.gathered_sends, slot),
                self._gathered(round_.gathered_receives, slot),
            )
        else:
            out, into = self._outward(sends), self._outward(receives)
        try:
            ticket = self.job.group.transport.post(out, into, round_.index)
        except TransportError as error:
            raise self._explained(round_, error) from error
        clock = time.perf_counter()
        if self.job.with_digests:
            for boxed in sends:
                self.weigh(boxed, is_packed=is_copied(boxed.parcel))
            self.tally.clock(DIGEST, clock)
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
            if is_copied(boxed.parcel):
                self.copy(boxed, is_pack=False)
        self.tally.bytes_received += sum(parcel.payload_bytes for parcel in flight.round.receives)
        clock = self.tally.clock(UNPACK, clock)
        if self.job.with_digests:
            for boxed in flight.receives:
                self.weigh(boxed, is_packed=False)
            self.tally.clock(DIGEST, clock)

    def _touched(self, parcels: Sequence[CompiledParcel], slot: int) -> tuple[Boxed, ...]:
        """The parcels that are copied or weighed here."""
        with_digests = self.job.with_digests
        return tuple(self.boxed(p, self._slots[slot]) for p in parcels if with_digests or is_copied(p))

    def _gathered(self, parts: Sequence[Gather], slot: int) -> list[Parcel]:
        address = self._slots[slot].data_ptr()
        return [Parcel(part.peer, NO_BYTES, self.params.seen.pieces(part, address)) for part in parts]

    def _outward(self, boxes: tuple[Boxed, ...]) -> list[Parcel]:
        return [
            Parcel(boxed.parcel.peer, boxed.payload) for boxed in boxes if boxed.parcel.peer != self.job.rank
        ]

    def _copy_local(self, flight: Flight) -> None:
        """A rank may be on both sides (xferdtensor): what it sends to itself does not touch the transport."""
        sends = [boxed for boxed in flight.sends if boxed.parcel.peer == self.job.rank]
        receives = [boxed for boxed in flight.receives if boxed.parcel.peer == self.job.rank]
        for source, target in zip(sends, receives, strict=True):
            target.payload.copy_(source.payload)

    def _explained(self, round_: CompiledRound, error: TransportError) -> TransportError:
        stage = self.job.stage
        return TransportError(
            f"rank {self.job.rank}, stage {stage.stage}, round {round_.index} of {stage.rounds[-1].index}: {error}"
        )

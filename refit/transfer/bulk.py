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
from refit.transfer.compiled import CompiledParcel, CompiledRound, CompiledStage, Move
from refit.transfer.digest import unsigned
from refit.transfer.errors import TransportError
from refit.transfer.gather import Gather
from refit.transfer.groups import Group
from refit.transfer.memory import as_bytes, strided_box
from refit.transfer.report import DIGEST, PACK, UNPACK, WIRE, BulkReport, Tally
from refit.transfer.runs import LiveParams
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
class Boxed:
    """A parcel with the memory that holds its bytes: a part of a slot, or the param itself."""

    parcel: CompiledParcel
    payload: Tensor


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
    mover.add_digests()
    report = mover.tally.report()
    planned, done = job.stage.payload_bytes, (report.bytes_sent, report.bytes_received)
    assert done == planned, f"stage {job.stage.stage}: {done} bytes (sent, received) done, {planned} planned"
    return report


def num_slots(stage: CompiledStage, bucket_bytes: int) -> int:
    """Rounds that may be on the wire at once: each needs a slot, and all slots have to fit into two full buckets."""
    fitting = 2 * bucket_bytes // max(1, stage.slot_bytes)
    return min(MOST_SLOTS, len(stage.rounds), max(2, fitting))


class _StageMover:
    def __init__(self, job: StageJob) -> None:
        self.job = job
        self.tally = Tally()
        stage = job.stage
        self._params = job.workspace.live_params(stage, job.params)
        self._bases = _kernel_bases(self._params, job)
        assert job.group.transport.gathers or not stage.gathers, (
            "the stage was compiled for another transport"
        )
        self._sums = torch.zeros(len(stage.sums), dtype=torch.int64, device=job.device)
        self.num_slots = num_slots(stage, job.plan.options.bucket_bytes)
        self._slots = job.workspace.slots(self.num_slots, stage.slot_bytes, job.device)
        self.tally.peak_extra_bytes = stage.slot_bytes * self.num_slots

    def start(self, round_: CompiledRound, slot: int) -> Flight:
        """Pack a round into a slot and put it on the wire."""
        clock = time.perf_counter()
        sends = self._touched(round_.sends, slot)
        receives = self._touched(round_.receives, slot)
        for boxed in sends:
            if _is_copied(boxed.parcel):
                self._copy(boxed, is_pack=True)
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
                self._weigh(boxed, is_packed=_is_copied(boxed.parcel))
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
            if _is_copied(boxed.parcel):
                self._copy(boxed, is_pack=False)
        self.tally.bytes_received += sum(parcel.payload_bytes for parcel in flight.round.receives)
        clock = self.tally.clock(UNPACK, clock)
        if self.job.with_digests:
            for boxed in flight.receives:
                self._weigh(boxed, is_packed=False)
            self.tally.clock(DIGEST, clock)

    def add_digests(self) -> None:
        """Put the sums of the stage into the tally."""
        if self.job.with_digests:
            self.tally.add_digests(self.job.stage.sums, unsigned(self._sums))

    def _touched(self, parcels: Sequence[CompiledParcel], slot: int) -> tuple[Boxed, ...]:
        """The parcels that are copied or weighed here."""
        with_digests = self.job.with_digests
        return tuple(self._boxed(p, slot) for p in parcels if with_digests or _is_copied(p))

    def _gathered(self, parts: Sequence[Gather], slot: int) -> list[Parcel]:
        if not parts:
            return []
        own = torch.tensor([self._slots[slot].data_ptr()])
        places = torch.cat([self._params.addresses, own])
        return [Parcel(part.peer, NO_BYTES, part.pieces(places)) for part in parts]

    def _boxed(self, parcel: CompiledParcel, slot: int) -> Boxed:
        if parcel.slot_byte is None:
            return Boxed(parcel, as_bytes(self._box(parcel.moves[0])))
        return Boxed(parcel, self._slots[slot][parcel.slot_byte : parcel.slot_byte + parcel.num_bytes])

    def _copy(self, boxed: Boxed, is_pack: bool) -> None:
        """Pack or unpack a parcel: by one kernel, or runs by memmove and all other boxes in one batched call."""
        parcel, payload = boxed.parcel, boxed.payload
        if parcel.slot_byte is None:
            return
        if parcel.kernels is not None and self._bases is not None:
            parcel.kernels.copy(self._bases, payload, is_pack)
            return
        parcel.runs.copy(self._params, payload, is_pack)
        if parcel.boxes:
            typed = _Typed(payload)
            packed = [typed.box(move) for move in parcel.boxes]
            boxes = [self._box(move) for move in parcel.boxes]
            targets, sources = (packed, boxes) if is_pack else (boxes, packed)
            torch._foreach_copy_(targets, sources)

    def _weigh(self, boxed: Boxed, is_packed: bool) -> None:
        """Add the digests of what the params hold, or of the packed bytes where they have just been sent."""
        parcel = boxed.parcel
        in_place = parcel.box_in_place
        if in_place is not None:
            in_place.add_box(self._box(parcel.moves[0]), self._sums)
            return
        if not is_packed:
            self._copy(boxed, is_pack=True)
        if parcel.kernels is not None and self._bases is not None:
            parcel.kernels.add_digests(self._bases, boxed.payload, self._sums)
        else:
            parcel.weighing.add(boxed.payload, self._sums)

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

    def _box(self, move: Move) -> Tensor:
        """The segment in this rank's memory: as bits, or as values of the param's own dtype if a cast follows."""
        segment = move.segment
        whole = self._params.values if move.is_cast else self._params.bits
        return strided_box(whole(segment.param), segment.shape, segment.strides, segment.offset)

    def _explained(self, round_: CompiledRound, error: TransportError) -> TransportError:
        stage = self.job.stage
        return TransportError(
            f"rank {self.job.rank}, stage {stage.stage}, round {round_.index} of {stage.rounds[-1].index}: {error}"
        )


def _is_copied(parcel: CompiledParcel) -> bool:
    """False where the transport takes the bytes from the params, or puts them there, by itself."""
    return parcel.rows is None


def _kernel_bases(params: LiveParams, job: StageJob) -> Tensor | None:
    """The addresses that kernels start from; None where torch does the copies: no CUDA, or a param not aligned."""
    if not job.stage.has_kernels:
        return None
    from refit.transfer.kernels.parcel import bases_of

    return bases_of(params.addresses, job.device)


class _Typed:
    """A parcel's bytes seen through the dtypes that occur in it."""

    def __init__(self, payload: Tensor) -> None:
        self._payload = payload
        self._views: dict[torch.dtype, Tensor] = {}

    def box(self, move: Move) -> Tensor:
        """The segment inside the parcel."""
        dtype = move.wire if move.is_cast else move.bits
        view = self._views.get(dtype)
        if view is None:
            usable = self._payload.numel() // dtype.itemsize * dtype.itemsize
            view = self._views[dtype] = self._payload[:usable].view(dtype)
        return torch.as_strided(view, move.segment.shape, move.strides, view.storage_offset() + move.start)

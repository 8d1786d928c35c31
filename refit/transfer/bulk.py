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

from refit.plan import Plan
from refit.transfer.compiled import CompiledBucket, CompiledRound, CompiledStage, Move
from refit.transfer.errors import TransportError
from refit.transfer.groups import Group
from refit.transfer.memory import Span, as_bits, as_bytes, strided_box
from refit.transfer.report import DIGEST, PACK, UNPACK, WIRE, BulkReport, Tally
from refit.transfer.transport import Parcel, Ticket

NUM_SLOTS = 2


@dataclass(frozen=True, slots=True)
class StageJob:
    """One stage's work on one rank: the same input for `bulk.move_stage` and `golden.move_stage`.

    `deadline` is a time.monotonic() value that bounds every wait of the call.
    """

    plan: Plan
    stage: CompiledStage
    rank: int
    params: Mapping[str, Tensor]
    group: Group
    deadline: float
    device: torch.device
    with_digests: bool = True


@dataclass(frozen=True, slots=True)
class Boxed:
    """A bucket with the memory that holds its bytes. `is_direct`: that memory is the param itself."""

    bucket: CompiledBucket
    payload: Tensor
    is_direct: bool


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
    flight: Flight | None = None
    for number, round_ in enumerate(job.stage.rounds):
        started = mover.start(round_, number % NUM_SLOTS)
        if flight is not None:
            mover.finish(flight)
        flight = started
    if flight is not None:
        mover.finish(flight)
    report = mover.tally.report()
    planned, done = job.stage.payload_bytes, (report.bytes_sent, report.bytes_received)
    assert done == planned, f"stage {job.stage.stage}: {done} bytes (sent, received) done, {planned} planned"
    return report


class _StageMover:
    def __init__(self, job: StageJob) -> None:
        self.job = job
        self.tally = Tally()
        self._spans: dict[str, Span] = {}
        self._bits: dict[str, Tensor] = {}
        if job.device.type == "cpu":
            names = {move.segment.param for move in job.stage.moves}
            self._spans = {
                name: Span.of(job.params[name]) for name in names if job.params[name].is_contiguous()
            }
        slot_bytes = max(map(self._slot_bytes, job.stage.rounds), default=0)
        num_slots = min(NUM_SLOTS, len(job.stage.rounds))
        self._slots = [
            torch.empty(slot_bytes, dtype=torch.uint8, device=job.device) for _ in range(num_slots)
        ]
        self.tally.peak_extra_bytes = slot_bytes * num_slots

    def start(self, round_: CompiledRound, slot: int) -> Flight:
        """Pack a round into a slot and put it on the wire."""
        clock = time.perf_counter()
        sends, used = self._boxed(round_.sends, slot, 0)
        receives, _ = self._boxed(round_.receives, slot, used)
        for boxed in sends:
            self._copy(boxed, is_pack=True)
            self.tally.bytes_sent += boxed.bucket.payload_bytes
        self.tally.clock(PACK, clock)
        if self.job.with_digests:
            self._digest_sends(sends)
        try:
            ticket = self.job.group.transport.post(
                self._outward(sends), self._outward(receives), round_.index
            )
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
            self._copy(boxed, is_pack=False)
            self.tally.bytes_received += boxed.bucket.payload_bytes
        self.tally.clock(UNPACK, clock)
        if self.job.with_digests:
            self._digest_receives(flight)

    def _boxed(
        self, buckets: tuple[CompiledBucket, ...], slot: int, used: int
    ) -> tuple[tuple[Boxed, ...], int]:
        found: list[Boxed] = []
        for bucket in buckets:
            if self._is_direct(bucket):
                found.append(Boxed(bucket, as_bytes(self._param_box(bucket.moves[0])), True))
            else:
                found.append(Boxed(bucket, self._slots[slot][used : used + bucket.num_bytes], False))
                used += bucket.num_bytes
        return tuple(found), used

    def _copy(self, boxed: Boxed, is_pack: bool) -> None:
        """Pack or unpack all segments of a bucket: runs by memmove, the others in one batched call."""
        if boxed.is_direct:
            return
        packed: list[Tensor] = []
        boxes: list[Tensor] = []
        typed = _Typed(boxed.payload)
        bucket_at = boxed.payload.data_ptr()
        for move in boxed.bucket.moves:
            segment = move.segment
            span = self._spans.get(segment.param)
            if span is not None and move.is_run and span.dtype == move.wire:
                span.copy_run(segment.offset, bucket_at + segment.start_byte, move.num_bytes, is_pack)
                continue  # done: one memmove costs a tenth of a tensor copy
            is_cast = self.job.params[segment.param].dtype != move.wire
            packed.append(typed.box(move, move.wire if is_cast else move.bits))
            boxes.append(self._param_box(move, as_values=is_cast))
        if packed:
            targets, sources = (packed, boxes) if is_pack else (boxes, packed)
            torch._foreach_copy_(targets, sources)

    def _digest_sends(self, sends: tuple[Boxed, ...]) -> None:
        """Of the packed bytes: they are contiguous, in the wire dtype, and still in the cache."""
        clock = time.perf_counter()
        for boxed in sends:
            typed = _Typed(boxed.payload)
            found = [move.digest(typed.box(move, move.bits)) for move in boxed.bucket.moves]
            self._add_digests(boxed.bucket, boxed.bucket.peer, found)
        self.tally.clock(DIGEST, clock)

    def _digest_receives(self, flight: Flight) -> None:
        """Of the params themselves, so that a wrong unpack shows as well as a wrong wire."""
        clock = time.perf_counter()
        for boxed in flight.receives:
            found = [move.digest(self._param_box(move)) for move in boxed.bucket.moves]
            self._add_digests(boxed.bucket, self.job.rank, found)
        self.tally.clock(DIGEST, clock)

    def _add_digests(self, bucket: CompiledBucket, dst_rank: int, found: list[int | Tensor]) -> None:
        partials = [value for value in found if isinstance(value, Tensor)]
        numbers = iter(torch.stack(partials).tolist() if partials else [])
        for move, value in zip(bucket.moves, found, strict=True):
            if isinstance(value, int):
                total = value
            else:
                assert move.weighing is not None, "only a weighing yields a partial"
                total = move.weighing.finish(next(numbers))
            self.tally.add_digest(move.segment.tensor, dst_rank, total)

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

    def _slot_bytes(self, round_: CompiledRound) -> int:
        return sum(b.num_bytes for b in (*round_.sends, *round_.receives) if not self._is_direct(b))

    def _is_direct(self, bucket: CompiledBucket) -> bool:
        """One contiguous run of the wire dtype, and nothing else in the bucket."""
        if len(bucket.moves) != 1 or bucket.moves[0].num_bytes != bucket.num_bytes:
            return False
        move = bucket.moves[0]
        return self.job.params[move.segment.param].dtype == move.wire and move.is_run

    def _param_box(self, move: Move, as_values: bool = False) -> Tensor:
        """The segment in this rank's memory, as bits or as values of the param's own dtype."""
        segment = move.segment
        name = segment.param
        if as_values:
            return strided_box(self.job.params[name], segment.shape, segment.strides, segment.offset)
        if name not in self._bits:
            self._bits[name] = as_bits(self.job.params[name].detach())
        return strided_box(self._bits[name], segment.shape, segment.strides, segment.offset)

    def _explained(self, round_: CompiledRound, error: TransportError) -> TransportError:
        stage = self.job.stage
        return TransportError(
            f"rank {self.job.rank}, stage {stage.stage}, round {round_.index} of {stage.rounds[-1].index}: {error}"
        )


class _Typed:
    """A bucket's bytes seen through the dtypes that occur in it."""

    def __init__(self, payload: Tensor) -> None:
        self._payload = payload
        self._views: dict[torch.dtype, Tensor] = {}

    def box(self, move: Move, dtype: torch.dtype) -> Tensor:
        """The segment inside the bucket."""
        view = self._views.get(dtype)
        if view is None:
            usable = self._payload.numel() // dtype.itemsize * dtype.itemsize
            view = self._views[dtype] = self._payload[:usable].view(dtype)
        return torch.as_strided(view, move.segment.shape, move.strides, view.storage_offset() + move.start)

"""The bulk path of one stage with deltas: as `bulk.move_stage`, but of each parcel only what changed since the base.

The generators greet with the token of their base. Round by round a trainer packs a parcel from its params and once more
from its base, and sends the difference to those who hold the same base, the parcel itself to all others and wherever a
difference would not be shorter. A generator packs the parcel from its own base, changes it, and unpacks it into the
base and into the params. Digests are of the params as in a plain move: a wrong base shows in them.

Parcels are packed and posted by themselves, for any transport. Two rounds are on the wire at a time. Extra memory of a
call beside the base: at most MOST_BUCKETS * bucket_bytes of the plan's options, and lengths.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from refit.transfer.bulk import StageJob
from refit.transfer.compiled import CompiledParcel, CompiledRound, CompiledStage
from refit.transfer.delta import codec
from refit.transfer.delta.base import NO_TOKEN, Base
from refit.transfer.delta.notes import (
    GREETING_TAG,
    empty_greeting,
    empty_lengths,
    greeting_of,
    lengths_in,
    lengths_of,
    lengths_tag,
    payload_tag,
    token_in,
)
from refit.transfer.errors import TransportError
from refit.transfer.packing import Boxed, Packing
from refit.transfer.report import DIGEST, PACK, UNPACK, WIRE, BulkReport, Tally
from refit.transfer.transports.seam import Parcel, Ticket
from refit.transfer.workspace import Workspace

NUM_FLIGHTS = 2
MOST_BUCKETS = 2 * NUM_FLIGHTS + 1  # packed and changed bytes of each round on the wire, and the base of one


@dataclass(frozen=True, slots=True)
class DeltaMove:
    """Moves stages of one attempt. `token` names what `base` held when the attempt began, NO_TOKEN if nothing."""

    base: Base
    token: bytes

    def move_stage(self, job: StageJob) -> BulkReport:
        """Move all bytes of one stage of this rank. Raises TransportError naming stage, round and peer."""
        mover = _DeltaMover(job, self.base, self.token)
        mover.greet()
        flights: deque[_Flight] = deque()
        for number, round_ in enumerate(job.stage.rounds):
            if len(flights) == NUM_FLIGHTS:
                mover.finish(flights.popleft())
            flights.append(mover.start(round_, number % NUM_FLIGHTS))
        while flights:
            mover.finish(flights.popleft())
        return mover.report()


@dataclass(frozen=True, slots=True)
class _Flight:
    """A round on the wire. `arrivals`: what comes of each parcel, in the order of the plan."""

    round: CompiledRound
    slot: int
    tickets: tuple[Ticket, ...]
    arrivals: tuple[Tensor, ...] = ()


class _DeltaMover:
    def __init__(self, job: StageJob, base: Base, token: bytes) -> None:
        stage = job.stage
        _require_supported(job)
        self.job = job
        self.tally = Tally()
        self._token = token
        self._live = Packing(stage, job.workspace.live_params(stage, job.params), job.device)
        self._base = Packing(stage, Workspace().live_params(stage, base.params), job.device)
        slots = job.workspace.slots(NUM_FLIGHTS + 1, stage.slot_bytes, job.device)
        self._slots, self._base_slot = slots[:NUM_FLIGHTS], slots[NUM_FLIGHTS]
        self._held: dict[int, bytes] = {}
        self._wire = [0, 0]
        self.tally.peak_extra_bytes = (NUM_FLIGHTS + 1) * stage.slot_bytes + NUM_FLIGHTS * _most_bytes(stage)

    def greet(self) -> None:
        """Tell the trainers of this stage what is held here; as a trainer, hear it of all generators."""
        clock = time.perf_counter()
        rounds = self.job.stage.rounds
        trainers = sorted({parcel.peer for round_ in rounds for parcel in round_.receives})
        generators = sorted({parcel.peer for round_ in rounds for parcel in round_.sends})
        heard = {peer: empty_greeting() for peer in generators}
        mine = greeting_of(self._token)
        out = [Parcel(peer, mine) for peer in trainers]
        into = [Parcel(peer, greeting) for peer, greeting in heard.items()]
        with self._during("greeting"):
            self._wait(self._post(out, into, GREETING_TAG))
        self._held = {peer: token_in(greeting) for peer, greeting in heard.items()}
        self.tally.clock(WIRE, clock)

    def start(self, round_: CompiledRound, slot: int) -> _Flight:
        """Put a round on the wire. A generator first waits to hear how long each parcel is."""
        with self._during(f"round {round_.index}"):
            return self._send(round_, slot) if round_.sends else self._expect(round_, slot)

    def finish(self, flight: _Flight) -> None:
        """Wait for a round; on a generator, put it into the base and the params."""
        with self._during(f"round {flight.round.index}"):
            self._arrive(flight)
        self.tally.bytes_received += sum(parcel.payload_bytes for parcel in flight.round.receives)

    def _arrive(self, flight: _Flight) -> None:
        clock = time.perf_counter()
        for ticket in flight.tickets:
            self._wait(ticket)
        self.tally.clock(WIRE, clock)
        for parcel, arrived in zip(flight.round.receives, flight.arrivals, strict=True):
            clock = time.perf_counter()
            packed = self._renewed(parcel, arrived, flight.slot)
            clock = self.tally.clock(UNPACK, clock)
            if self.job.with_digests:
                self._live.weigh(packed, is_packed=False)
                self.tally.clock(DIGEST, clock)

    def report(self) -> BulkReport:
        """What was done. Payload bytes are those of the plan, however few of them had to travel."""
        if self.job.with_digests:
            self.tally.add_digests(self.job.stage.sums, self._live.digests)
        tally, planned = self.tally, self.job.stage.payload_bytes
        moved = (tally.bytes_sent, tally.bytes_received)
        assert moved == planned, f"stage {self.job.stage.stage}: {moved} bytes done, {planned} planned"
        tally.saved_bytes_sent = tally.bytes_sent - self._wire[0]
        tally.saved_bytes_received = tally.bytes_received - self._wire[1]
        return tally.report()

    def _send(self, round_: CompiledRound, slot: int) -> _Flight:
        clock = time.perf_counter()
        packed = [self._packed(self._live, parcel, self._slots[slot]) for parcel in round_.sends]
        bodies = [self._body(boxed) for boxed in packed]
        clock = self.tally.clock(PACK, clock)
        notes = []
        for peer, numbers in _by_peer(round_.sends):
            token = self._token if self._is_agreed(peer) else NO_TOKEN
            notes.append(Parcel(peer, lengths_of(token, [bodies[number].numel() for number in numbers])))
        sent = [
            Parcel(parcel.peer, body) for parcel, body in zip(round_.sends, bodies, strict=True) if len(body)
        ]
        tickets = (
            self._post(notes, [], lengths_tag(round_.index)),
            self._post(sent, [], payload_tag(round_.index)),
        )
        self._wire[0] += sum(parcel.num_bytes for parcel in (*notes, *sent))
        clock = self.tally.clock(WIRE, clock)
        if self.job.with_digests:
            for boxed in packed:
                self._live.weigh(boxed, is_packed=True)
            self.tally.clock(DIGEST, clock)
        self.tally.bytes_sent += sum(parcel.payload_bytes for parcel in round_.sends)
        return _Flight(round_, slot, tickets)

    def _expect(self, round_: CompiledRound, slot: int) -> _Flight:
        clock = time.perf_counter()
        by_peer = list(_by_peer(round_.receives))
        notes = [Parcel(peer, empty_lengths(len(numbers))) for peer, numbers in by_peer]
        self._wait(self._post([], notes, lengths_tag(round_.index)))
        lengths = [0] * len(round_.receives)
        for note, (peer, numbers) in zip(notes, by_peer, strict=True):
            parcels = [round_.receives[number] for number in numbers]
            told = lengths_in(note.payload, parcels, self._token, peer)
            for number, length in zip(numbers, told, strict=True):
                lengths[number] = length
        arrivals = tuple(
            self._room(parcel, length, slot) for parcel, length in zip(round_.receives, lengths, strict=True)
        )
        wanted = [
            Parcel(parcel.peer, room)
            for parcel, room in zip(round_.receives, arrivals, strict=True)
            if len(room)
        ]
        ticket = self._post([], wanted, payload_tag(round_.index))
        self._wire[1] += sum(parcel.num_bytes for parcel in (*notes, *wanted))
        self.tally.clock(WIRE, clock)
        return _Flight(round_, slot, (ticket,), arrivals)

    def _is_agreed(self, peer: int) -> bool:
        return self._token != NO_TOKEN and self._held[peer] == self._token

    def _body(self, packed: Boxed) -> Tensor:
        """What is sent of a parcel: the difference to the base, or the parcel itself."""
        if not self._is_agreed(packed.parcel.peer):
            return packed.payload
        known = self._packed(self._base, packed.parcel, self._base_slot)
        told = codec.encode(packed.payload.numpy(), known.payload.numpy(), _item_bytes(packed.parcel))
        return packed.payload if told is None else torch.from_numpy(told)

    def _packed(self, packing: Packing, parcel: CompiledParcel, slot: Tensor) -> Boxed:
        boxed = packing.boxed(parcel, slot)
        if parcel.num_bytes != parcel.payload_bytes:
            boxed.payload.zero_()  # what lies between segments would differ without a meaning
        packing.copy(boxed, is_pack=True)
        return boxed

    def _room(self, parcel: CompiledParcel, length: int, slot: int) -> Tensor:
        """Where bytes arrive: a whole parcel in its place in the base, a difference in memory of its own."""
        if length == parcel.num_bytes:
            return self._base.boxed(parcel, self._slots[slot]).payload
        return torch.empty(length, dtype=torch.uint8)

    def _renewed(self, parcel: CompiledParcel, arrived: Tensor, slot: int) -> Boxed:
        """Bring a parcel that has arrived into the base and the params. Returns it in its place in the params."""
        known = self._base.boxed(parcel, self._slots[slot])
        if arrived.numel() != parcel.num_bytes:
            self._base.copy(known, is_pack=True)
            codec.decode(arrived.numpy(), known.payload.numpy(), _item_bytes(parcel))
        self._base.copy(known, is_pack=False)
        live = self._live.boxed(parcel, self._slots[slot])
        if parcel.slot_byte is None:
            live.payload.copy_(known.payload)
        else:
            self._live.copy(live, is_pack=False)
        return live

    def _post(self, out: Sequence[Parcel], into: Sequence[Parcel], tag: int) -> Ticket:
        return self.job.group.transport.post(out, into, tag)

    def _wait(self, ticket: Ticket) -> None:
        self.job.group.transport.wait(ticket, self.job.deadline)

    @contextmanager
    def _during(self, what: str) -> Iterator[None]:
        """Say where in a delta refit an error came up."""
        try:
            yield
        except TransportError as error:
            stage = self.job.stage.stage
            raise TransportError(f"rank {self.job.rank}, stage {stage}, {what} (delta): {error}") from error


def _require_supported(job: StageJob) -> None:
    if job.device.type != "cpu":
        raise TransportError(
            f"rank {job.rank}: a delta compares weights in host memory, these are on {job.device}: "
            f"use refit.delta=false"
        )
    assert not job.stage.gathers, "a delta packs its parcels: compile the stage with gathers=False"
    for round_ in job.stage.rounds:
        assert not (round_.sends and round_.receives), "a rank of a refit sends or receives, never both"


def _most_bytes(stage: CompiledStage) -> int:
    """Of what one round sends or receives, whole."""
    return max((sum(p.num_bytes for p in (*r.sends, *r.receives)) for r in stage.rounds), default=0)


def _item_bytes(parcel: CompiledParcel) -> int:
    """Both ends have the same segments, hence the same elements."""
    return min(move.wire.itemsize for move in parcel.moves)


def _by_peer(parcels: Sequence[CompiledParcel]) -> Iterator[tuple[int, list[int]]]:
    """Each peer with the places of its parcels."""
    found: dict[int, list[int]] = {}
    for number, parcel in enumerate(parcels):
        found.setdefault(parcel.peer, []).append(number)
    yield from found.items()

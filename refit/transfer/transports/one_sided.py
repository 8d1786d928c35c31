"""Parcels by one-sided reads: the sender offers memory, the receiver reads it, and says when it has.

    sender    post: OFFER (tag, number, size, where)  ->  receiver
    receiver  reads straight into its payload; then DONE (tag, number)  ->  sender
    anybody   abort or close: GONE  ->  all peers

`number` counts the parcels of a pair and tag, so order does not depend on the order of messages. What carries the
messages and the reads is a `Link`, such as `nixl_link`. A read starts as soon as offer and receive have met, in
whatever call notices it; no thread is needed.
"""

import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

from refit.transfer.errors import TransportError
from refit.transfer.transports.seam import RECEIVE, SEND, Operation, Parcel, Ticket, describe, wait_for_stream

OFFER, DONE, GONE = 1, 2, 3
HEADER = struct.Struct("<BqQQ")  # kind, tag, number, num_bytes; an offer's description follows
PAUSE_S = (0.00005, 0.001)  # first and longest pause between two looks
PACKED_S = 60.0  # longest wait for the kernels that fill a payload; they wait for nobody
ABORT_LOCK_S = 1.0  # how long an abort waits for its turn to tell the peers


class Link(Protocol):
    """Messages and reads between the ranks of one group. Used by one thread at a time; no call may block for long."""

    def messages(self) -> list[tuple[int, bytes]]:
        """What arrived since the last call, with its sender; in order per sender."""

    def send(self, peer: int, message: bytes) -> None:
        """Send a message, now or in a later call. Raises TransportError if the peer cannot be reached."""

    def is_flushed(self) -> bool:
        """Whether every message has left; `messages` sends what has not."""

    def offer(self, payload: Tensor) -> tuple[bytes, Callable[[], None]]:
        """Make memory readable: its description for the peer, and what ends that."""

    def read(self, peer: int, description: bytes, payload: Tensor) -> Callable[[], bool]:
        """Start to fill `payload` from a peer's offer. The result says if that is done; it raises TransportError."""

    def close(self) -> None:
        """Give everything back; reads that still run are cancelled first."""


@dataclass(frozen=True, slots=True)
class Numbered(Operation):
    """An operation with its place among the parcels of its pair and tag."""

    number: int = 0

    @property
    def key(self) -> "Key":
        return (self.direction, self.parcel.peer, self.tag, self.number)


type Key = tuple[str, int, int, int]


@dataclass(slots=True)
class _Open:
    """What is under way for one operation. `end` gives the sender's memory back, `is_read` asks about a read."""

    operation: Numbered
    end: Callable[[], None] | None = None
    is_read: Callable[[], bool] | None = None
    is_done: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Offer:
    num_bytes: int
    description: bytes


@dataclass(slots=True)
class _State:
    """What one end knows. `offers` came before their receives were posted."""

    counts: dict[tuple[str, int, int], int] = field(default_factory=dict)
    open: dict[Key, _Open] = field(default_factory=dict)
    offers: dict[Key, _Offer] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)


class OneSidedTransport:
    """One rank's end. `ranks` are the joint ranks of the group."""

    gathers = False

    def __init__(self, link: Link, ranks: Sequence[int], rank: int) -> None:
        self._link = link
        self._peers = tuple(peer for peer in ranks if peer != rank)
        self._rank = rank
        self._lock = Lock()
        self._state = _State()
        self._is_aborted = False
        self._is_closed = False

    def post(self, sends: Sequence[Parcel], receives: Sequence[Parcel], tag: int) -> Ticket:
        for parcel in (*sends, *receives):
            if parcel.peer not in self._peers:
                raise TransportError(
                    f"rank {parcel.peer} is not a peer of rank {self._rank}; its peers are {[*self._peers]}"
                )
        if any(parcel.payload.is_cuda for parcel in sends):
            # The peer reads without regard to our stream, so what is queued there must have ended.
            wait_for_stream(torch.cuda.current_stream(), time.monotonic() + PACKED_S)
        with self._lock:
            self._require_open()
            posted = [self._opened(RECEIVE, parcel, tag) for parcel in receives]
            posted += [self._offered(parcel, tag) for parcel in sends]
            self._advance()
        return tuple(posted)

    def wait(self, ticket: Ticket, deadline: float) -> None:
        began = time.monotonic()
        pause = PAUSE_S[0]
        operations = [operation for operation in ticket if isinstance(operation, Numbered)]
        assert len(operations) == len(ticket), "a ticket of another transport"
        while True:
            with self._lock:
                self._require_open()
                self._advance()
                late = [one for one in operations if not self._state.open[one.key].is_done]
                if not late and operations and not self._link.is_flushed():
                    late = operations  # who leaves now would never tell a sender that its parcel was read
                if not late:
                    for operation in operations:
                        del self._state.open[operation.key]
                    break
                reason = self._reason(late, deadline)
            if reason is not None:
                raise self._failure(late, reason, time.monotonic() - began)
            time.sleep(pause)
            pause = min(2 * pause, PAUSE_S[1])
        cuda = [one.parcel.payload for one in operations if one.parcel.payload.is_cuda]
        if cuda:
            wait_for_stream(torch.cuda.current_stream(cuda[0].device), deadline)

    def abort(self) -> None:
        """Waiters here see the mark at their next look; peers get a message, unless a call into the link hangs."""
        was_aborted, self._is_aborted = self._is_aborted, True
        if not was_aborted and not self._is_closed and self._lock.acquire(timeout=ABORT_LOCK_S):
            try:
                self._say_gone()
            finally:
                self._lock.release()

    def close(self) -> None:
        """Peers that still wait for something of this rank get an error at once."""
        if self._is_closed:
            return
        self._is_closed = True
        if not self._lock.acquire(timeout=ABORT_LOCK_S):
            return  # a call into the link hangs with the lock; its memory must stay as it is
        try:
            if not self._is_aborted:
                self._is_aborted = True
                self._say_gone()
            for opened in self._state.open.values():
                if opened.end is not None:
                    opened.end()
            self._link.close()
        finally:
            self._lock.release()

    def _say_gone(self) -> None:
        for peer in self._peers:
            try:
                self._link.send(peer, HEADER.pack(GONE, 0, 0, 0))
            except TransportError:
                continue  # a peer that cannot be reached cannot be told; it has its deadline

    def _require_open(self) -> None:
        if self._is_aborted:
            raise TransportError(f"the transport of rank {self._rank} was aborted")

    def _opened(self, direction: str, parcel: Parcel, tag: int) -> Numbered:
        place = (direction, parcel.peer, tag)
        number = self._state.counts.get(place, 0)
        self._state.counts[place] = number + 1
        operation = Numbered(direction, parcel, tag, None, number)
        self._state.open[operation.key] = _Open(operation)
        return operation

    def _offered(self, parcel: Parcel, tag: int) -> Numbered:
        operation = self._opened(SEND, parcel, tag)
        num_bytes = parcel.payload.numel()
        description = b""
        if num_bytes:
            description, self._state.open[operation.key].end = self._link.offer(parcel.payload)
        self._link.send(parcel.peer, HEADER.pack(OFFER, tag, operation.number, num_bytes) + description)
        return operation

    def _advance(self) -> None:
        """Take messages in, start the reads that can start, and finish those that are done."""
        for peer, message in self._link.messages():
            self._take(peer, message)
        for key, opened in self._state.open.items():
            if opened.operation.direction == SEND or opened.is_done or opened.error is not None:
                continue  # a send ends with the peer's message, a failed receive with its `wait`
            try:
                self._advance_receive(key, opened)
            except TransportError as error:
                opened.error = str(error)

    def _take(self, peer: int, message: bytes) -> None:
        kind, tag, number, num_bytes = HEADER.unpack_from(message)
        match kind:
            case 1:
                self._state.offers[RECEIVE, peer, tag, number] = _Offer(num_bytes, message[HEADER.size :])
            case 2:
                opened = self._state.open[SEND, peer, tag, number]
                opened.is_done = True
                if opened.end is not None:
                    opened.end()
                    opened.end = None
            case 3:
                self._state.gone.add(peer)
            case _:
                raise TransportError(f"rank {peer} sent a message of unknown kind {kind}")

    def _advance_receive(self, key: Key, opened: _Open) -> None:
        parcel = opened.operation.parcel
        if opened.is_read is None:
            offer = self._state.offers.pop(key, None)
            if offer is None:
                return
            if offer.num_bytes != parcel.payload.numel():
                raise TransportError(f"{offer.num_bytes} bytes came")
            opened.is_read = (
                self._link.read(parcel.peer, offer.description, parcel.payload)
                if offer.num_bytes
                else lambda: True
            )
        if opened.is_read():
            opened.is_done = True
            self._link.send(parcel.peer, HEADER.pack(DONE, opened.operation.tag, opened.operation.number, 0))

    def _reason(self, late: Sequence[Numbered], deadline: float) -> str | None:
        """Why waiting for `late` any longer is of no use; the worst parcel is put first by `_failure`."""
        for operation in late:
            error = self._state.open[operation.key].error
            if error is not None:
                return error
        lost = sorted({one.parcel.peer for one in late} & self._state.gone)
        if lost:
            return f"connection closed by rank {lost[0]}"
        if time.monotonic() < deadline:
            return None
        if all(self._state.open[one.key].is_done for one in late):
            return "all is read, but a peer takes no messages and was not told of it by the deadline"
        return "nothing came by the deadline"

    def _failure(self, late: Sequence[Numbered], reason: str, seconds: float) -> TransportError:
        with self._lock:
            broken = [one for one in late if self._state.open[one.key].error is not None]
            lost = [one for one in late if one.parcel.peer in self._state.gone]
        first = (broken or lost or list(late))[0]
        num_bytes = sum(one.parcel.payload.numel() for one in late)
        return TransportError(
            f"{describe(first.direction, first.parcel)} failed after {seconds:.1f} s, {num_bytes} bytes with ranks "
            f"{sorted({one.parcel.peer for one in late})} outstanding: {reason}"
        )

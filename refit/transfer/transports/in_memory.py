"""The reference transport: ranks of one process, parcels in memory, and faults on demand."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Condition

from torch import Tensor

from refit.transfer.errors import TransportError
from refit.transfer.transports.seam import RECEIVE, SEND, Operation, Parcel, Ticket, describe

CORRUPT, DROP, TWICE, SWAP, STALL, FAIL = "corrupt", "drop", "twice", "swap", "stall", "fail"
FAULTS = (CORRUPT, DROP, TWICE, SWAP, STALL, FAIL)


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to parcel `number` (from 0, over all tags) from `source` to `target`.

    corrupt: one byte is flipped. drop: the receiver is told that it arrived, and gets nothing. twice: the parcel after
    it is replaced by it. swap: it changes places with the parcel after it. stall: it never arrives. fail: the post
    raises.
    """

    kind: str
    source: int
    target: int
    number: int

    def __post_init__(self) -> None:
        if self.kind not in FAULTS:
            raise TransportError(f"a fault can be one of {', '.join(FAULTS)}, got {self.kind!r}")


class InMemoryNetwork:
    """Connects transports of ranks that live in threads of one process."""

    def __init__(self, ranks: Sequence[int], fault: Fault | None = None) -> None:
        self.ranks = tuple(ranks)
        self.changed = Condition()
        self.aborted: set[int] = set()
        self._fault = fault
        self._boxes: dict[tuple[int, int, int], deque[Tensor | None]] = {}
        self._counts: dict[tuple[int, int], int] = {}
        self._held: Tensor | None = None
        self._held_place: tuple[int, int, int] | None = None

    def transport(self, rank: int) -> "InMemoryTransport":
        """The end of one joint rank."""
        return InMemoryTransport(self, rank)

    def put(self, source: int, parcel: Parcel, tag: int) -> None:
        """Deliver a copy of the payload, or do to it what the fault says."""
        with self.changed:
            pair = (source, parcel.peer)
            number = self._counts.get(pair, 0)
            self._counts[pair] = number + 1
            fault = self._fault
            payload = parcel.payload.clone()
            place = (source, parcel.peer, tag)
            if fault is None or (fault.source, fault.target) != pair:
                self._deliver(place, payload)
            elif number == fault.number:
                self._strike(fault, place, payload)
            elif number == fault.number + 1 and self._held is not None and self._held_place is not None:
                self._deliver(place, _fitted(self._held, payload))
                if fault.kind == SWAP:
                    self._deliver(self._held_place, _fitted(payload, self._held))
                self._held = None
            else:
                self._deliver(place, payload)
            self.changed.notify_all()

    def take(self, source: int, target: int, tag: int) -> tuple[bool, Tensor | None]:
        """Whether a parcel is there, and its payload (None if it was dropped). Call with `changed` held."""
        box = self._boxes.get((source, target, tag))
        return (True, box.popleft()) if box else (False, None)

    def _strike(self, fault: Fault, place: tuple[int, int, int], payload: Tensor) -> None:
        match fault.kind:
            case "corrupt":
                payload[payload.numel() // 2] ^= 1
                self._deliver(place, payload)
            case "drop":
                self._deliver(place, None)
            case "twice":
                self._held, self._held_place = payload, place
                self._deliver(place, payload)
            case "swap":
                self._held, self._held_place = payload, place
            case "fail":
                raise TransportError(f"send of parcel {fault.number} to rank {fault.target} failed on demand")
            case _:
                assert fault.kind == STALL, f"fault {fault.kind} is not implemented"

    def _deliver(self, place: tuple[int, int, int], payload: Tensor | None) -> None:
        self._boxes.setdefault(place, deque()).append(payload)


class InMemoryTransport:
    """One rank's end of an InMemoryNetwork."""

    gathers = False

    def __init__(self, network: InMemoryNetwork, rank: int) -> None:
        self._network = network
        self._rank = rank

    def post(self, sends: Sequence[Parcel], receives: Sequence[Parcel], tag: int) -> Ticket:
        self._require_open()
        for parcel in (*sends, *receives):
            if parcel.peer == self._rank or parcel.peer not in self._network.ranks:
                raise TransportError(
                    f"rank {parcel.peer} is not a peer of rank {self._rank} in {self._network.ranks}"
                )
        for parcel in sends:
            self._network.put(self._rank, parcel, tag)
        sent = [Operation(SEND, parcel, tag) for parcel in sends]
        return (*[Operation(RECEIVE, parcel, tag) for parcel in receives], *sent)

    def wait(self, ticket: Ticket, deadline: float) -> None:
        for operation in ticket:
            if operation.direction == RECEIVE:
                self._receive(operation, deadline)

    def abort(self) -> None:
        with self._network.changed:
            self._network.aborted.add(self._rank)
            self._network.changed.notify_all()

    def close(self) -> None:
        """There is nothing to give back."""

    def _receive(self, operation: Operation, deadline: float) -> None:
        network, parcel = self._network, operation.parcel
        words = describe(RECEIVE, parcel)
        with network.changed:
            while True:
                self._require_open()
                is_there, payload = network.take(parcel.peer, self._rank, operation.tag)
                if is_there:
                    break
                if parcel.peer in network.aborted:
                    raise TransportError(f"{words} failed: connection closed by rank {parcel.peer}")
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise TransportError(f"{words} failed: nothing came by the deadline")
                network.changed.wait(left_s)
        if payload is None:
            return
        if payload.numel() != parcel.payload.numel():
            raise TransportError(f"{words} failed: {payload.numel()} bytes came")
        parcel.payload.copy_(payload)

    def _require_open(self) -> None:
        if self._rank in self._network.aborted:
            raise TransportError(f"the transport of rank {self._rank} was aborted")


def _fitted(payload: Tensor, like: Tensor) -> Tensor:
    """`payload` at the size of `like`, so that a swap shows in the contents and not only in the size."""
    fitted = like.clone()
    num_bytes = min(fitted.numel(), payload.numel())
    fitted[:num_bytes].copy_(payload[:num_bytes])
    return fitted

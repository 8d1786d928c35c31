"""The seam: what moves parcels of bytes between joint ranks, in four methods."""

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import Work

from refit.transfer.errors import TransportError

SEND, RECEIVE = "send", "receive"


@dataclass(frozen=True, slots=True)
class Pieces:
    """Places of bytes in their order: `table` is int64 [n, 2] of address and bytes, `ends` [n] sums the bytes up.

    Neither is written to by a transport, and the memory they speak of is the caller's to keep.
    """

    table: Tensor
    ends: Tensor

    @classmethod
    def of(cls, table: Tensor) -> "Pieces":
        return cls(table, table[:, 1].cumsum(0))

    @property
    def num_bytes(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0


@dataclass(frozen=True, slots=True)
class Parcel:
    """`payload` (contiguous uint8, one dim) goes to, or comes from, joint rank `peer`.

    `pieces`, only for a transport that gathers: the bytes lie there instead, and `payload` is empty.
    """

    peer: int
    payload: Tensor
    pieces: Pieces | None = None

    @property
    def num_bytes(self) -> int:
        return self.payload.numel() if self.pieces is None else self.pieces.num_bytes

    @property
    def parts(self) -> list[Tensor]:
        """The memory itself, piece by piece; not for parcels of many pieces that have to be quick."""
        if self.pieces is None:
            return [self.payload] if self.payload.numel() else []
        return [_memory(address, num_bytes) for address, num_bytes in self.pieces.table.tolist() if num_bytes]

    def packed(self) -> "Parcel":
        """The same bytes, copied into one payload."""
        return Parcel(self.peer, torch.cat(self.parts) if self.parts else self.payload.clone())

    def places(self) -> Pieces:
        """Where the bytes lie, as `pieces`."""
        if self.pieces is not None:
            return self.pieces
        return Pieces.of(torch.tensor([[self.payload.data_ptr(), self.payload.numel()]]))


@dataclass(frozen=True, slots=True)
class Operation:
    """One posted send or receive. `work` is torch's handle, for transports that have one."""

    direction: str
    parcel: Parcel
    tag: int
    work: Work | None = None


type Ticket = tuple[Operation, ...]


def _memory(address: int, num_bytes: int) -> Tensor:
    """Bytes at an address, in place; the caller keeps them alive."""
    return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)


class Transport(Protocol):
    """Moves parcels between the ranks of one group. Parcels of a pair with one tag arrive in the order of the posts.

    `gathers`: whether parcels may have `pieces`.
    """

    @property
    def gathers(self) -> bool: ...

    def post(self, sends: Sequence[Parcel], receives: Sequence[Parcel], tag: int) -> Ticket:
        """Start all transfers and return. Payloads belong to the transport until `wait` returns."""

    def wait(self, ticket: Ticket, deadline: float) -> None:
        """Return when every transfer is done. Raises TransportError that names the peer, also at `deadline`."""

    def abort(self) -> None:
        """Free every thread that waits here and make later use fail. Callable from any thread, more than once."""

    def close(self) -> None:
        """Give all resources back."""


def describe(direction: str, parcel: Parcel) -> str:
    """Words for one transfer in a message."""
    word = "to" if direction == SEND else "from"
    return f"{direction} of {parcel.num_bytes} bytes {word} rank {parcel.peer}"


def outstanding(operations: Sequence[Operation]) -> str:
    """Words on what is not done yet, for a message."""
    num_bytes = sum(operation.parcel.num_bytes for operation in operations)
    return f"{num_bytes} bytes with ranks {sorted({o.parcel.peer for o in operations})} outstanding"


def wait_for_stream(stream: torch.cuda.Stream, deadline: float) -> None:
    """Wait for queued CUDA work with a deadline: a synchronize() has none, and an aborted NCCL call may never end."""
    event = stream.record_event()
    while not event.query():
        if time.monotonic() > deadline:
            raise TransportError(
                "the CUDA stream of this transfer has not finished by its deadline; a peer is stuck"
            )
        time.sleep(0.0002)

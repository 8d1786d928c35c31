"""Parcels over TCP connections of our own, gathered from and scattered to memory wherever it lies.

    sender    HEADER (tag, bytes), then the bytes, by writev from all their places
    receiver  HEADER, then readv into the places of the receive that is posted for that tag

Nobody copies bytes together first, and nobody asks before he sends: the kernel's buffers hold back a sender whose
receiver is late. No thread is needed: `post` sends what the kernel takes, and `wait` serves all connections. A parcel
whose receive is not posted holds up those behind it, so both ends of a pair post their tags in orders that meet.
"""

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from refit.transfer.errors import TransportError
from refit.transfer.transports.seam import (
    RECEIVE,
    SEND,
    Operation,
    Parcel,
    Pieces,
    Ticket,
    describe,
    outstanding,
)

HEADER = struct.Struct("<QQ")  # tag, bytes that follow
MOST_PIECES = 1024  # IOV_MAX of Linux
LOOK_S = 0.25  # longest time that nobody looks whether the transport was aborted
MOST_CALLS = 8  # of one connection before the others have their turn
AGAIN = (errno.EAGAIN, errno.EINTR)
_LIBC = ctypes.CDLL(None, use_errno=True)
for _call in (_LIBC.readv, _LIBC.writev):
    _call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
    _call.restype = ctypes.c_ssize_t


class _Transfer:
    """The bytes of one operation, and how far they have come. `tag`: of a send, which has a header before its bytes.

    The kernel reads a table [n + 1, 2] of address and bytes that is cut off as bytes are done: the header, the pieces.
    """

    def __init__(self, pieces: Pieces, tag: int | None = None) -> None:
        self.num_bytes = pieces.num_bytes
        self._count = len(pieces.table)
        self._pieces = pieces  # `_ends` is a view of its memory
        self._ends = (ctypes.c_int64 * self._count).from_address(pieces.ends.data_ptr())
        self._table = torch.empty((1 + self._count, 2), dtype=torch.int64)
        self._table[1:] = pieces.table
        self._address = self._table.data_ptr()
        self._vector = (ctypes.c_int64 * self._table.numel()).from_address(self._address)
        self._row, self._used, self._done = 1, 0, 0
        if tag is not None:
            self._header = ctypes.create_string_buffer(HEADER.pack(tag, self.num_bytes), HEADER.size)
            self._vector[0], self._vector[1] = ctypes.addressof(self._header), HEADER.size
            self._row, self._done = 0, -HEADER.size

    @property
    def left_bytes(self) -> int:
        return self.num_bytes - self._done

    def step(self, call: "ctypes._NamedFuncPointer", fd: int) -> int:
        """One readv or writev from where it stopped. Returns the bytes, -1 if the kernel takes or has none now."""
        count = min(MOST_PIECES, 1 + self._count - self._row)
        done: int = call(fd, self._address + 16 * self._row, count)
        if done > 0:
            self._advance(done)
        elif done < 0 and ctypes.get_errno() not in AGAIN:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return done

    def _advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._done == self.num_bytes:
            return
        row = self._row_of(self._done)
        used = self._done - self._start(row)
        new = used - (self._used if row == self._row else 0)
        self._vector[2 * row] += new
        self._vector[2 * row + 1] -= new
        self._row, self._used = row, used

    def _row_of(self, done: int) -> int:
        """The row of the next byte after `done`: at most MOST_PIECES after the present one."""
        if done < 0:
            return 0
        first = max(0, self._row - 1)
        return 1 + bisect_right(self._ends, done, first, min(first + MOST_PIECES, self._count))

    def _start(self, row: int) -> int:
        """Bytes before a row; the header's are counted as negative."""
        return self._ends[row - 2] if row > 1 else -HEADER.size if row == 0 else 0


@dataclass(frozen=True, slots=True, eq=False)
class _Streamed(Operation):
    """An operation with its transfer."""

    transfer: _Transfer = field(kw_only=True)


class _Connection:
    """One peer: what is to be sent in order, what is expected by tag, and the parcel that is coming in."""

    def __init__(self, peer: int, link: socket.socket) -> None:
        self.peer = peer
        self.link = link
        self.fd = link.fileno()
        self.sends: deque[_Transfer] = deque()
        self.receives: dict[int, deque[_Transfer]] = {}
        self.error: str | None = None
        self._incoming: _Transfer | None = None
        self._header = bytearray()

    @property
    def events(self) -> int:
        """What `poll` is to report: bytes that have a place here, room for bytes that wait to go."""
        is_expecting = self._incoming is not None or (len(self._header) < HEADER.size and bool(self.receives))
        return (select.POLLIN if is_expecting else 0) | (select.POLLOUT if self.sends else 0)

    def expect(self, tag: int, transfer: _Transfer) -> None:
        self.receives.setdefault(tag, deque()).append(transfer)
        if self._incoming is None and len(self._header) == HEADER.size:
            self._meet()

    def write(self) -> None:
        """Send what the kernel takes, in one call or a few."""
        try:
            for _ in range(MOST_CALLS):
                if not self.sends or self.sends[0].step(_LIBC.writev, self.fd) < 0:
                    return
                if not self.sends[0].left_bytes:
                    self.sends.popleft()
        except OSError as error:
            self.error = self.error or str(error)

    def read(self) -> None:
        """Take what has come, as far as it has a place, in one call or a few."""
        try:
            for _ in range(MOST_CALLS):
                if not self.events & select.POLLIN:
                    return
                got = (
                    self._read_header()
                    if self._incoming is None
                    else self._incoming.step(_LIBC.readv, self.fd)
                )
                if got == 0:
                    self.error = self.error or "it closed the connection"
                if self._incoming is not None and not self._incoming.left_bytes:
                    self._incoming = None
                if got <= 0:
                    return
        except BlockingIOError:
            return
        except OSError as error:
            self.error = self.error or str(error)

    def _read_header(self) -> int:
        part = self.link.recv(HEADER.size - len(self._header))
        self._header += part
        if len(self._header) == HEADER.size:
            self._meet()
        return len(part)

    def _meet(self) -> None:
        """Find the receive that the header asks for; without one the header stays."""
        tag, num_bytes = HEADER.unpack(self._header)
        waiting = self.receives.get(tag)
        if not waiting:
            return
        if waiting[0].num_bytes != num_bytes:
            self.error = f"it sends {num_bytes} bytes for tag {tag}, {waiting[0].num_bytes} are expected"
            return
        incoming = waiting.popleft()
        self._incoming = incoming if incoming.num_bytes else None
        self._header.clear()
        if not waiting:
            del self.receives[tag]


class TcpTransport:
    """One rank's end: `links` are connected sockets by joint rank. One thread at a time, but for `abort`."""

    gathers = True

    def __init__(self, links: Mapping[int, socket.socket], rank: int) -> None:
        self._rank = rank
        self._connections = {peer: _Connection(peer, link) for peer, link in links.items()}
        for link in links.values():
            link.setblocking(False)
        self.is_aborted = False

    def post(self, sends: Sequence[Parcel], receives: Sequence[Parcel], tag: int) -> Ticket:
        self._require_open()
        posted: list[Operation] = []
        for parcel in receives:
            transfer = _Transfer(parcel.places())
            self._connection(parcel).expect(tag, transfer)
            posted.append(_Streamed(RECEIVE, parcel, tag, transfer=transfer))
        for parcel in sends:
            transfer = _Transfer(parcel.places(), tag)
            self._connection(parcel).sends.append(transfer)
            posted.append(_Streamed(SEND, parcel, tag, transfer=transfer))
        for peer in dict.fromkeys(parcel.peer for parcel in sends):
            self._connections[peer].write()
        return tuple(posted)

    def wait(self, ticket: Ticket, deadline: float) -> None:
        began = time.monotonic()
        left = deque(operation for operation in ticket if isinstance(operation, _Streamed))
        assert len(left) == len(ticket), "a ticket of another transport"
        while True:
            self._require_open()
            while left and not left[0].transfer.left_bytes:
                left.popleft()
            if not left:
                return
            now = time.monotonic()
            if now >= deadline or any(c.error is not None for c in self._connections.values()):
                self._raise_if_lost(left, began, now >= deadline)
            self._serve(deadline - now)

    def _raise_if_lost(self, waiting: Iterable[_Streamed], began: float, is_late: bool) -> None:
        """Name the first operation whose connection is lost, or, if it is late, the first of all."""
        left = [operation for operation in waiting if operation.transfer.left_bytes]
        lost = [operation for operation in left if self._connections[operation.parcel.peer].error is not None]
        if not lost and not is_late:
            return
        first = (lost or left)[0]
        reason = self._connections[first.parcel.peer].error or "nothing more came or went by the deadline"
        raise TransportError(
            f"{describe(first.direction, first.parcel)} failed after {time.monotonic() - began:.1f} s, "
            f"{outstanding(left)}: {reason}"
        )

    def _serve(self, left_s: float) -> None:
        """Wait until a connection can go on, and let it. Returns after LOOK_S anyway, for `abort`."""
        poller = select.poll()
        waiting = {c.fd: c for c in self._connections.values() if c.error is None and c.events}
        for fd, connection in waiting.items():
            poller.register(fd, connection.events)
        for fd, events in poller.poll(1000 * min(left_s, LOOK_S)):
            connection = waiting[fd]
            if events & ~select.POLLOUT:
                connection.read()
            if events & ~select.POLLIN:
                connection.write()

    def _connection(self, parcel: Parcel) -> _Connection:
        connection = self._connections.get(parcel.peer)
        if connection is None:
            raise TransportError(
                f"rank {parcel.peer} is not a peer of rank {self._rank}; its peers are {[*self._connections]}"
            )
        return connection

    def _require_open(self) -> None:
        if self.is_aborted:
            raise TransportError(f"the transport of rank {self._rank} was aborted")

    def abort(self) -> None:
        """All local waits end within LOOK_S, and the peers see the connections closed."""
        self.is_aborted = True
        for connection in self._connections.values():
            with contextlib.suppress(OSError):  # the peer may have closed it before
                connection.link.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connections; what is on its way still arrives."""
        self.is_aborted = True
        for connection in self._connections.values():
            connection.link.close()

"""A transport on a torch process group, gloo or NCCL."""

import contextlib
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
from torch._C._distributed_c10d import ProcessGroup, Work

from refit.transfer.errors import TransportError
from refit.transfer.transports.seam import (
    RECEIVE,
    SEND,
    Operation,
    Parcel,
    Ticket,
    describe,
    outstanding,
    wait_for_stream,
)

ABORT_TAG = 1 << 30  # never used for a parcel
PROBE_TAG = ABORT_TAG + 1
SHORTEST_WAIT_S = 0.001  # gloo takes 0 for "no limit"


class ProcessGroupTransport:
    """Parcels over a torch process group (gloo or NCCL). `ranks[i]` is the joint rank of group rank i."""

    gathers = False

    def __init__(self, process_group: ProcessGroup, ranks: Sequence[int], rank: int) -> None:
        self._process_group = process_group
        self._positions = {joint: position for position, joint in enumerate(ranks)}
        self._position = self._positions[rank]
        self._is_gloo = process_group.name() == "gloo"
        self.is_aborted = False

    def post(self, sends: Sequence[Parcel], receives: Sequence[Parcel], tag: int) -> Ticket:
        group = self._process_group
        wanted = [(RECEIVE, parcel) for parcel in receives] + [(SEND, parcel) for parcel in sends]
        if not self._is_gloo and wanted:
            return self._post_together(wanted, tag)
        posted: list[Operation] = []
        for direction, parcel in wanted:
            start = group.send if direction == SEND else group.recv
            try:
                work = start([parcel.payload], self._position_of(parcel), tag)
            except RuntimeError as error:
                raise TransportError(f"cannot post a {describe(direction, parcel)}: {error}") from error
            posted.append(Operation(direction, parcel, tag, work))
        return tuple(posted)

    def _post_together(self, wanted: Sequence[tuple[str, Parcel]], tag: int) -> Ticket:
        """NCCL: one group call, so that sends and receives of a round cannot wait for each other."""
        group, device = self._process_group, wanted[0][1].payload.device
        positions = [self._position_of(parcel) for _, parcel in wanted]
        try:
            group._start_coalescing(device)
            for (direction, parcel), position in zip(wanted, positions, strict=True):
                start = group.send if direction == SEND else group.recv
                start([parcel.payload], position, 0)
            work = group._end_coalescing(device)
        except RuntimeError as error:
            words = ", ".join(describe(direction, parcel) for direction, parcel in wanted)
            raise TransportError(f"cannot post a {words}: {error}") from error
        return tuple(Operation(direction, parcel, tag, work) for direction, parcel in wanted)

    def _position_of(self, parcel: Parcel) -> int:
        position = self._positions.get(parcel.peer)
        if position is None or position == self._position:
            raise TransportError(
                f"rank {parcel.peer} is not a peer in this group; its ranks are {[*self._positions]}"
            )
        return position

    def wait(self, ticket: Ticket, deadline: float) -> None:
        start = time.monotonic()
        for number, operation in enumerate(ticket):
            assert operation.work is not None, "an operation of a process group has a work handle"
            left_s = max(SHORTEST_WAIT_S, deadline - time.monotonic())
            try:
                operation.work.wait(timedelta(seconds=left_s))
            except RuntimeError as error:
                raise TransportError(
                    f"{describe(operation.direction, operation.parcel)} failed after "
                    f"{time.monotonic() - start:.1f} s, {outstanding(ticket[number:])}: {error}"
                ) from error
        if ticket and ticket[0].parcel.payload.is_cuda:
            wait_for_stream(torch.cuda.current_stream(), deadline)
        if self.is_aborted:  # an aborted NCCL call may return as if it had ended
            raise TransportError(f"the transport of position {self._position} was aborted")

    def wait_collective(self, words: str, work: Work, deadline: float) -> None:
        """Wait for one collective. Raises TransportError that begins with `words` and names the peers that are lost."""
        try:
            wait_for_work(words, work, deadline)
        except TransportError as error:
            raise TransportError(f"{error}{self.lost()}") from error
        if self.is_aborted:  # an aborted NCCL call may return as if it had ended
            raise TransportError(f"{words}: the transport of position {self._position} was aborted")

    def lost(self) -> str:
        """Words on the peers whose connection is closed, for the end of a message; none if there is no such peer.

        A collective of gloo does not say which peer it lost, but a closed pair refuses a send at once. Only after a
        failure: the byte that goes to the others is never received. Pairs that a time-out closed say nothing.
        """
        found = [
            joint for joint, at in self._positions.items() if at != self._position and self._is_closed(at)
        ]
        if not found:
            return ""
        return f" (closed: {', '.join(f'the connection to rank {joint}' for joint in found)})"

    def _is_closed(self, position: int) -> bool:
        if not self._is_gloo or self.is_aborted:
            return False
        try:
            self._process_group.send([torch.empty(1, dtype=torch.uint8)], position, PROBE_TAG)
        except RuntimeError as error:
            return "timeout" not in str(error).lower()
        return False

    def abort(self) -> None:
        """gloo ignores abort() and shutdown() (torch 2.13), but a receive that times out closes all pairs of its group.

        That frees all local waiters at once, and the peers see the connection closed. A peer that has left before lets
        no receive from it time out, so every peer is tried: the first that is there closes them all.
        """
        self.is_aborted = True
        if not self._is_gloo:
            self._process_group.abort()
            return
        for other in self._positions.values():
            if other == self._position:
                continue
            with contextlib.suppress(
                RuntimeError
            ):  # the time-out that is wanted, or this pair was closed before
                work = self._process_group.recv([torch.empty(1, dtype=torch.uint8)], other, ABORT_TAG)
                work.wait(timedelta(seconds=SHORTEST_WAIT_S))

    def close(self) -> None:
        if not self._is_gloo:
            self._process_group.shutdown()


def wait_for_work(words: str, work: Work, deadline: float) -> None:
    """Wait for one collective. Raises TransportError that begins with `words`."""
    began = time.monotonic()
    try:
        work.wait(timedelta(seconds=max(SHORTEST_WAIT_S, deadline - began)))
    except RuntimeError as error:
        raise TransportError(f"{words} failed after {time.monotonic() - began:.1f} s: {error}") from error

"""Messages between ranks of one machine: a datagram socket each, in a folder that only its user can enter."""

import shutil
import socket
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from refit.transfer.errors import TransportError
from refit.transfer.rendezvous import ControlStore

LARGEST_MESSAGE_BYTES = 64 << 10


class LocalMail:
    """One rank's box. Messages of one sender arrive in order; none is lost while both ends live."""

    def __init__(self, box: socket.socket, folder: Path, peers: Mapping[int, str]) -> None:
        self._box = box
        self._folder = folder
        self._peers = peers
        self._ranks = {address: rank for rank, address in peers.items()}
        self._outboxes: dict[int, deque[bytes]] = {peer: deque() for peer in peers}

    @classmethod
    def open(
        cls, control: ControlStore, name: str, ranks: Sequence[int], rank: int, deadline: float
    ) -> "LocalMail":
        """Make a box and learn the others' addresses. Raises TransportError if a rank runs on another machine."""
        folder = Path(tempfile.mkdtemp(prefix="refit-mail-"))
        box = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            box.setblocking(False)
            box.bind(str(folder / "box"))
            return cls(box, folder, _meet(control, name, ranks, rank, str(folder / "box"), deadline))
        except BaseException:
            box.close()
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def send(self, peer: int, message: bytes) -> None:
        """Send now, or as soon as the peer's box has room. Raises TransportError when the peer's box is gone."""
        assert len(message) <= LARGEST_MESSAGE_BYTES, f"a message of {len(message)} bytes"
        self._outboxes[peer].append(message)
        self._flush(peer)

    @property
    def is_flushed(self) -> bool:
        """Whether no message waits for room in a peer's box."""
        return not any(self._outboxes.values())

    def messages(self) -> list[tuple[int, bytes]]:
        """All that has arrived since the last call."""
        for peer, waiting in self._outboxes.items():
            if waiting:
                self._flush(peer)
        found: list[tuple[int, bytes]] = []
        while True:
            try:
                message, address = self._box.recvfrom(LARGEST_MESSAGE_BYTES)
            except BlockingIOError:
                return found
            found.append((self._ranks[address], message))

    def close(self) -> None:
        """Give the box up; what is not sent yet is dropped."""
        self._box.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _flush(self, peer: int) -> None:
        """The kernel keeps about ten messages a box; what does not fit waits here for the next call."""
        waiting = self._outboxes[peer]
        while waiting:
            try:
                self._box.sendto(waiting[0], self._peers[peer])
            except BlockingIOError:
                return
            except OSError as error:
                waiting.clear()
                raise TransportError(f"cannot send a message to rank {peer}: {error}; it has left") from error
            waiting.popleft()


def _meet(
    control: ControlStore, name: str, ranks: Sequence[int], rank: int, address: str, deadline: float
) -> dict[int, str]:
    """Publish the own address; the others' by rank."""
    here = socket.gethostname()
    control.put(f"mail/{name}/{rank}", [here, address])
    peers: dict[int, str] = {}
    for peer in ranks:
        if peer == rank:
            continue
        found = control.get(f"mail/{name}/{peer}", deadline - time.monotonic())
        assert isinstance(found, list), f"the address of rank {peer} is {found!r}"
        if found[0] != here:
            raise TransportError(
                f"rank {rank} is on {here}, rank {peer} on {found[0]}; they can share no memory, "
                "use refit.transport=auto or nixl"
            )
        peers[peer] = found[1]
    return peers

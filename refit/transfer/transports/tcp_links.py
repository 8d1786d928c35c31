"""One TCP connection per pair of a group: each rank listens, and connects to those before it in the group.

A rank publishes its address and a secret in the control store. Who connects says the secret and his rank; a stranger's
connection is closed.
"""

import contextlib
import fcntl
import hmac
import os
import secrets
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import ExitStack

from refit.transfer.errors import TransportError
from refit.transfer.rendezvous import ControlStore
from refit.transfer.transports.tcp import TcpTransport

HELLO = struct.Struct("<32sI")  # secret of the one who listens, joint rank of the one who connects
HELLO_S = 5.0  # longest wait for the hello of one connection
INTERFACE = "GLOO_SOCKET_IFNAME"  # as for gloo's own connections
LOCAL_BUFFER_BYTES = (
    512 << 10
)  # half of what Linux allots; to a rank of this machine, so that it stays in the cache
SIOCGIFADDR = 0x8915  # ioctl of Linux: the address of an interface


def open_transport(
    control: ControlStore, name: str, ranks: Sequence[int], rank: int, deadline: float
) -> TcpTransport:
    """One rank's end of group `name`. Collective over `ranks`; raises TransportError at the deadline."""
    with ExitStack() as undo:
        links = _links(control, name, ranks, rank, deadline, undo)
        undo.pop_all()  # the transport closes them now
    return TcpTransport(links, rank)


def _links(
    control: ControlStore, name: str, ranks: Sequence[int], rank: int, deadline: float, undo: ExitStack
) -> dict[int, socket.socket]:
    own, secret = own_address(control), secrets.token_bytes(32)
    links: dict[int, socket.socket] = {}
    family = socket.AF_INET6 if ":" in own else socket.AF_INET
    with socket.create_server((own, 0), family=family, backlog=len(ranks)) as listener:
        control.put(f"tcp/{name}/{rank}", [own, listener.getsockname()[1], secret.hex()])
        for peer in ranks[: ranks.index(rank)]:
            found = control.get(f"tcp/{name}/{peer}", deadline - time.monotonic())
            assert isinstance(found, list), f"the address of rank {peer} is {found!r}"
            links[peer] = _connected(rank, peer, found, deadline)
            undo.callback(links[peer].close)
        missing = set(ranks[ranks.index(rank) + 1 :])
        while missing:
            peer, link = _accepted(listener, secret, rank, missing, deadline)
            links[peer] = link
            undo.callback(link.close)
            missing.remove(peer)
    for link in links.values():
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if link.getpeername()[0] == link.getsockname()[0]:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOCAL_BUFFER_BYTES)
    return links


def _connected(rank: int, peer: int, found: Sequence[object], deadline: float) -> socket.socket:
    address, port, secret = str(found[0]), int(str(found[1])), bytes.fromhex(str(found[2]))
    try:
        link = socket.create_connection((address, port), max(0.001, deadline - time.monotonic()))
        link.sendall(HELLO.pack(secret, rank))
    except OSError as error:
        raise TransportError(
            f"rank {rank} cannot connect to rank {peer} at {address}:{port}: {error}; "
            f"{INTERFACE} chooses the interface that ranks listen on"
        ) from error
    return link


def _accepted(
    listener: socket.socket, secret: bytes, rank: int, missing: set[int], deadline: float
) -> tuple[int, socket.socket]:
    """The next connection of one of the `missing`."""
    while True:
        listener.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            link, _ = listener.accept()
        except OSError as error:
            raise TransportError(f"rank {rank}: ranks {sorted(missing)} did not connect: {error}") from error
        link.settimeout(HELLO_S)
        hello = b""
        with contextlib.suppress(OSError):  # who says nothing is a stranger
            hello = link.recv(HELLO.size, socket.MSG_WAITALL)
        if len(hello) == HELLO.size:
            said, peer = HELLO.unpack(hello)
            if hmac.compare_digest(said, secret) and peer in missing:
                return peer, link
        link.close()


def own_address(control: ControlStore) -> str:
    """Of the interface that INTERFACE names, or else of the one on the way to the control store."""
    name = os.environ.get(INTERFACE, "").split(",")[0]
    if name:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError as error:
                raise TransportError(
                    f"{INTERFACE} is {name!r}, which has no IPv4 address: {error}"
                ) from error
        return socket.inet_ntoa(found[20:24])
    family, kind, _, _, where = socket.getaddrinfo(control.address, control.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)  # sends nothing
        return str(probe.getsockname()[0])

"""One conformance suite for every transport. A new transport is one more `Network` in NETWORKS."""

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import pytest
import torch

from refit.transfer.errors import TransportError
from refit.transfer.groups import open_group
from refit.transfer.rendezvous import ControlStore
from refit.transfer.transports import tcp_links
from refit.transfer.transports.in_memory import InMemoryNetwork
from refit.transfer.transports.ipc_link import IpcLink
from refit.transfer.transports.local_mail import LocalMail
from refit.transfer.transports.nixl_link import open_transport
from refit.transfer.transports.one_sided import OneSidedTransport
from refit.transfer.transports.process_group import ProcessGroupTransport
from refit.transfer.transports.seam import Parcel, Transport

RANKS = (3, 5, 8)


class Network(Protocol):
    """Opens one transport per rank of RANKS, all in this process."""

    def __call__(self) -> dict[int, Transport]: ...


def memory() -> dict[int, Transport]:
    network = InMemoryNetwork(RANKS)
    return {rank: network.transport(rank) for rank in RANKS}


def gloo() -> dict[int, Transport]:
    host = ControlStore.host()

    def connect(rank: int) -> Transport:
        control = ControlStore.join("127.0.0.1", host.port, host.run_id)
        group = open_group(control, "suite", RANKS, rank, "gloo", time.monotonic() + 30)
        assert isinstance(group.transport, ProcessGroupTransport)
        return group.transport

    return dict(zip(RANKS, at_once([lambda rank=rank: connect(rank) for rank in RANKS]), strict=True))


def tcp() -> dict[int, Transport]:
    host = ControlStore.host()

    def connect(rank: int) -> Transport:
        control = ControlStore.join("127.0.0.1", host.port, host.run_id)
        return tcp_links.open_transport(control, "suite", RANKS, rank, time.monotonic() + 30)

    return dict(zip(RANKS, at_once([lambda rank=rank: connect(rank) for rank in RANKS]), strict=True))


def nixl() -> dict[int, Transport]:
    """Agents of one process; two processes are in test_one_sided.py."""
    host = ControlStore.host()

    def connect(rank: int) -> Transport:
        control = ControlStore.join("127.0.0.1", host.port, host.run_id)
        return open_transport(control, "suite", RANKS, rank, time.monotonic() + 30)

    return dict(zip(RANKS, at_once([lambda rank=rank: connect(rank) for rank in RANKS]), strict=True))


class OwnMemory:
    """Memory of this process by its address: what CUDA IPC is between processes that share a GPU."""

    def describe(self, payload: torch.Tensor) -> bytes:
        return b"%d %d" % (payload.data_ptr(), payload.numel())

    def open(self, description: bytes, like: torch.Tensor) -> torch.Tensor:
        address, num_bytes = map(int, description.split())
        return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)


def ipc() -> dict[int, Transport]:
    """The CUDA IPC transport without CUDA; two processes on one GPU are in tests/gpu."""
    host = ControlStore.host()

    def connect(rank: int) -> Transport:
        control = ControlStore.join("127.0.0.1", host.port, host.run_id)
        mail = LocalMail.open(control, "suite", RANKS, rank, time.monotonic() + 30)
        return OneSidedTransport(IpcLink(mail, OwnMemory()), RANKS, rank)

    return dict(zip(RANKS, at_once([lambda rank=rank: connect(rank) for rank in RANKS]), strict=True))


NETWORKS: tuple[Network, ...] = (memory, gloo, tcp, nixl, ipc)


def at_once(calls: Sequence[Callable[[], object]]) -> list[object]:
    """Results of calls that run in threads of their own; raises the first error."""
    results: list[object] = [None] * len(calls)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            results[number] = calls[number]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a transport call hangs"
    if errors:
        raise errors[0]
    return results


@pytest.fixture(params=NETWORKS, ids=lambda network: network.__name__)
def ends(request):
    transports = request.param()
    yield transports
    for transport in transports.values():
        transport.abort()
        transport.close()


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


def noise(num_bytes: int, seed: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("num_bytes", [1, 16, 1000, 3 << 20])
def test_parcels_arrive_between_all_pairs_at_once(ends, num_bytes):
    def exchange(rank):
        others = [peer for peer in RANKS if peer != rank]
        landing = {peer: torch.zeros(num_bytes, dtype=torch.uint8) for peer in others}
        sends = [Parcel(peer, noise(num_bytes, 10 * rank + peer)) for peer in others]
        ticket = ends[rank].post(sends, [Parcel(peer, landing[peer]) for peer in others], 0)
        ends[rank].wait(ticket, soon())
        for peer in others:
            assert torch.equal(landing[peer], noise(num_bytes, 10 * peer + rank))

    at_once([lambda rank=rank: exchange(rank) for rank in RANKS])


def test_tags_keep_parcels_apart_whatever_the_order(ends):
    landing = {tag: torch.zeros(100, dtype=torch.uint8) for tag in (1, 2, 3)}

    def send():
        tickets = [ends[3].post([Parcel(5, noise(100, tag))], [], tag) for tag in (1, 2, 3)]
        for ticket in tickets:
            ends[3].wait(ticket, soon())

    def receive():
        tickets = [ends[5].post([], [Parcel(3, landing[tag])], tag) for tag in (3, 1, 2)]
        for ticket in reversed(tickets):
            ends[5].wait(ticket, soon())

    at_once([send, receive])
    for tag, payload in landing.items():
        assert torch.equal(payload, noise(100, tag))


def test_parcels_of_one_tag_arrive_in_the_order_of_the_posts(ends):
    landing = [torch.zeros(64, dtype=torch.uint8) for _ in range(20)]

    def send():
        for ticket in [ends[3].post([Parcel(8, noise(64, i))], [], 7) for i in range(20)]:
            ends[3].wait(ticket, soon())

    def receive():
        for ticket in [ends[8].post([], [Parcel(3, payload)], 7) for payload in landing]:
            ends[8].wait(ticket, soon())

    at_once([send, receive])
    for i, payload in enumerate(landing):
        assert torch.equal(payload, noise(64, i))


def test_a_sender_that_is_busy_hears_of_every_parcel_although_its_receivers_leave(ends):
    """A mailbox keeps ten messages or so: what did not fit must not stay with a receiver that has all it wants."""
    receivers, count = RANKS[1:], 10
    landing = {rank: [torch.zeros(64, dtype=torch.uint8) for _ in range(count)] for rank in receivers}

    def send():
        sends = [Parcel(rank, noise(64, i)) for rank in receivers for i in range(count)]
        ticket = ends[3].post(sends, [], 0)
        time.sleep(0.5)  # by now every parcel is read
        ends[3].wait(ticket, soon(10))

    def receive(rank):
        ends[rank].wait(ends[rank].post([], [Parcel(3, payload) for payload in landing[rank]], 0), soon())

    at_once([send, *(lambda rank=rank: receive(rank) for rank in receivers)])
    for rank in receivers:
        assert all(torch.equal(payload, noise(64, i)) for i, payload in enumerate(landing[rank]))


def test_a_parcel_that_never_comes_is_an_error_at_the_deadline_that_names_the_peer(ends):
    ticket = ends[3].post([], [Parcel(8, torch.zeros(16, dtype=torch.uint8))], 0)
    began = time.monotonic()
    with pytest.raises(TransportError, match="16 bytes from rank 8"):
        ends[3].wait(ticket, began + 0.5)
    assert 0.4 < time.monotonic() - began < 2


def test_abort_frees_a_blocked_rank_and_its_peers(ends):
    def blocked(rank, peer):
        ticket = ends[rank].post([], [Parcel(peer, torch.zeros(16, dtype=torch.uint8))], 0)
        began = time.monotonic()
        with pytest.raises(TransportError):
            ends[rank].wait(ticket, soon(30))
        return time.monotonic() - began

    def breaker():
        time.sleep(0.5)
        ends[3].abort()
        ends[3].abort()

    for seconds in at_once([lambda: blocked(3, 5), lambda: blocked(5, 3), breaker])[:2]:
        assert seconds < 5


def test_abort_frees_a_rank_that_waits_for_one_peer_after_another_has_left(ends):
    """Of three ranks the first leaves, as a rank that hears of a failure does; the last still waits for the second."""
    ends[3].abort()

    def blocked():
        ticket = ends[8].post([], [Parcel(5, torch.zeros(16, dtype=torch.uint8))], 0)
        began = time.monotonic()
        with pytest.raises(TransportError):
            ends[8].wait(ticket, soon(30))
        return time.monotonic() - began

    def breaker():
        time.sleep(0.5)
        ends[8].abort()

    assert at_once([blocked, breaker])[0] < 5


def test_an_aborted_transport_refuses_further_use(ends):
    ends[3].abort()
    with pytest.raises(TransportError):
        ticket = ends[3].post([Parcel(5, noise(16, 0))], [], 0)
        ends[3].wait(ticket, soon(5))


def test_a_stranger_is_refused_by_name(ends):
    for stranger in (3, 99):
        with pytest.raises(TransportError, match=f"rank {stranger} is not a peer"):
            ends[3].post([Parcel(stranger, noise(16, 0))], [], 0)

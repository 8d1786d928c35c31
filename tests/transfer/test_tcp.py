"""What the conformance suite does not ask of TCP: bytes in many places, strangers, and who is blamed."""

import socket
import threading
import time

import pytest
import torch

from refit.transfer.errors import TransportError
from refit.transfer.rendezvous import ControlStore
from refit.transfer.transports import tcp_links
from refit.transfer.transports.seam import Parcel, Pieces
from refit.transfer.transports.tcp import MOST_PIECES
from tests.transfer.test_transports import at_once, noise, soon

NO_BYTES = torch.empty(0, dtype=torch.uint8)
RANKS = (3, 5)


def opened(host, name="pair"):
    def connect(rank):
        control = ControlStore.join("127.0.0.1", host.port, host.run_id)
        return tcp_links.open_transport(control, name, RANKS, rank, time.monotonic() + 30)

    return dict(zip(RANKS, at_once([lambda rank=rank: connect(rank) for rank in RANKS]), strict=True))


@pytest.fixture
def ends():
    transports = opened(ControlStore.host())
    yield transports
    for transport in transports.values():
        transport.abort()
        transport.close()


def scattered(memory, sizes, gap):
    """Pieces of these sizes in `memory`, with gaps between them."""
    starts = torch.tensor([0, *sizes[:-1]]).add(gap).cumsum(0)
    return Pieces.of(torch.stack([starts + memory.data_ptr(), torch.tensor(sizes)], 1)), starts.tolist()


def test_bytes_in_many_places_arrive_in_many_others_whatever_the_cuts(ends):
    generator = torch.Generator().manual_seed(1)
    sizes_out = torch.randint(1, 9000, (3 * MOST_PIECES,), generator=generator).tolist()
    total = sum(sizes_out)
    sizes_in = [5_000_000] * (total // 5_000_000) + [total % 5_000_000]
    out, into = (
        noise(total + 16 * len(sizes_out), 1),
        torch.zeros(total + 8 * len(sizes_in), dtype=torch.uint8),
    )
    pieces_out, starts_out = scattered(out, sizes_out, 16)
    pieces_in, starts_in = scattered(into, sizes_in, 8)

    def send():
        ends[3].wait(ends[3].post([Parcel(5, NO_BYTES, pieces_out)], [], 4), soon())

    def receive():
        time.sleep(0.2)  # the sender fills what the kernel takes, and goes on in the middle of a piece
        ends[5].wait(ends[5].post([], [Parcel(3, NO_BYTES, pieces_in)], 4), soon())

    at_once([send, receive])
    sent = torch.cat([out[a : a + n] for a, n in zip(starts_out, sizes_out, strict=True)])
    got = torch.cat([into[a : a + n] for a, n in zip(starts_in, sizes_in, strict=True)])
    assert torch.equal(sent, got)
    assert int(into.count_nonzero()) == int(got.count_nonzero()), "nothing was written between the pieces"


def test_a_parcel_of_another_size_than_expected_is_an_error_that_says_both(ends):
    ends[3].wait(ends[3].post([Parcel(5, noise(100, 0))], [], 1), soon())
    ticket = ends[5].post([], [Parcel(3, torch.zeros(96, dtype=torch.uint8))], 1)
    with pytest.raises(
        TransportError, match=r"96 bytes from rank 3.*sends 100 bytes for tag 1, 96 are expected"
    ):
        ends[5].wait(ticket, soon())


def test_a_peer_that_leaves_is_named_long_before_the_deadline(ends):
    ticket = ends[5].post([], [Parcel(3, torch.zeros(96, dtype=torch.uint8))], 1)
    ends[3].close()
    began = time.monotonic()
    with pytest.raises(TransportError, match=r"96 bytes from rank 3 failed .*it closed the connection"):
        ends[5].wait(ticket, soon(60))
    assert time.monotonic() - began < 30


def test_what_waits_for_a_rank_of_the_same_machine_stays_small(ends):
    for transport, peer in ((ends[3], 5), (ends[5], 3)):
        link = transport._connections[peer].link
        assert link.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * tcp_links.LOCAL_BUFFER_BYTES


def test_who_does_not_know_the_secret_is_not_taken_for_a_peer():
    host = ControlStore.host()
    control = ControlStore.join("127.0.0.1", host.port, host.run_id)
    found = {}

    def first():
        found[3] = tcp_links.open_transport(control, "guarded", RANKS, 3, time.monotonic() + 30)

    thread = threading.Thread(target=first, daemon=True)
    thread.start()
    other = ControlStore.join("127.0.0.1", host.port, host.run_id)
    address, port, _ = other.get("tcp/guarded/3", 30.0)
    stranger = socket.create_connection((address, port), 30)
    stranger.sendall(tcp_links.HELLO.pack(bytes(32), 5))
    stranger.settimeout(30)
    assert stranger.recv(1) == b"", "the stranger's connection is closed"
    found[5] = tcp_links.open_transport(other, "guarded", RANKS, 5, time.monotonic() + 30)
    thread.join(30)
    landing = torch.zeros(64, dtype=torch.uint8)
    found[5].wait(found[5].post([Parcel(3, noise(64, 2))], [], 0), soon())
    found[3].wait(found[3].post([], [Parcel(5, landing)], 0), soon())
    assert torch.equal(landing, noise(64, 2))
    for transport in found.values():
        transport.close()


def test_a_rank_that_does_not_come_is_named_at_the_deadline():
    host = ControlStore.host()
    control = ControlStore.join("127.0.0.1", host.port, host.run_id)
    with pytest.raises(TransportError, match=r"rank 3: ranks \[5\] did not connect"):
        tcp_links.open_transport(control, "alone", RANKS, 3, time.monotonic() + 0.5)


def test_the_interface_of_gloo_is_taken_and_a_wrong_one_refused(monkeypatch):
    control = ControlStore.host()
    assert tcp_links.own_address(control) == "127.0.0.1"
    monkeypatch.setenv(tcp_links.INTERFACE, "lo")
    assert tcp_links.own_address(control) == "127.0.0.1"
    monkeypatch.setenv(tcp_links.INTERFACE, "nowhere0")
    with pytest.raises(TransportError, match="GLOO_SOCKET_IFNAME is 'nowhere0'"):
        tcp_links.own_address(control)


def test_what_wraps_a_transport_may_pack_a_parcel_or_break_what_came_in_its_pieces(ends):
    out, into = noise(3000, 3), torch.zeros(5000, dtype=torch.uint8)
    pieces_out, starts_out = scattered(out, [700, 0, 800], 100)
    pieces_in, starts_in = scattered(into, [1000, 500], 64)
    parcel = Parcel(5, NO_BYTES, pieces_out)
    landing = Parcel(3, NO_BYTES, pieces_in)
    assert [part.numel() for part in parcel.parts] == [700, 800]
    packed = parcel.packed()
    assert packed.pieces is None and packed.num_bytes == parcel.num_bytes == 1500
    ends[3].wait(ends[3].post([packed], [], 2), soon())
    ends[5].wait(ends[5].post([], [landing], 2), soon())
    got = torch.cat([into[a : a + n] for a, n in zip(starts_in, [1000, 500], strict=True)])
    sent = torch.cat([out[a : a + n] for a, n in zip(starts_out, [700, 0, 800], strict=True)])
    assert torch.equal(got, sent) and torch.equal(landing.packed().payload, sent)
    landing.parts[1][7] ^= 1
    assert int(into[starts_in[1] + 7]) == int(sent[1007]) ^ 1, "the parts are the memory itself"

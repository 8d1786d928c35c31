"""One-sided reads between two real processes over NIXL: both directions, leaving early, dying, standing still."""

import os
import signal
import time

import pytest
import torch

from refit.transfer.errors import TransportError
from refit.transfer.rendezvous import ControlStore
from refit.transfer.transports import nixl_link
from refit.transfer.transports.nixl_link import NixlLink
from refit.transfer.transports.one_sided import HEADER, OFFER, OneSidedTransport
from refit.transfer.transports.seam import Parcel
from tests.processes import Processes, run_processes

pytestmark = pytest.mark.processes
NUM_BYTES = 1 << 20


def _open(rank: int, port: int) -> OneSidedTransport:
    control = ControlStore.join("127.0.0.1", port, "reads")
    return nixl_link.open_transport(control, "pair", (0, 1), rank, time.monotonic() + 30)


def _contents(rank: int, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rank + number)
    return torch.randint(0, 256, (NUM_BYTES + number,), dtype=torch.uint8, generator=generator)


def exchange(rank: int, port: int) -> int:
    """Five rounds both ways, two in flight, from and into slices of the same two slots."""
    transport = _open(rank, port)
    out = torch.empty(2, NUM_BYTES + 8, dtype=torch.uint8)
    landing = torch.empty(2, NUM_BYTES + 8, dtype=torch.uint8)
    flights = []

    def finish() -> int:
        number, ticket = flights.pop(0)
        transport.wait(ticket, time.monotonic() + 30)
        got = landing[number % 2, number : NUM_BYTES + 2 * number]
        assert torch.equal(got, _contents(1 - rank, number)), f"round {number}"
        return got.numel()

    num_bytes = 0
    for number in range(5):
        payload = out[number % 2, : NUM_BYTES + number]
        payload.copy_(_contents(rank, number))
        ticket = transport.post(
            [Parcel(1 - rank, payload)],
            [Parcel(1 - rank, landing[number % 2, number : NUM_BYTES + 2 * number])],
            number,
        )
        flights.append((number, ticket))
        if len(flights) == 2:
            num_bytes += finish()
    num_bytes += finish()
    transport.close()
    transport.close()
    return num_bytes


def test_two_processes_read_from_each_other_with_two_rounds_in_flight():
    host = ControlStore.host()
    assert run_processes(exchange, 2, host.port) == (5 * NUM_BYTES + 10,) * 2


def leave_early(rank: int, port: int) -> str:
    transport = _open(rank, port)
    if rank == 1:
        landing = torch.empty(NUM_BYTES, dtype=torch.uint8)
        transport.wait(transport.post([], [Parcel(0, landing)], 0), time.monotonic() + 30)
        transport.close()
        return ""
    ticket = transport.post([Parcel(1, _contents(0, 0))], [], 0)
    time.sleep(1.0)  # by now the reader is gone
    transport.wait(ticket, time.monotonic() + 5)
    began = time.monotonic()
    with pytest.raises(TransportError) as caught:
        transport.wait(transport.post([], [Parcel(1, torch.empty(16, dtype=torch.uint8))], 0), began + 30)
    assert time.monotonic() - began < 5
    return str(caught.value)


def test_a_reader_may_leave_at_once_and_is_missed_only_by_who_wants_more_of_it():
    host = ControlStore.host()
    message = run_processes(leave_early, 2, host.port)[0]
    assert "receive of 16 bytes from rank 1" in message
    assert "closed by rank 1" in message


def meet_a_victim(rank: int, port: int, number: signal.Signals) -> tuple[float, str]:
    transport = _open(rank, port)
    offered = _contents(rank, 0)
    if rank == 1:
        ticket = transport.post([Parcel(0, offered)], [], 0)
        os.kill(os.getpid(), number)
        time.sleep(60)
    time.sleep(0.5)
    landing = torch.empty(NUM_BYTES, dtype=torch.uint8)
    began = time.monotonic()
    with pytest.raises(TransportError) as caught:
        ticket = transport.post([Parcel(1, offered)], [Parcel(1, landing)], 0)
        transport.wait(ticket, began + 2)
    seconds = time.monotonic() - began
    transport.abort()
    transport.close()
    return seconds, str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_that_dies_or_stops_costs_no_more_than_the_deadline_and_is_named(number):
    host = ControlStore.host()
    with Processes(meet_a_victim, 2, (host.port, number)) as processes:
        (outcome,) = processes.outcomes(30, [0])
    assert outcome.returned, outcome.error
    seconds, message = outcome.value
    assert seconds < 4
    assert "rank 1" in message


class Scripted:
    """A link that says what a test puts into its mouth; its reads fill the payload with ones, at the second look."""

    def __init__(self, incoming: list[tuple[int, bytes]]) -> None:
        self.incoming = incoming
        self.sent: list[tuple[int, bytes]] = []
        self.num_open_offers = 0
        self.looks_until_flushed = 0

    def is_flushed(self):
        self.looks_until_flushed -= 1
        return self.looks_until_flushed < 0

    def messages(self):
        found, self.incoming = self.incoming, []
        return found

    def send(self, peer, message):
        self.sent.append((peer, message))

    def offer(self, payload):
        self.num_open_offers += 1

        def end():
            self.num_open_offers -= 1

        return b"there", end

    def read(self, peer, description, payload):
        looks = []

        def is_read():
            looks.append(description)
            payload.fill_(1)
            return len(looks) == 2

        return is_read

    def close(self):
        self.sent.append((-1, b"closed"))


def test_an_offer_of_another_size_is_an_error_that_names_both():
    link = Scripted([(4, HEADER.pack(OFFER, 0, 0, 24) + b"there")])
    transport = OneSidedTransport(link, (2, 4), 2)
    ticket = transport.post([], [Parcel(4, torch.zeros(16, dtype=torch.uint8))], 0)
    with pytest.raises(TransportError, match=r"receive of 16 bytes from rank 4 failed .* 24 bytes came"):
        transport.wait(ticket, time.monotonic() + 5)


def test_parcels_meet_by_number_although_their_offers_come_in_another_order():
    offers = [(4, HEADER.pack(OFFER, 9, number, 16 * (number + 1))) for number in (1, 0)]
    link = Scripted(offers)
    transport = OneSidedTransport(link, (2, 4), 2)
    landing = [torch.zeros(16 * (number + 1), dtype=torch.uint8) for number in (0, 1)]
    ticket = transport.post([], [Parcel(4, payload) for payload in landing], 9)
    transport.wait(ticket, time.monotonic() + 5)
    assert all(payload.all() for payload in landing)
    assert sorted(HEADER.unpack(message)[2] for _, message in link.sent) == [0, 1]


def test_memory_is_on_offer_until_it_was_read_or_the_transport_closes():
    link = Scripted([])
    transport = OneSidedTransport(link, (2, 4), 2)
    ticket = transport.post([Parcel(4, torch.zeros(16, dtype=torch.uint8))] * 2, [], 0)
    assert link.num_open_offers == 2
    link.incoming = [(4, HEADER.pack(2, 0, 0, 0))]
    with pytest.raises(TransportError, match=r"send of 16 bytes to rank 4 failed .* 16 bytes with ranks"):
        transport.wait(ticket, time.monotonic())
    assert link.num_open_offers == 1
    transport.close()
    assert link.num_open_offers == 0
    assert link.sent[-1] == (-1, b"closed")


def test_a_receiver_stays_until_its_senders_were_told_that_their_parcels_are_read():
    link = Scripted([(4, HEADER.pack(OFFER, 0, number, 16)) for number in (0, 1)])
    transport = OneSidedTransport(link, (2, 4), 2)
    link.looks_until_flushed = 3
    parcels = [Parcel(4, torch.zeros(16, dtype=torch.uint8)) for _ in range(2)]
    transport.wait(transport.post([], parcels[:1], 0), time.monotonic() + 5)
    assert link.looks_until_flushed < 0
    link.looks_until_flushed = 1 << 30
    with pytest.raises(TransportError, match=r"rank 4 failed .* takes no messages and was not told"):
        transport.wait(transport.post([], parcels[1:], 0), time.monotonic() + 0.2)


def test_an_empty_parcel_arrives_without_any_memory_on_offer():
    link = Scripted([(4, HEADER.pack(OFFER, 0, 0, 0))])
    transport = OneSidedTransport(link, (2, 4), 2)
    nothing = torch.empty(0, dtype=torch.uint8)
    ticket = transport.post([Parcel(4, nothing)], [Parcel(4, nothing)], 0)
    link.incoming = [(4, HEADER.pack(2, 0, 0, 0))]
    transport.wait(ticket, time.monotonic() + 5)
    assert link.num_open_offers == 0


class _LeavingAgent:
    """A NIXL agent as far as `close` goes: the first peer cannot be left."""

    def __init__(self) -> None:
        self.left: list[str] = []

    def remove_remote_agent(self, name: str) -> None:
        self.left.append(name)
        if len(self.left) == 1:
            raise ValueError("not now")


def test_closing_a_link_leaves_every_peer_also_after_one_that_cannot_be_left():
    agent = _LeavingAgent()
    link = NixlLink(agent, {1: "one", 2: "two", 3: "three"})
    with pytest.raises(TransportError, match="leave one"):
        link.close()
    assert agent.left == ["one", "two", "three"]

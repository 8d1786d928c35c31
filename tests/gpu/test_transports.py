"""CUDA IPC between two processes on one GPU, and NCCL between two GPUs: the suite's cases on device memory."""

import time

import pytest
import torch

from refit.transfer.errors import TransportError
from refit.transfer.groups import Group, open_group
from refit.transfer.protocol import CUDA_IPC, NIXL, PROCESS_GROUP
from refit.transfer.rendezvous import ControlStore
from refit.transfer.transports.seam import Parcel
from tests.processes import run_processes

NUM_ROUNDS = 4
WAYS = [
    pytest.param("gloo", CUDA_IPC, 1, id="cuda_ipc"),
    pytest.param("gloo", NIXL, 1, id="nixl"),
    pytest.param("nccl", PROCESS_GROUP, 2, id="nccl"),
]


def _open(rank: int, port: int, backend: str, transport: str, num_devices: int) -> Group:
    torch.cuda.set_device(rank % num_devices)
    control = ControlStore.join("127.0.0.1", port, "gpu")
    return open_group(control, "pair", (0, 1), rank, backend, time.monotonic() + 60, transport)


def _contents(rank: int, number: int, num_bytes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * rank + number)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator).cuda()


def exchange(rank: int, port: int, backend: str, transport: str, num_devices: int, num_bytes: int) -> int:
    """Rounds both ways with two in flight, from and into parts of larger device tensors, packed on this stream."""
    way = _open(rank, port, backend, transport, num_devices).transport
    slots = torch.empty(2, 2, num_bytes + 64, dtype=torch.uint8, device="cuda")
    flights: list[tuple[int, object]] = []

    def finish() -> None:
        number, ticket = flights.pop(0)
        way.wait(ticket, time.monotonic() + 30)
        got = slots[number % 2, 1, 16 : 16 + num_bytes]
        assert torch.equal(got, _contents(1 - rank, number, num_bytes)), f"round {number}"

    for number in range(NUM_ROUNDS):
        out, landing = slots[number % 2, 0, 32 : 32 + num_bytes], slots[number % 2, 1, 16 : 16 + num_bytes]
        out.copy_(_contents(rank, number, num_bytes))
        flights.append((number, way.post([Parcel(1 - rank, out)], [Parcel(1 - rank, landing)], number)))
        if len(flights) == 2:
            finish()
    finish()
    way.close()
    return NUM_ROUNDS


def _require_devices(num_devices: int) -> None:
    if torch.cuda.device_count() < num_devices:
        pytest.skip(f"{num_devices} GPUs are needed, {torch.cuda.device_count()} are here")


@pytest.mark.parametrize("num_bytes", [16, 1000, 64 << 20])
@pytest.mark.parametrize(("backend", "transport", "num_devices"), WAYS)
def test_device_memory_arrives_both_ways_with_two_rounds_in_flight(
    backend, transport, num_devices, num_bytes
):
    _require_devices(num_devices)
    host = ControlStore.host()
    args = (host.port, backend, transport, num_devices, num_bytes)
    assert run_processes(exchange, 2, *args, timeout_s=180) == (NUM_ROUNDS, NUM_ROUNDS)


def lonely(rank: int, port: int, backend: str, transport: str, num_devices: int) -> float:
    way = _open(rank, port, backend, transport, num_devices).transport
    if rank == 1:
        time.sleep(6)
        return 0.0
    landing = torch.zeros(16, dtype=torch.uint8, device="cuda")
    began = time.monotonic()
    with pytest.raises(TransportError):
        way.wait(way.post([], [Parcel(1, landing)], 0), began + 1)
    seconds = time.monotonic() - began
    way.abort()
    return seconds


@pytest.mark.parametrize(("backend", "transport", "num_devices"), WAYS)
def test_a_parcel_that_never_comes_is_an_error_at_the_deadline(backend, transport, num_devices):
    _require_devices(num_devices)
    host = ControlStore.host()
    assert run_processes(lonely, 2, host.port, backend, transport, num_devices, timeout_s=120)[0] < 5

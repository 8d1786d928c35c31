"""Packed broadcast between real processes: any sizes arrive; every wrong name, shape or dtype is refused by name."""

import time

import pytest
import torch

from refit.plan import TensorSpec
from refit.transfer.broadcast import FRAME_WORDS, OPENING_WORDS, receive_packed, send_packed
from refit.transfer.errors import TransportError
from refit.transfer.groups import Group, open_group
from refit.transfer.memory import as_bits, torch_dtype
from refit.transfer.rendezvous import ControlStore
from tests.processes import run_processes

pytestmark = pytest.mark.processes
CPU = torch.device("cpu")
SPECS = {
    spec.name: spec
    for spec in (
        TensorSpec("a", (3, 5), "bfloat16"),
        TensorSpec("scalar", (), "float32"),
        TensorSpec("empty", (0, 4), "float32"),
        TensorSpec("long", (1000, 7), "float32"),
        TensorSpec("fp8", (13, 11), "float8_e4m3fn"),
        *(TensorSpec(f"small.{i}", (i % 5 + 1,), "int32") for i in range(300)),
    )
}


def contents(spec: TensorSpec, seed: int) -> torch.Tensor:
    dtype = torch_dtype(spec.dtype)
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (*spec.shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(spec.shape)


def _group(rank: int, port: int, size: int) -> Group:
    control = ControlStore.join("127.0.0.1", port, "misc")
    return open_group(control, "misc", tuple(range(10, 10 + size)), 10 + rank, "gloo", time.monotonic() + 60)


def broadcasting_rank(rank: int, port: int, size: int) -> None:
    group = _group(rank, port, size)
    for chunk_bytes in (16, 1024, 5000, 1 << 20) if size == 2 else (4096,):
        specs = SPECS if chunk_bytes > 16 else {name: SPECS[name] for name in ("a", "scalar", "fp8", "empty")}
        if rank == 0:
            tensors = ((name, contents(spec, i)) for i, (name, spec) in enumerate(specs.items()))
            sent = send_packed(tensors, group, specs, chunk_bytes, time.monotonic() + 60, CPU)
            assert sent == sum(
                contents(spec, 0).numel() * torch_dtype(spec.dtype).itemsize for spec in specs.values()
            )
            continue
        got = dict(receive_packed(group, specs, chunk_bytes, time.monotonic() + 60, CPU))
        assert set(got) == set(specs)
        for i, (name, spec) in enumerate(specs.items()):
            assert got[name].dtype == torch_dtype(spec.dtype)
            assert torch.equal(as_bits(got[name]), as_bits(contents(spec, i)).reshape(spec.shape)), name


@pytest.mark.parametrize("size", [2, 3])
def test_every_tensor_arrives_bit_for_bit_whatever_the_chunk_size(size):
    host = ControlStore.host()
    run_processes(broadcasting_rank, size, host.port, size)


A, B = TensorSpec("a", (2, 3), "float32"), TensorSpec("b", (4,), "float32")
PLANNED = {"a": A, "b": B}
ZEROS = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}


def exporting_rank(rank: int, port: int) -> list[str]:
    """What the sender says to a wrong exporter; the receiver only keeps the group alive."""
    group = _group(rank, port, 2)
    errors = []
    for tensors in (
        [("a", ZEROS["a"]), ("a", ZEROS["a"])],
        [("a", ZEROS["a"])],
        [("c", ZEROS["a"])],
        [("a", torch.zeros(3, 2))],
    ):
        if rank == 0:
            with pytest.raises(TransportError) as caught:
                send_packed(tensors, group, PLANNED, 4096, time.monotonic() + 20, CPU)
            errors.append(str(caught.value))
        else:
            frame = torch.zeros(OPENING_WORDS, dtype=torch.int64)
            group.process_group.broadcast([frame]).wait()
    return errors


def test_a_wrong_exporter_is_stopped_by_name():
    host = ControlStore.host()
    twice, missing, unexpected, shape = run_processes(exporting_rank, 2, host.port)[0]
    assert "'a' twice (duplicate)" in twice
    assert "missing: b" in missing
    assert "'c', which is unexpected" in unexpected
    assert "(3, 2); the plan says (2, 3)" in shape


def receiving_rank(rank: int, port: int) -> list[str]:
    """What a receiver says when its plan differs from the sender's."""
    group = _group(rank, port, 2)
    errors = []
    for expected, chunk_bytes in (
        ({"a": A, "b": B, "c": TensorSpec("c", (1,), "float32")}, 4096),
        ({"a": A}, 4096),
        ({"a": TensorSpec("a", (3, 2), "float32"), "b": B}, 4096),
        ({"a": TensorSpec("a", (2, 3), "int32"), "b": B}, 4096),
        (PLANNED, 8192),
    ):
        if rank == 0:
            send_packed(ZEROS.items(), group, PLANNED, 4096, time.monotonic() + 20, CPU)
            continue
        with pytest.raises(TransportError) as caught:
            list(receive_packed(group, expected, chunk_bytes, time.monotonic() + 20, CPU))
        errors.append(str(caught.value))
        _drain(group, chunk_bytes != 4096)
    return errors


def _drain(group: Group, nothing_read: bool) -> None:
    """Take what the sender still has on the wire, so that the next case starts clean."""
    if nothing_read:
        frame = torch.zeros(FRAME_WORDS, dtype=torch.int64)
        group.process_group.broadcast([frame]).wait()
        group.process_group.broadcast([torch.empty(int(frame[0]), dtype=torch.uint8)]).wait()
        group.process_group.broadcast([frame]).wait()


def test_a_receiver_refuses_what_its_plan_does_not_say():
    host = ControlStore.host()
    missing, unexpected, shape, dtype, geometry = run_processes(receiving_rank, 2, host.port)[1]
    assert "missing: c" in missing
    assert "'b', which is unexpected" in unexpected
    assert "(2, 3); the plan says (3, 2)" in shape
    assert "float32; the plan says int32" in dtype
    assert "chunks of 4096 bytes" in geometry and "8192" in geometry


def silent_sender(rank: int, port: int) -> float:
    group = _group(rank, port, 2)
    began = time.monotonic()
    if rank == 1:
        with pytest.raises(TransportError, match="sender: rank 10"):
            list(receive_packed(group, PLANNED, 4096, time.monotonic() + 1.0, CPU))
    else:
        time.sleep(3)
    return time.monotonic() - began


def test_a_receiver_gives_up_at_its_deadline():
    host = ControlStore.host()
    assert run_processes(silent_sender, 2, host.port)[1] < 2.5

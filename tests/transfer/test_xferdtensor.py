"""xferdtensor: p2p and golden against the full tensor, over generated meshes, placements, shapes and dtypes."""

import random
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

from refit.plan import PlanError, Region
from refit.transfer.errors import TransportError
from refit.transfer.forced import GOLDEN_VARIABLE
from refit.transfer.groups import Group, open_group
from refit.transfer.memory import as_bits, torch_dtype
from refit.transfer.placements import Layout
from refit.transfer.protocol import NIXL, PROCESS_GROUP, TCP
from refit.transfer.rendezvous import ControlStore
from refit.transfer.xferdtensor import xferdtensor
from tests.processes import run_processes

# "int4" stands for two 4-bit values in each byte: it travels as uint8, as every packed format does
DTYPES = ("bfloat16", "float32", "float8_e4m3fn", "uint8", "int4")
NUM_CALLS = 3


@dataclass(frozen=True, slots=True)
class Transfer:
    """One generated transfer between meshes of ranks of one group."""

    shape: tuple[int, ...]
    dtype: str
    src_mesh: torch.Tensor
    src_placements: tuple[Placement, ...]
    dst_mesh: torch.Tensor
    dst_placements: tuple[Placement, ...]
    bucket_bytes: int


def make_transfer(seed: int, size: int) -> Transfer:
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 13) for _ in range(rng.randint(1, 4)))
    dtype = rng.choice(DTYPES)
    src_mesh, src_placements = _side(rng, size, len(shape))
    dst_mesh, dst_placements = _side(rng, size, len(shape))
    return Transfer(
        shape, dtype, src_mesh, src_placements, dst_mesh, dst_placements, rng.choice([4096, 1 << 20])
    )


def _side(rng: random.Random, size: int, num_dims: int) -> tuple[torch.Tensor, tuple[Placement, ...]]:
    ranks = rng.sample(range(size), rng.randint(1, size))
    shapes = [(len(ranks),)] + [(a, len(ranks) // a) for a in range(1, len(ranks) + 1) if len(ranks) % a == 0]
    if len(ranks) == 8:
        shapes.append((2, 2, 2))
    mesh = torch.tensor(ranks).reshape(rng.choice(shapes))
    choices: list[Placement] = [Replicate(), *(Shard(dim) for dim in range(-num_dims, num_dims))]
    return mesh, tuple(rng.choice(choices) for _ in mesh.shape)


def contents(transfer: Transfer, seed: int) -> torch.Tensor:
    dtype = torch.uint8 if transfer.dtype == "int4" else torch_dtype(transfer.dtype)
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (*transfer.shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(transfer.shape)


def local(
    full: torch.Tensor, mesh: torch.Tensor, placements: tuple[Placement, ...], rank: int
) -> torch.Tensor | None:
    """The share of a rank by torch.chunk itself, independent of the code under test."""
    where = (mesh == rank).nonzero()
    if not len(where):
        return None
    share = as_bits(full)
    for position, parts, placement in zip(where[0].tolist(), mesh.shape, placements, strict=True):
        if isinstance(placement, Shard):
            chunks = share.chunk(parts, placement.dim)
            share = chunks[position] if position < len(chunks) else share.narrow(placement.dim, 0, 0)
    return share.contiguous().view(full.dtype)


def transfer_rank(rank: int, port: int, size: int, seeds: range, transport: str = PROCESS_GROUP) -> int:
    """Run every case with both back ends; returns how many tensors were compared."""
    torch.set_num_threads(1)
    joined = _group(rank, port, size, transport)
    group = joined.process_group
    compared = 0
    for seed in seeds:
        transfer = make_transfer(seed, size)
        for call in range(NUM_CALLS):
            full = contents(transfer, 1000 * seed + call)
            src = local(full, transfer.src_mesh, transfer.src_placements, rank)
            expected = local(full, transfer.dst_mesh, transfer.dst_placements, rank)
            for backend in ("p2p", "golden") if call == 0 else ("p2p",):
                dst = None if expected is None else torch.empty_like(expected)
                xferdtensor(
                    src,
                    transfer.src_mesh,
                    transfer.src_placements,
                    dst,
                    transfer.dst_mesh,
                    transfer.dst_placements,
                    group,
                    backend=backend,
                    timeout_s=60.0,
                    bucket_bytes=transfer.bucket_bytes,
                    transport=joined.transport,
                )
                if dst is not None:
                    assert torch.equal(as_bits(dst), as_bits(expected)), f"seed {seed} call {call} {backend}"
                    compared += 1
    return compared


def _group(rank: int, port: int, size: int, transport: str = PROCESS_GROUP) -> Group:
    control = ControlStore.join("127.0.0.1", port, "xfer")
    deadline = time.monotonic() + 60
    return open_group(control, "xfer", tuple(range(size)), rank, "gloo", deadline, transport)


@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 4])
def test_p2p_and_golden_give_each_rank_its_chunk_of_the_full_tensor(size):
    host = ControlStore.host()
    assert sum(run_processes(transfer_rank, size, host.port, size, range(20), timeout_s=120)) > 20


@pytest.mark.processes
@pytest.mark.parametrize("transport", [TCP, NIXL])
def test_xferdtensor_by_another_way_than_the_group_gives_each_rank_its_chunk_of_the_full_tensor(transport):
    host = ControlStore.host()
    assert sum(run_processes(transfer_rank, 3, host.port, 3, range(10), transport, timeout_s=120)) > 10


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_p2p_equals_golden_on_a_hundred_cases_of_each_size(size):
    host = ControlStore.host()
    run_processes(transfer_rank, size, host.port, size, range(1000, 1100), timeout_s=280)


def wrong_rank(rank: int, port: int) -> list[str]:
    """Every rank meets the same error for input that only one rank got wrong."""
    group = _group(rank, port, 2).process_group
    mesh = torch.arange(2)
    full, part = torch.zeros(4, 4), torch.zeros(2, 4)
    errors = []
    for src, dst, src_placement, dst_placement in (
        (torch.zeros(2 + rank, 4), part, Shard(0), Shard(0)),  # cuts that torch.chunk does not make
        (part if rank else None, part, Shard(0), Shard(0)),  # a missing local tensor
        (part, full.to(torch.int32), Shard(0), Replicate()),  # dtypes that no cast connects
        (part, torch.zeros(3, 4), Shard(0), Replicate()),  # two different shapes
        (
            part.to(torch.complex64) if rank else part,
            full,
            Shard(0),
            Replicate(),
        ),  # a dtype that nobody moves
        (part.to(torch.float16) if rank else part, full, Shard(0), Replicate()),  # two dtypes of one tensor
    ):
        try:
            xferdtensor(src, mesh, [src_placement], dst, mesh, [dst_placement], group, timeout_s=20.0)
        except PlanError as error:
            errors.append(str(error))
    return errors


@pytest.mark.processes
def test_wrong_local_tensors_raise_the_same_error_on_every_rank():
    host = ControlStore.host()
    first, second = run_processes(wrong_rank, 2, host.port)
    assert first == second
    assert (
        "torch.chunk" in first[0] and "mesh" in first[1] and "int32" in first[2] and "must agree" in first[3]
    )
    assert "rank 1" in first[4] and "items of 8 bytes" in first[4]
    assert "local tensors of src differ: dtypes ['float16', 'float32']" in first[5]


def forced_rank(rank: int, port: int) -> tuple[int, str, str]:
    """What a call that names no back end takes of extra memory, and the errors of two other choices."""
    group = _group(rank, port, 2).process_group
    mesh, full = torch.arange(2), torch.arange(8.0)
    dst = torch.empty(8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(GOLDEN_VARIABLE, "1")
        report = xferdtensor(full.chunk(2)[rank], mesh, [Shard(0)], dst, mesh, [Replicate()], group)
        assert torch.equal(dst, full)
        errors = []
        for value in (str(rank), "yes"):
            patch.setenv(GOLDEN_VARIABLE, value)
            with pytest.raises(PlanError) as refused:
                xferdtensor(full.chunk(2)[rank], mesh, [Shard(0)], dst, mesh, [Replicate()], group)
            errors.append(str(refused.value))
    return report.peak_extra_bytes, errors[0], errors[1]


@pytest.mark.processes
def test_the_environment_forces_the_oracle_where_no_back_end_is_named_and_ranks_that_differ_are_refused():
    host = ControlStore.host()
    first, second = run_processes(forced_rank, 2, host.port)
    assert first == second
    assert first[0] == 2 * 8 * 4, "the oracle holds the whole tensor, twice"
    assert "chose the back ends ['p2p', 'golden']" in first[1] and f"{GOLDEN_VARIABLE} is 'yes'" in first[2]


@pytest.mark.processes
def test_the_example_runs_as_its_page_says():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "4",
        "examples/one_tensor.py",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    assert all(ran.stdout.count(f"rank {rank} has its columns") == 1 for rank in (2, 3)), ran.stdout


def cast_and_stride_rank(rank: int, port: int) -> None:
    group = _group(rank, port, 2).process_group
    mesh = torch.arange(2)
    full = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    src = full.chunk(2)[rank]
    dst = torch.empty(3, 7, dtype=torch.bfloat16).T
    xferdtensor(src, mesh, [Shard(0)], dst, mesh, [Shard(1)], group, timeout_s=20.0)
    assert torch.equal(dst, full.chunk(2, 1)[rank].to(torch.bfloat16))


@pytest.mark.processes
def test_the_sender_casts_and_a_destination_may_be_strided():
    host = ControlStore.host()
    run_processes(cast_and_stride_rank, 2, host.port)


def lonely_rank(rank: int, port: int) -> str:
    group = _group(rank, port, 2).process_group
    if rank == 1:
        time.sleep(6)
        return ""
    began = time.monotonic()
    with pytest.raises(TransportError) as caught:
        xferdtensor(
            torch.zeros(2),
            torch.tensor([0]),
            [Shard(0)],
            None,
            torch.tensor([1]),
            [Shard(0)],
            group,
            timeout_s=2.0,
        )
    assert time.monotonic() - began < 4
    return str(caught.value)


@pytest.mark.processes
def test_a_rank_that_never_calls_is_waited_for_until_the_deadline_only():
    host = ControlStore.host()
    assert "exchange of local shapes" in run_processes(lonely_rank, 2, host.port)[0]


def test_layouts_cut_like_torch_chunk_and_find_the_full_shape_again():
    for seed in range(200):
        transfer = make_transfer(seed, 8)
        full = contents(transfer, seed)
        layout = Layout.of(transfer.src_mesh, transfer.src_placements, len(transfer.shape))
        shares = {
            rank: local(full, transfer.src_mesh, transfer.src_placements, rank) for rank in layout.ranks
        }
        assert {rank: region.shape for rank, region in layout.regions(transfer.shape).items()} == {
            rank: tuple(share.shape) for rank, share in shares.items()
        }
        assert layout.full_shape([tuple(shares[rank].shape) for rank in layout.ranks]) == transfer.shape


@pytest.mark.parametrize(
    ("mesh", "placements", "words"),
    [
        (torch.tensor([0, 0]), [Shard(0)], "different ranks"),
        (torch.tensor([0, 1]), [Shard(0), Shard(1)], "one per axis"),
        (torch.tensor([0, 1]), [Shard(2)], "Shard"),
        (torch.tensor([0, 1]), [Partial()], "Replicate"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(mesh, placements, words):
    with pytest.raises(PlanError, match=words):
        Layout.of(mesh, placements, 2)


def test_a_region_of_an_uneven_cut_may_be_empty():
    layout = Layout((0, 1, 2), (3,), (0,))
    assert layout.regions((2,))[2] == Region((2,), (2,))

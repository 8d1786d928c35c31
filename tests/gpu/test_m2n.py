"""xferdtensor over NCCL M2N against golden, on two GPUs."""

import time

import pytest
import torch
from torch.distributed.tensor.placement_types import Replicate, Shard

from refit.transfer.groups import open_group
from refit.transfer.memory import as_bits
from refit.transfer.rendezvous import ControlStore
from refit.transfer.xferdtensor import xferdtensor
from tests.processes import run_processes


def reshard(rank: int, port: int) -> int:
    torch.cuda.set_device(rank)
    control = ControlStore.join("127.0.0.1", port, "m2n")
    group = open_group(control, "pair", (0, 1), rank, "nccl", time.monotonic() + 60).process_group
    meshes = torch.tensor([0]), torch.tensor([1])
    compared = 0
    for dtype in (torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.uint8):
        for placement in (Shard(0), Shard(1), Replicate()):
            full = torch.randint(0, 120, (64, 48, dtype.itemsize), dtype=torch.uint8, device="cuda")
            src = full.view(dtype).squeeze(-1).contiguous() if rank == 0 else None
            found = []
            for backend in ("m2n", "golden"):
                dst = torch.zeros(64, 48, device="cuda").to(dtype) if rank == 1 else None
                xferdtensor(src, meshes[0], [placement], dst, meshes[1], [Shard(0)], group, backend=backend)
                found.append(dst)
            if rank == 1:
                assert torch.equal(as_bits(found[0]), as_bits(found[1])), f"{dtype} {placement}"
                compared += 1
    return compared


def test_m2n_equals_golden_bit_for_bit():
    if torch.cuda.device_count() < 2:
        pytest.skip(f"2 GPUs are needed, {torch.cuda.device_count()} are here")
    pytest.importorskip("nccl.m2n")
    host = ControlStore.host()
    assert run_processes(reshard, 2, host.port, timeout_s=180)[1] == 12

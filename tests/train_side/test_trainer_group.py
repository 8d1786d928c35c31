"""The trainers' collectives of a quantized refit, over real gloo processes."""

import socket

import pytest
import torch
import torch.distributed as dist

from refit.train_side.quantized import TrainerGroup
from tests.processes import run_processes


def agree(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    group = TrainerGroup()
    values = torch.tensor([float(rank), 1.0 - rank, 0.5])
    group.agree_on_maximum(values)
    found = group.gather({"rank": rank})
    dist.destroy_process_group()
    return values.tolist(), list(found)


@pytest.mark.processes
def test_every_trainer_gets_the_largest_of_each_value_and_what_all_others_say():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for values, found in run_processes(agree, 2, port, timeout_s=60.0):
        assert values == [1.0, 1.0, 0.5]
        assert found == [{"rank": 0}, {"rank": 1}]

"""One tensor from two ranks that hold halves of its rows to two ranks that want halves of its columns.

torchrun --nproc-per-node 4 examples/one_tensor.py
NRL_XFERDTENSOR_GOLDEN=1 torchrun --nproc-per-node 4 examples/one_tensor.py   # by gather, broadcast and slice
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

from refit.transfer.xferdtensor import xferdtensor


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    senders, receivers = torch.tensor([0, 1]), torch.tensor([2, 3])
    full = torch.arange(48.0).reshape(
        6, 8
    )  # here to make and to check the shares; no rank of a real job holds it
    src = full.chunk(2, dim=0)[rank] if rank < 2 else None
    dst = torch.empty(6, 4) if rank >= 2 else None
    xferdtensor(src, senders, [Shard(0)], dst, receivers, [Shard(1)], dist.group.WORLD, timeout_s=60)
    if dst is not None:
        assert torch.equal(dst, full.chunk(2, dim=1)[rank - 2])
        print(f"rank {rank} has its columns", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

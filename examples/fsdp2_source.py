"""An FSDP2 trainer on several processes refits a stock vLLM server; no rank ever holds the whole model for it.

    VLLM_SERVER_DEV_MODE=1 vllm serve DIR --weight-transfer-config '{"backend": "refit"}' --port 8000
    torchrun --nproc-per-node 2 examples/fsdp2_source.py --model DIR --url http://127.0.0.1:8000 --save trained

DIR is the folder of an HF checkpoint of a dense model. The script trains two steps, refits after each, and saves the
result.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from refit.service.http_engine import HttpEngine
from refit.service.http_refit import HttpRefit, join_source, next_version
from refit.transfer.source import ModelSource

NUM_STEPS = 2
RUN_ID = "fsdp2-example"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--save", required=True)
    parser.add_argument("--store-port", type=int, default=29700, help="of the control store, on rank 0")
    arguments = parser.parse_args(argv)

    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(rank)

    engines = [HttpEngine(arguments.url)]
    first = next_version(engines)
    dist.barrier()  # a server that prepares answers nobody else: each rank has asked before any begins
    refitter = None
    with ThreadPoolExecutor(1) as beside:
        if rank == 0:
            refitter = HttpRefit.open(engines, world_size, port=arguments.store_port, run_id=RUN_ID)
            planned = beside.submit(refitter.prepare)
        source = join_source(ModelSource.of_model(model), f"127.0.0.1:{arguments.store_port}", RUN_ID)
        if rank == 0:
            plan = planned.result()
            print(f"plan {plan.digest[:12]}: bulk {plan.bulk_bytes} bytes, misc {plan.misc_bytes} bytes")
        for version in range(first, first + NUM_STEPS):
            tokens = torch.randint(0, 256, (4, 16))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.reshard()  # what the last forward gathered is let go; the shards are the weights
            if refitter is not None:
                done = beside.submit(refitter.refit, version)
            source.send(version)
            if refitter is not None:
                record = done.result()
                if not record.committed:
                    raise SystemExit(f"version {version} was discarded: {record.reason}")
                print(f"version {version}: {record.total_s:.3f} s, digests {record.digest_state}")
    source.close()
    if refitter is not None:
        refitter.close()
    full = {name: tensor.full_tensor() for name, tensor in model.named_parameters()}
    if rank == 0:
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).save_pretrained(
            arguments.save, state_dict=full
        )
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

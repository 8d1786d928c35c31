"""Real Megatron models from an HF folder: process groups, Bridge's provider, weights, DDP wrapper."""

from __future__ import annotations

import math
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from refit.train_side import cpu_compat
from refit.train_side.hf_folder import quick_lookups
from refit.train_side.lora import peft
from refit.train_side.lowering import gtp
from refit.train_side.options import LoraOptions, TrainOptions, TrainParallel
from refit.train_side.provider import configure, none_if_one


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """One rank's model chunks (one per virtual pipeline stage) and the bridge that knows their HF names."""

    bridge: Any
    chunks: list[Any]
    vocab_size: int


def _meeting_store(init_address: str, rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """The trainers' own store. Rank 0 serves it at this address only; by itself torch would on all interfaces."""
    host, _, port = init_address.rpartition(":")
    listen_fd = socket.create_server((host, int(port))).detach() if rank == 0 else None
    return dist.TCPStore(
        host, int(port), world_size, rank == 0, timedelta(seconds=timeout_s), master_listen_fd=listen_fd
    )


def open_process_groups(
    parallel: TrainParallel, rank: int, world_size: int, init_address: str, timeout_s: float
) -> None:
    """Join the trainers' default group at `init_address` ("host:port") and cut it into Megatron's groups."""
    if parallel.world_size != world_size:
        raise ValueError(
            f"{parallel} needs {parallel.world_size} trainer ranks, but world_size is {world_size}"
        )
    cpu_compat.import_bridge()
    from megatron.core import parallel_state

    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=_meeting_store(init_address, rank, world_size, timeout_s),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=none_if_one(parallel.virtual_pipeline),
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        gtp_remat_size=parallel.gtp,
        expert_gtp_remat_size=parallel.expert_gtp,
        distributed_timeout_minutes=max(1, math.ceil(timeout_s / 60)),
        create_gloo_process_groups=False,
    )


def seed_everything(seed: int) -> None:
    """Seed this process, and on CUDA the random states that Megatron keeps per model parallel rank."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    if torch.cuda.is_available():
        model_parallel_cuda_manual_seed(seed)


def close_process_groups() -> None:
    """Undo `open_process_groups`; safe to call twice."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def build_model(
    model_dir: str | Path, parallel: TrainParallel, options: TrainOptions, *, trainable: bool
) -> BuiltModel:
    """Build this rank's chunks in `options.precision` and load their share of the HF weights. Collective.

    `trainable` wraps them in Megatron's DistributedDataParallel (float32 gradients); else they are frozen. With
    `options.lora` what is trainable are adapters. Raises ValueError if their rank does not divide.
    """
    if options.lora is not None:
        _require_lora_fits(options.lora, parallel)
    bridge_package = cpu_compat.import_bridge()
    bridge = bridge_package.AutoBridge.from_hf_pretrained(str(model_dir))
    provider = bridge.to_megatron_provider(load_weights=True)
    configure(provider, parallel, options)
    if options.lora is not None:
        provider.register_pre_wrap_hook(peft.wrapping(options.lora, options.seed))
    quick, sharded = quick_lookups(bridge.hf_pretrained), gtp.sharded_after_loading(provider)
    with cpu_compat.cpu_megatron(), quick, sharded:
        chunks = provider.provide_distributed_model(
            ddp_config=_ddp_config(),
            wrap_with_ddp=trainable,
            use_cpu_initialization=provider.use_cpu_initialization,
            bf16=options.precision == "bf16",
            fp16=False,
        )
    if not trainable:
        for chunk in chunks:
            chunk.requires_grad_(False).eval()
    return BuiltModel(bridge, chunks, provider.vocab_size)


def _require_lora_fits(options: LoraOptions, parallel: TrainParallel) -> None:
    if parallel.gtp * parallel.expert_gtp > 1:
        raise ValueError(
            f"LoRA does not work with gtp {parallel.gtp}, expert_gtp {parallel.expert_gtp}: use 1"
        )
    for axis, size in (("tensor", parallel.tensor), ("expert_tensor", parallel.expert_tensor)):
        if options.rank % size:
            raise ValueError(
                f"LoRA rank {options.rank} does not divide by {axis} {size}, over which adapters are cut: "
                f"use a multiple of {size}"
            )


def _ddp_config() -> Any:
    from megatron.core.distributed import DistributedDataParallelConfig

    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=False
    )

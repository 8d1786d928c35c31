"""Real Megatron models from an HF folder: process groups, Bridge's provider, weights, DDP wrapper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from refit.train_side import cpu_compat
from refit.train_side.options import TrainOptions, TrainParallel

# What needs CUDA kernels or Transformer Engine; turned off where there is no CUDA.
_CPU_SETTINGS: dict[str, Any] = {
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "moe_permute_fusion": False,
    "moe_grouped_gemm": False,
    "cross_entropy_loss_fusion": False,
    "sequence_parallel": False,
    "batch_p2p_sync": False,
    "moe_token_dispatcher_type": "allgather",  # "alltoall" wants a CUDA stream
}


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """One rank's model chunks (one per virtual pipeline stage) and the bridge that knows their HF names."""

    bridge: Any
    chunks: list[Any]
    vocab_size: int


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

    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"tcp://{init_address}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=_none_if_one(parallel.virtual_pipeline),
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=max(1, math.ceil(timeout_s / 60)),
        create_gloo_process_groups=False,
    )


def close_process_groups() -> None:
    """Undo `open_process_groups`; safe to call twice."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _none_if_one(size: int) -> int | None:
    return size if size > 1 else None


def build_model(
    model_dir: str | Path, parallel: TrainParallel, options: TrainOptions, *, trainable: bool
) -> BuiltModel:
    """Build this rank's chunks in `options.precision` and load their share of the HF weights. Collective.

    `trainable` wraps them in Megatron's DistributedDataParallel (float32 gradients); else they are frozen.
    """
    bridge_package = cpu_compat.import_bridge()
    bridge = bridge_package.AutoBridge.from_hf_pretrained(str(model_dir))
    provider = bridge.to_megatron_provider(load_weights=True)
    _configure(provider, parallel, options)
    with cpu_compat.cpu_megatron():
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


def _ddp_config() -> Any:
    from megatron.core.distributed import DistributedDataParallelConfig

    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=False
    )


def _configure(provider: Any, parallel: TrainParallel, options: TrainOptions) -> None:
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    settings = {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": _none_if_one(parallel.virtual_pipeline),
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
        "num_layers_in_first_pipeline_stage": parallel.first_stage_layers,
        "num_layers_in_last_pipeline_stage": parallel.last_stage_layers,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": False,
        "should_pad_vocab": True,
        "calculate_per_token_loss": True,
        "deallocate_pipeline_outputs": False,
        "overlap_p2p_comm": False,
        "batch_p2p_comm": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    if provider.num_moe_experts is not None:
        # The RL loss alone moves the router: no balancing term that generation KL would have to pay for.
        settings |= {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
    if not torch.cuda.is_available():
        settings |= _CPU_SETTINGS | {"transformer_layer_spec": local_layer_spec}
    for name, value in settings.items():
        if not hasattr(provider, name):
            raise AttributeError(
                f"{type(provider).__name__} has no field {name!r}: megatron-bridge has changed"
            )
        setattr(provider, name, value)
    provider.finalize()


def local_layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Megatron's own layers without Transformer Engine, for this rank's stage of any GPT family."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )

"""How Bridge's model provider is set: layout, precision, RL training, and what a CPU cannot run."""

from __future__ import annotations

from typing import Any

import torch

from refit.train_side import local_layers
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
    "moe_shared_expert_overlap": False,
    "cross_entropy_loss_fusion": False,
    "batch_p2p_sync": False,
    "moe_token_dispatcher_type": "allgather",  # "alltoall" wants a CUDA stream
}


def configure(provider: Any, parallel: TrainParallel, options: TrainOptions) -> None:
    """Set and finalize `provider`. Raises AttributeError if a field is gone: Bridge is not the known version."""
    settings = _layout(provider, parallel) | _precision(options) | _training(provider)
    if not torch.cuda.is_available():
        settings |= _CPU_SETTINGS | local_layers.spec_settings(provider)
    for name, value in settings.items():
        if not hasattr(provider, name):
            raise AttributeError(
                f"{type(provider).__name__} has no field {name!r}: this megatron-bridge is not the known one"
            )
        setattr(provider, name, value)
    provider.finalize()


def none_if_one(size: int) -> int | None:
    """Megatron's way to say that there is no virtual pipeline."""
    return size if size > 1 else None


def _layout(provider: Any, parallel: TrainParallel) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": none_if_one(parallel.virtual_pipeline),
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
        "tensor_parallel_num_weight_shards": parallel.tensor * parallel.gtp,
        "expert_tensor_parallel_num_weight_shards": parallel.expert_tensor * parallel.expert_gtp,
        "num_layers_in_first_pipeline_stage": parallel.first_stage_layers,
        "num_layers_in_last_pipeline_stage": parallel.last_stage_layers,
        # Megatron trains experts under tensor parallelism with sequence parallelism only.
        "sequence_parallel": parallel.tensor > 1 and provider.num_moe_experts is not None,
        "should_pad_vocab": True,
        "make_vocab_size_divisible_by": parallel.vocab_multiple or _largest_divisor(provider.vocab_size),
    }


def _largest_divisor(vocab_size: int) -> int:
    """Bridge's rule: the largest power of two, up to 128, that divides the vocabulary: no padding without TP."""
    return min(vocab_size & -vocab_size, 128)


def _precision(options: TrainOptions) -> dict[str, Any]:
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": False,
    }


def _training(provider: Any) -> dict[str, Any]:
    settings = {
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
    return settings

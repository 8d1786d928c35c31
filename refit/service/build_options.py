"""What trainers and engines are built with, from the configuration of a job."""

from __future__ import annotations

from typing import Any

from refit.service.config import JobConfig
from refit.train_side.options import LORA_MODULES, LoraOptions, TrainOptions, TrainParallel

CALL_TIMEOUT_S = 600.0  # the driver gives up earlier; after this the engine ends its workers itself
MAX_SEQUENCES = 256  # an engine samples up to this many answers at once


def train_parallel(config: JobConfig) -> TrainParallel:
    policy = config.policy
    return TrainParallel(
        tensor=policy.tensor_parallel,
        pipeline=policy.pipeline_parallel,
        expert=policy.expert_parallel,
        data=policy.data_parallel,
        virtual_pipeline=policy.virtual_pipeline,
        expert_tensor=policy.expert_tensor_parallel,
        first_stage_layers=policy.first_stage_layers,
        last_stage_layers=policy.last_stage_layers,
    )


def train_options(config: JobConfig) -> TrainOptions:
    policy = config.policy
    return TrainOptions(
        lr=policy.lr,
        clip_ratio=policy.clip_ratio,
        kl_coef=policy.kl_coef,
        precision=policy.precision,  # type: ignore[arg-type]  # the gate has checked it
        seed=policy.seed,
        num_microbatches=policy.num_microbatches,
        lora=lora_options(config) if policy.lora_rank else None,
    )


def lora_options(config: JobConfig) -> LoraOptions:
    return LoraOptions(
        rank=config.policy.lora_rank,
        alpha=config.policy.lora_alpha,
        targets=config.policy.lora_targets,
        refit=config.policy.lora_refit,  # type: ignore[arg-type]  # the gate has checked it
        engine_dtype="float32" if config.generation.precision == "fp32" else "bfloat16",
    )


def gen_parallel(config: JobConfig) -> dict[str, Any]:
    """The fields of GenParallel, as plain values: importing that class would import vLLM into this process."""
    generation = config.generation
    return {
        "tensor": generation.tensor_parallel,
        "pipeline": generation.pipeline_parallel,
        "expert": generation.expert_parallel > 1,
    }


def gen_options(config: JobConfig) -> dict[str, Any]:
    """The fields of GenOptions that a job sets; the rest are its defaults."""
    return {
        "dtype": "float32" if config.generation.precision == "fp32" else "bfloat16",
        "seed": config.policy.seed,
        "max_model_len": config.generation.max_model_len,
        "max_num_seqs": MAX_SEQUENCES,
        "pause": config.refit.pause,
        "kv_cache": config.refit.kv_cache,
        "lora": served_lora(config) if config.policy.sends_adapters else None,
        "sequence_parallel": config.generation.sequence_parallel,
        "call_timeout_s": max(CALL_TIMEOUT_S, config.step_timeout_s),
    }


def served_lora(config: JobConfig) -> dict[str, Any]:
    """The fields of LoraSpec."""
    policy = config.policy
    modules = [module for target in policy.lora_targets for module in LORA_MODULES[target]]
    return {"rank": policy.lora_rank, "alpha": policy.lora_alpha, "modules": modules}

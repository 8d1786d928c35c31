"""What vLLM's engine is built with (vLLM 0.31). vLLM is imported by `build_llm`, never by importing this module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refit.gen_side.live.configuration import engine_arguments
from refit.gen_side.plugin import ADAPTER_BACKEND, BACKEND
from refit.plan.errors import ConfigError

if TYPE_CHECKING:
    from refit.gen_side.generator import GenOptions, GenParallel


def build_llm(model_dir: str, parallel: GenParallel, options: GenOptions) -> Any:
    """vLLM's engine on a checkpoint, with this package's weight transfer backend in every worker."""
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    return LLM(
        model_dir,
        tensor_parallel_size=parallel.tensor,
        pipeline_parallel_size=parallel.pipeline,
        enable_expert_parallel=parallel.expert,
        distributed_executor_backend="mp" if parallel.num_ranks > 1 else "uni",
        dtype=options.dtype,
        seed=options.seed,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        kv_cache_memory_bytes=options.kv_cache_bytes,
        kv_cache_dtype=options.kv_cache_dtype,
        gpu_memory_utilization=options.gpu_memory_utilization,
        **engine_arguments(options.sequence_parallel, options.sequence_min_tokens, options.enforce_eager),
        enable_prompt_embeds=options.prompt_embeds,
        enable_prefix_caching=options.prefix_caching,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        logprobs_mode="raw_logprobs",
        weight_transfer_config=WeightTransferConfig(
            backend=BACKEND if options.lora is None else ADAPTER_BACKEND
        ),
        worker_extension_cls="refit.gen_side.worker.RefitWorker",
        **({} if options.lora is None else _lora_arguments(options.lora)),
    )


def _lora_arguments(lora: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's own LoRA with room for one adapter, and what the workers must know of it."""
    from refit.gen_side.lora import OPTIONS_KEY, RANKS

    room = next(rank for rank in RANKS if rank >= lora["rank"])
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": room,
        "additional_config": {OPTIONS_KEY: dict(lora)},
    }


def stop_tokens_of(model_dir: Path) -> tuple[int, ...]:
    """The end tokens of the checkpoint: without a tokenizer vLLM does not look them up."""
    config = model_dir / "config.json"
    if not config.is_file():
        raise ConfigError(f"{model_dir} holds no config.json: give the folder of an HF checkpoint")
    end = json.loads(config.read_text()).get("eos_token_id")  # absent means that the model names no end token
    if end is None:
        return ()
    return tuple(end) if isinstance(end, list) else (int(end),)

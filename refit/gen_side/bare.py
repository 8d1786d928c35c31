"""One rank of a vLLM model without its engine: the live model, its loader and its processing, no serving.

For layouts that the CPU wheel can construct and refit but not run (expert parallel), and for validation runs
that need many layouts in little time. The model is vLLM's own, built and loaded by vLLM's own functions.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from refit.gen_side.generator import ENVIRONMENT, GenParallel


@dataclass(frozen=True, slots=True)
class BareWorker:
    """A loaded rank. `config` is vLLM's; `model_config` is what processing needs."""

    model: torch.nn.Module
    config: Any

    @property
    def model_config(self) -> Any:
        return self.config.model_config


def join_ranks(model_dir: str | Path, parallel: GenParallel, dtype: str, rank: int, address: str) -> None:
    """Make this process rank `rank` of a vLLM layout. `address` is "host:port" of rank 0. Once per process."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

    os.environ["VLLM_DIST_IDENT"] = address.rpartition(":")[2]
    config = _vllm_config(model_dir, parallel, dtype)
    with set_current_vllm_config(config):
        init_worker_distributed_environment(
            config, rank, f"tcp://{address}", rank, current_platform.dist_backend
        )


def load(
    model_dir: str | Path, parallel: GenParallel, dtype: str, rank: int, load_format: str = "auto"
) -> BareWorker:
    """Build and load this rank's model from an HF checkpoint, as a vLLM worker does. After `join_ranks`.

    With `load_format` "dummy" the weights are vLLM's own random ones and only config.json is read.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    config = _vllm_config(model_dir, parallel, dtype)
    config.parallel_config.rank = rank
    config.load_config.load_format = load_format
    with set_current_vllm_config(config):
        return BareWorker(get_model(vllm_config=config), config)


def _vllm_config(model_dir: str | Path, parallel: GenParallel, dtype: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(model_dir),
        tensor_parallel_size=parallel.tensor,
        pipeline_parallel_size=parallel.pipeline,
        enable_expert_parallel=parallel.expert,
        distributed_executor_backend="mp" if parallel.num_ranks > 1 else "uni",
        dtype=dtype,
        max_model_len=128,
        kv_cache_memory_bytes=1 << 24,
        enforce_eager=True,
        skip_tokenizer_init=True,
    ).create_engine_config()

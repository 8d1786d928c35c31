"""One rank of a vLLM model without its engine: the live model, its loader and its processing, no serving.

For layouts that the CPU wheel can construct and refit but not run (expert parallel), and for validation runs
that need many layouts in little time. The model is vLLM's own, built and loaded by vLLM's own functions.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from refit.gen_side.generator import ENVIRONMENT, GenParallel
from refit.gen_side.requests import forced_logprobs
from refit.gen_side.worker import prepare_pipeline


@dataclass(frozen=True, slots=True)
class BareWorker:
    """A loaded rank. `config` is vLLM's; `model_config` is what processing needs."""

    model: torch.nn.Module
    config: Any

    @property
    def model_config(self) -> Any:
        return self.config.model_config

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """vLLM reads its configuration from the context in which its model code runs."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.config):
            yield


_PRELOADED = (
    "transformers",
    "vllm",
    "vllm.engine.arg_utils",
    "vllm.model_executor.model_loader",
    "vllm.v1.worker.cpu_worker",
    "refit.gen_side.live.audit",
    *(
        f"vllm.model_executor.models.{family}"
        for family in ("qwen2", "qwen3", "qwen3_moe", "llama", "deepseek_v2", "nemotron_h")
    ),
)


def preload() -> None:
    """Import what every rank needs (10 to 30 s), in the parent of processes that are to be forked."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for module in _PRELOADED:
        importlib.import_module(module)
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        # vLLM looks at each architecture in a process of its own, which imports vLLM again, only to keep CUDA out
        # of the caller. There is no CUDA to keep out here.
        registry = importlib.import_module("vllm.model_executor.models.registry")
        registry._run_in_subprocess = lambda look: look()


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


def forget_ranks(address: str) -> None:
    """Remove the shared memory that vLLM's CPU collectives leave behind when ranks at `address` are killed."""
    for left in Path("/dev/shm").glob(f"{address.rpartition(':')[2]}-*-cpushm_*"):  # noqa: S108  not a temporary file
        left.unlink(missing_ok=True)


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
    with set_current_vllm_config(config), _experts_without_a_gate():
        return BareWorker(get_model(vllm_config=config), config)


@dataclass(frozen=True, slots=True)
class RunningRank:
    """One rank of a real engine, in this process: every rank runs the whole engine on the same prompts."""

    llm: Any
    worker: BareWorker

    @classmethod
    def launch(
        cls,
        model_dir: str | Path,
        parallel: GenParallel,
        dtype: str,
        rank: int,
        address: str,
        load_format: str,
    ) -> RunningRank:
        """Build rank `rank` of an engine whose ranks meet at `address`. All ranks call this at the same time."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM
        from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(parallel.num_ranks)}
        meeting = mock.patch.object(
            ExecutorWithExternalLauncher, "_distributed_args", lambda _: (f"tcp://{address}", rank, rank)
        )
        with meeting:
            llm = LLM(
                **_engine_arguments(model_dir, parallel, dtype),
                load_format=load_format,
                distributed_executor_backend="external_launcher",
                disable_log_stats=True,
                logprobs_mode="raw_logprobs",
            )
        worker = llm.llm_engine.model_executor.driver_worker.worker
        prepare_pipeline(worker.model_runner)
        return cls(llm, BareWorker(worker.model_runner.get_model(), worker.vllm_config))

    def logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of every token of each prompt after its first, given those before it."""
        return forced_logprobs(self.llm, prompts)


@contextlib.contextmanager
def _experts_without_a_gate() -> Iterator[None]:
    """Build on a CPU what vLLM refuses there for want of a kernel: such experts can be refitted here, not run."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    check = FusedMoEConfig.__post_init__

    def check_all_but_the_kernel(config: Any) -> None:
        try:
            check(config)
        except NotImplementedError as error:
            if "is_act_and_mul=False" not in str(error):
                raise

    supported = {"_supports_no_act_and_mul": lambda: True, "_supports_activation": lambda _: True}
    with (
        mock.patch.object(FusedMoEConfig, "__post_init__", check_all_but_the_kernel),
        mock.patch.multiple(CPUUnquantizedExperts, **{k: staticmethod(v) for k, v in supported.items()}),
    ):
        yield


def _vllm_config(model_dir: str | Path, parallel: GenParallel, dtype: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        **_engine_arguments(model_dir, parallel, dtype),
        distributed_executor_backend="mp" if parallel.num_ranks > 1 else "uni",
    ).create_engine_config()


def _engine_arguments(model_dir: str | Path, parallel: GenParallel, dtype: str) -> dict[str, Any]:
    return {
        "model": str(model_dir),
        "tensor_parallel_size": parallel.tensor,
        "pipeline_parallel_size": parallel.pipeline,
        "enable_expert_parallel": parallel.expert,
        "dtype": dtype,
        "max_model_len": 128,
        "kv_cache_memory_bytes": 1 << 24,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
    }

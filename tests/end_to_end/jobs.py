"""Real jobs for the tests: Ray, Megatron-Core and vLLM, started once per configuration and prepared once per path."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refit.run import load_config
from refit.service.cluster import Cluster
from refit.service.config import JobConfig
from refit.service.coordinator import Coordinator
from refit.service.waiting import collect
from refit.train_side.batch import TrainBatch
from refit.train_side.tiny_models import make_tiny_model

PATHS = ("p2p", "golden", "conventional")
CALL_S = 240.0
OVERRIDES = ("policy.lr=0.003", "policy.kl_coef=0")  # learn one lesson fast


@dataclass
class Job:
    """Built actors; `path` prepares them for one way of moving weights."""

    config: JobConfig
    cluster: Cluster
    version: int = 0

    @contextmanager
    def path(self, name: str) -> Iterator[Coordinator]:
        coordinator = Coordinator.prepare(
            with_path(self.config, name), self.cluster.trainers, self.cluster.generators
        )
        try:
            yield coordinator
        finally:
            coordinator.close()

    def refit(self, coordinator: Coordinator) -> Any:
        self.version += 1
        return coordinator.refit(self.version)

    def train(self, batch: TrainBatch, num_steps: int = 1) -> list[dict[str, float]]:
        """Real optimizer steps on all trainers; the statistics of each."""
        return [self.all_trainers("train_step", batch)["train rank 0"] for _ in range(num_steps)]

    def logprobs(self, batch: TrainBatch) -> list[list[float]]:
        return self.all_trainers("logprobs", batch)["train rank 0"]

    def all_trainers(self, method: str, *args: Any) -> dict[str, Any]:
        calls = {
            who: getattr(actor, method).remote(*args) for who, actor in self.cluster.named_trainers().items()
        }
        return collect(calls, method, CALL_S)

    def scale_weights(self, factor: float) -> None:
        """Multiply every trained parameter by a power of two: exact in every float format, and exactly undone."""

        def scale(actor: Any) -> None:
            import torch

            seen = set()
            with torch.no_grad():
                for param in actor._policy.params().values():
                    if param.data_ptr() not in seen:
                        seen.add(param.data_ptr())
                        param.data.mul_(factor)

        calls = {
            who: actor.__ray_call__.remote(scale) for who, actor in self.cluster.named_trainers().items()
        }
        collect(calls, "scale weights", CALL_S)

    def flip_element(self, param: str, index: int) -> int:
        """Flip one bit of one live element on every worker that has the parameter; how many did."""

        def flip(actor: Any) -> int:
            llm = actor._generator._llm
            return sum(llm.collective_rpc("refit_flip_element", args=(param, index)))

        calls = {
            who: actor.__ray_call__.remote(flip) for who, actor in self.cluster.named_generators().items()
        }
        return sum(collect(calls, "flip", CALL_S).values())

    def sample(self, prompts: list[tuple[int, ...]], num_samples: int, seed: int) -> list[Any]:
        """Rows of (prompt index, tokens, logprobs, version) of the first engine."""
        settings = self.config.generation
        actor = self.cluster.generators[0]
        reference = actor.generate.remote(
            prompts, num_samples, settings.max_new_tokens, settings.temperature, seed
        )
        return list(collect({"generator 0": reference}, "generate", CALL_S)["generator 0"])


class JobPool:
    """At most one job at a time, kept alive across tests: building one costs a minute of imports."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = ExitStack()
        self._name = ""
        self._job: Job | None = None

    def get(self, config_name: str) -> Job:
        if self._job is None or self._name != config_name:
            self.close()
            self._job = self._open.enter_context(open_job(config_name, self._folder / config_name, OVERRIDES))
            self._name = config_name
        return self._job

    def close(self) -> None:
        self._job = None
        self._open.close()


@contextmanager
def open_job(config_name: str, folder: Path, overrides: tuple[str, ...] = ()) -> Iterator[Job]:
    """Start the actors of a configuration; no process of it is left afterwards."""
    config = load_config(config_name, [f"run_dir={folder}", *overrides])
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[config.policy.precision]
    model_dir = make_tiny_model(config.policy.model, folder / "model", seed=config.policy.seed, dtype=dtype)
    cluster = Cluster.open(config, folder / "logs")
    try:
        cluster.build(str(model_dir), 600.0)
        yield Job(config, cluster)
    finally:
        cluster.close()


def with_path(config: JobConfig, name: str) -> JobConfig:
    """The same job with its weights on one of PATHS."""
    policy = dataclasses.replace(config.policy, nccl_xfer_refit=name != "conventional")
    bulk = config.refit.bulk if name == "conventional" else name
    return dataclasses.replace(config, policy=policy, refit=dataclasses.replace(config.refit, bulk=bulk))


def some_batch(num_samples: int = 8) -> TrainBatch:
    """A small batch of valid byte tokens with advantages of both signs."""
    prompts = tuple(tuple(range(40 + k, 52 + k)) for k in range(num_samples))
    responses = tuple(tuple(range(60 + k, 64 + k)) for k in range(num_samples))
    logprobs = tuple((-5.0,) * 4 for _ in range(num_samples))
    return TrainBatch(prompts, responses, logprobs, tuple((-1.0) ** k for k in range(num_samples)))

"""The configuration of a job: frozen values, one dataclass per section, one field per key.

These classes hold types and defaults only. Whether the values can work together, on this machine and with this
model, is decided in one place: `refit.service.gate`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from refit.plan.errors import ConfigError
from refit.train_side.options import LORA_TARGETS
from refit.transfer.forced import is_golden_forced

MAX_DEFAULT_STREAMS = 16
ADAPTER = "adapter"
LORA_REFITS = ("merged", ADAPTER)


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """The trainers. `nccl_xfer_refit` is absent from every YAML file, so that Hydra's `+` adds it.

    With `lora_rank` above 0 the weights are frozen and adapters of that rank and of strength `lora_alpha / lora_rank`
    learn, around the layers that `lora_targets` names in Megatron's words. `lora_refit` says what engines get: whole
    weights with the adapters folded in ("merged"), or the adapters alone ("adapter"), for vLLM's own LoRA.

    `first_stage_layers` and `last_stage_layers` make those stages of the pipeline longer or shorter than an even share
    (None), `virtual_pipeline` cuts each stage into that many parts, which take turns.
    """

    model: str = "tiny-qwen3"
    tensor_parallel: int = 1
    pipeline_parallel: int = 2
    expert_parallel: int = 1
    expert_tensor_parallel: int = 1
    data_parallel: int = 1
    virtual_pipeline: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    precision: str = "bf16"
    lr: float = 1e-3
    clip_ratio: float = 0.2
    kl_coef: float = 0.01
    num_microbatches: int = 2
    seed: int = 0
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = LORA_TARGETS
    lora_refit: str = "merged"
    nccl_xfer_refit: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))  # OmegaConf gives a list

    @property
    def sends_adapters(self) -> bool:
        """Whether refits bring adapters, and the engines' weights stay as loaded."""
        return self.lora_rank > 0 and self.lora_refit == ADAPTER

    @property
    def world_size(self) -> int:
        """Number of trainer ranks; expert parallelism reuses the ranks of tensor and data parallelism."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """The generators: `replicas` vLLM engines of `tensor_parallel * pipeline_parallel` workers each.

    `sequence_parallel` asks for vLLM's pass; what the engines made of it is in the summary of the run.
    """

    tensor_parallel: int = 2
    pipeline_parallel: int = 1
    expert_parallel: int = 1
    sequence_parallel: bool = False
    replicas: int = 1
    precision: str = "bf16"
    max_model_len: int = 128
    max_new_tokens: int = 4
    temperature: float = 1.0

    @property
    def workers_per_replica(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def world_size(self) -> int:
        return self.workers_per_replica * self.replicas


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Where the actors run. `address` None: a Ray of our own on loopback, gone when the job ends.

    `port` is the control store's, 0 for any free one; `num_cpus` 0 lets Ray count. `min_free_memory_bytes` is a
    floor: the larger of it and the gate's own estimate must be free. `nic_gbps`, the line rate of one rank's network in
    each direction in Gb/s, lets records say which share of it a refit had.

    Trainers and engines must be built within `build_timeout_s`, which is mostly reading the model from disk.

    Each lost generator is replaced up to `restart_generators` times. On an existing cluster all actors get their place
    in one placement group by `placement` (PACK, SPREAD, STRICT_PACK, STRICT_SPREAD), trainers and generators on nodes
    with the labels given.
    """

    address: str | None = None
    num_cpus: int = 0
    port: int = 0
    min_free_memory_bytes: int = 0
    nic_gbps: float | None = None
    build_timeout_s: float = 600.0
    restart_generators: int = 1
    placement: str = "PACK"
    policy_labels: dict[str, str] = field(default_factory=dict)
    generation_labels: dict[str, str] = field(default_factory=dict)

    @property
    def line_bytes_per_s(self) -> float | None:
        """`nic_gbps` in bytes."""
        return None if self.nic_gbps is None else self.nic_gbps * 1e9 / 8


@dataclass(frozen=True, slots=True)
class RefitConfig:
    """How weights travel. `timeout_s` bounds every wait of that; engines are audited every `verify_every` steps
    (0: never).

    `backend` makes the process groups; `transport` is what carries bulk, over them or beside them.
    `num_streams` is how many trainer stages travel at once (None: all, up to MAX_DEFAULT_STREAMS); each stream takes
    up to `2 * buffer_bytes` of a generator. `force_misc` are patterns of whole canonical tensor names that go by
    broadcast although they could be bulk.

    `pause` (wait, abort, keep) says what a commit does to requests under way, `kv_cache` (clear, keep) what it does to
    keys and values that the old weights computed. A round that failed without the loss of a generator is repeated
    `retries` times.

    With `delta` only elements whose bits changed since the last refit travel; trainers and engines keep a copy each of
    what they sent and received then.
    """

    backend: str = "gloo"
    transport: str = "auto"
    bulk: str = "p2p"
    delta: bool = False
    buffer_bytes: int = 64 * 2**20
    num_streams: int | None = None
    timeout_s: float = 120.0
    retries: int = 1
    pause: str = "wait"
    kv_cache: str = "clear"
    verify_every: int = 10
    force_misc: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "force_misc", tuple(self.force_misc))  # OmegaConf gives a list


@dataclass(frozen=True, slots=True)
class GrpoConfig:
    """The training loop. One step samples `samples_per_prompt` answers to each of `prompts_per_step` prompts.

    With `max_staleness` n > 0 the loop is asynchronous: it samples up to n steps ahead, beside training and refits, so
    that no token is older than n versions when it is trained on. 0 is the synchronous loop.

    The policy is saved every `checkpoint_every` steps (0: never), and at the end if `save_checkpoint`.

    `timeout_s` bounds each part of a step beside its refit: rollout, logprobs, optimizer step. None: `refit.timeout_s`.
    """

    steps: int = 50
    prompts_per_step: int = 16
    samples_per_prompt: int = 16
    task: str = "basic_arithmetic"
    task_seed: int = 0
    scale_advantages: bool = True
    max_staleness: int = 0
    timeout_s: float | None = None
    save_checkpoint: bool = False
    checkpoint_every: int = 10


@dataclass(frozen=True, slots=True)
class JobConfig:
    """Everything `python -m refit.run` reads."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    refit: RefitConfig = field(default_factory=RefitConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    run_dir: str = "runs/latest"

    @property
    def num_streams(self) -> int:
        """Trainer stages in flight at once. Fewer than there are leave the other stages' network unused."""
        if self.refit.num_streams is not None:
            return self.refit.num_streams
        return max(1, min(self.policy.pipeline_parallel, MAX_DEFAULT_STREAMS))

    @property
    def step_timeout_s(self) -> float:
        """Longest wait for a rollout, for logprobs, or for an optimizer step."""
        return self.refit.timeout_s if self.grpo.timeout_s is None else self.grpo.timeout_s

    @property
    def path(self) -> str:
        """Which way the weights go: "p2p", "golden" or "conventional"."""
        return self.refit.bulk if self.policy.nccl_xfer_refit else "conventional"


def known_keys() -> tuple[str, ...]:
    """Every key of a job, dotted, sections included: "policy", "policy.model", ..., "run_dir"."""
    keys: list[str] = []
    for section in dataclasses.fields(JobConfig):
        keys.append(section.name)
        if dataclasses.is_dataclass(section.default_factory):
            keys += [f"{section.name}.{key.name}" for key in dataclasses.fields(section.default_factory)]
    return tuple(keys)


def nearest_key(key: str, keys: Iterable[str] | None = None) -> str:
    """The valid key that looks most like `key`."""
    candidates = known_keys() if keys is None else tuple(keys)
    return difflib.get_close_matches(key, candidates, n=1, cutoff=0.0)[0]


def what_it_takes(key: str) -> str:
    """For example "refit.timeout_s takes float, 120.0 by default"; "" for a section and for no key at all."""
    section, _, name = key.rpartition(".")
    factories = {each.name: each.default_factory for each in dataclasses.fields(JobConfig)}
    of: Any = factories.get(section)
    keys = {each.name: each for each in dataclasses.fields(of)} if dataclasses.is_dataclass(of) else {}
    if name not in keys or keys[name].default is dataclasses.MISSING:
        return ""
    default, kind = keys[name].default, str(keys[name].type).replace("None", "null")
    if isinstance(default, tuple):
        default, kind = f"[{','.join(default)}]", "a list such as [one,two]"
    return f"{key} takes {kind}, {'null' if default is None else default} by default"


def apply_environment(config: JobConfig, environ: Mapping[str, str]) -> JobConfig:
    """Let NRL_XFERDTENSOR_GOLDEN=1 turn bulk moves into golden ones; "" and "0" change nothing.

    NRL_REFIT_NUM_STREAMS is read by configs/default.yaml, so an explicit `refit.num_streams` beats it.
    """
    try:
        is_golden = is_golden_forced(environ)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not is_golden:
        return config
    return dataclasses.replace(config, refit=dataclasses.replace(config.refit, bulk="golden"))

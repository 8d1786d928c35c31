"""The rules of the gate: each looks at a `Case` and yields what cannot work: key, value, reason, way out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from refit.service.config import JobConfig
from refit.service.gate.model import ModelFacts
from refit.service.grpo.tasks import TASKS, has_tokenizer
from refit.service.memory import needed_bytes
from refit.train_side.tiny_models import TINY_MODELS
from refit.transfer.precision.checkpoint import QUANTIZATIONS
from refit.transfer.protocol import CUDA_IPC, NIXL, TCP, TRANSPORTS

PRECISIONS = ("bf16", "fp32")
GEN_PRECISIONS = (*PRECISIONS, *QUANTIZATIONS)
BACKENDS = ("gloo", "nccl")
BULKS = ("p2p", "golden")
PLACEMENTS = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
MIN_BUFFER_BYTES = 2**16
NIC_GBPS = (0.001, 100_000.0)
TIMEOUT_S = (1.0, 86_400.0)
MAX_STREAMS = 32
MAX_BYTE_VOCABULARY = 1024  # bytes, and room for special tokens and padding
GIB = 2**30
AT_LEAST_ONE = {
    "policy": (
        "tensor_parallel",
        "pipeline_parallel",
        "expert_parallel",
        "expert_tensor_parallel",
        "virtual_pipeline",
        "data_parallel",
        "num_microbatches",
    ),
    "generation": (
        "tensor_parallel",
        "pipeline_parallel",
        "expert_parallel",
        "replicas",
        "max_model_len",
        "max_new_tokens",
    ),
    "grpo": ("steps", "prompts_per_step"),
}


@dataclass(frozen=True, slots=True)
class Environment:
    """What this machine offers; see `refit.service.gate.check.inspect_machine`."""

    available_memory_bytes: int
    num_cuda_devices: int
    taken_ports: tuple[int, ...]
    cluster_answers: bool = True
    has_nixl: bool = True


@dataclass(frozen=True, slots=True)
class Violation:
    """A key, its value, why that cannot work, and what to do."""

    key: str
    value: object
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value!r}: {self.problem}. {self.remedy}"


@dataclass(frozen=True, slots=True)
class Case:
    """What the rules look at. `model` is None when the folder holds no model that is known: `unknown` says why."""

    config: JobConfig
    model: ModelFacts | None
    environment: Environment
    unknown: str = ""

    @property
    def on_cpu(self) -> bool:
        return self.environment.num_cuda_devices == 0


type Rule = Callable[[Case], Iterator[Violation]]


def sizes(case: Case) -> Iterator[Violation]:
    """Counts are positive and numbers lie in their ranges."""
    config = case.config
    for section, names in AT_LEAST_ONE.items():
        for name in names:
            yield from _within(f"{section}.{name}", getattr(getattr(config, section), name), 1, None)
    for key, value in (
        ("policy.seed", config.policy.seed),
        ("policy.kl_coef", config.policy.kl_coef),
        ("cluster.num_cpus", config.cluster.num_cpus),
        ("cluster.min_free_memory_bytes", config.cluster.min_free_memory_bytes),
        ("cluster.restart_generators", config.cluster.restart_generators),
        ("refit.retries", config.refit.retries),
        ("refit.verify_every", config.refit.verify_every),
        ("grpo.checkpoint_every", config.grpo.checkpoint_every),
        ("grpo.max_staleness", config.grpo.max_staleness),
        ("grpo.task_seed", config.grpo.task_seed),
    ):
        yield from _within(key, value, 0, None)
    if config.cluster.nic_gbps is not None:
        yield from _within("cluster.nic_gbps", config.cluster.nic_gbps, *NIC_GBPS)
    yield from _within("cluster.port", config.cluster.port, 0, 2**16 - 1)
    yield from _within("refit.buffer_bytes", config.refit.buffer_bytes, MIN_BUFFER_BYTES, None)
    yield from _within("refit.num_streams", config.num_streams, 1, MAX_STREAMS)
    yield from _within("refit.timeout_s", config.refit.timeout_s, *TIMEOUT_S)
    yield from _within("cluster.build_timeout_s", config.cluster.build_timeout_s, *TIMEOUT_S)
    if config.grpo.timeout_s is not None:
        yield from _within("grpo.timeout_s", config.grpo.timeout_s, *TIMEOUT_S)
    yield from _within("policy.lr", config.policy.lr, 0.0, 1.0)
    if not 0.0 < config.policy.clip_ratio < 1.0:
        yield Violation(
            "policy.clip_ratio", config.policy.clip_ratio, "it must lie between 0 and 1", "0.2 is usual"
        )


def names(case: Case) -> Iterator[Violation]:
    """Words are among the known ones."""
    config = case.config
    for key, value, known in (
        ("policy.precision", config.policy.precision, PRECISIONS),
        ("generation.precision", config.generation.precision, GEN_PRECISIONS),
        ("refit.backend", config.refit.backend, BACKENDS),
        ("refit.bulk", config.refit.bulk, BULKS),
        ("refit.pause", config.refit.pause, ("wait", "abort", "keep")),
        ("refit.kv_cache", config.refit.kv_cache, ("clear", "keep")),
        ("cluster.placement", config.cluster.placement, PLACEMENTS),
        ("refit.transport", config.refit.transport, TRANSPORTS),
        ("grpo.task", config.grpo.task, tuple(TASKS)),
    ):
        if value not in known:
            yield Violation(key, value, "it is not supported", f"Use one of {', '.join(known)}")


def patterns(case: Case) -> Iterator[Violation]:
    """Patterns are regular expressions."""
    for pattern in case.config.refit.force_misc:
        try:
            re.compile(pattern)
        except re.error as error:
            problem = f"it is not a regular expression: {error}"
            yield Violation("refit.force_misc", pattern, problem, "Write one that matches whole tensor names")


def model_folder(case: Case) -> Iterator[Violation]:
    """The model is a tiny one by name, or a folder with a config and weights."""
    model = case.config.policy.model
    if model in TINY_MODELS:
        return
    folder = Path(model)
    remedy = f"Give the folder of an HF checkpoint, or one of {', '.join(TINY_MODELS)}"
    if not folder.is_dir():
        yield Violation("policy.model", model, "there is no such folder", remedy)
    elif case.model is None:
        yield Violation(
            "policy.model", model, case.unknown or "its config.json is missing or is not JSON", remedy
        )
    elif not any(folder.glob("*.safetensors")):
        yield Violation("policy.model", model, "it holds no .safetensors file", remedy)
    elif case.model.vocab_size > MAX_BYTE_VOCABULARY and not has_tokenizer(folder):
        problem = f"it has no tokenizer, and its vocabulary of {case.model.vocab_size} is not one of bytes"
        yield Violation("policy.model", model, problem, "Put the tokenizer's files beside the weights")


def grpo(case: Case) -> Iterator[Violation]:
    """Groups can be compared, and samples suffice for all trainers and engines."""
    config = case.config
    group, num_prompts = config.grpo.samples_per_prompt, config.grpo.prompts_per_step
    if group < 2:
        yield Violation(
            "grpo.samples_per_prompt",
            group,
            "an advantage is relative to other answers to the same prompt",
            "Use at least 2",
        )
    if num_prompts < config.generation.replicas:
        yield Violation(
            "generation.replicas",
            config.generation.replicas,
            f"{num_prompts} prompts per step leave an engine without work",
            f"Raise grpo.prompts_per_step to {config.generation.replicas}, or start fewer engines",
        )
    shares = config.policy.data_parallel * config.policy.num_microbatches
    if group >= 2 and group * num_prompts < shares:
        yield Violation(
            "policy.num_microbatches",
            config.policy.num_microbatches,
            f"{group * num_prompts} samples a step cannot fill {shares} microbatches over all data parallel ranks",
            "Lower it, or sample more",
        )


def generation(case: Case) -> Iterator[Violation]:
    """What the engines are asked to sample."""
    settings = case.config.generation
    if settings.temperature != 1.0:
        yield Violation(
            "generation.temperature",
            settings.temperature,
            "the loss differentiates the policy at temperature 1, so samples must come from it",
            "Use 1.0",
        )
    if settings.max_new_tokens >= settings.max_model_len:
        yield Violation(
            "generation.max_new_tokens",
            settings.max_new_tokens,
            f"generation.max_model_len {settings.max_model_len} leaves no room for a prompt",
            "Lower it, or raise generation.max_model_len",
        )
    if settings.sequence_parallel and settings.tensor_parallel == 1:
        yield Violation(
            "generation.sequence_parallel",
            settings.sequence_parallel,
            "vLLM cuts a sequence over the tensor-parallel ranks of an engine, and there is one",
            "Use false, or generation.tensor_parallel=2",
        )


def engine_stages(case: Case) -> Iterator[Violation]:
    """Each stage of an engine has a layer; without CUDA only what was seen to run is cut into stages."""
    settings, model = case.config.generation, case.model
    key, pp = "generation.pipeline_parallel", settings.pipeline_parallel
    if model is None or pp == 1:
        return
    if pp > model.num_layers:
        problem = f"the model has {model.num_layers} layers, some stages would be empty"
        yield Violation(key, pp, problem, f"Use at most {model.num_layers}")
    unseen = (
        ("hybrids of Mamba and attention", model.is_hybrid),
        ("models with latent attention", model.is_latent),
        (f"models in {settings.precision}", settings.precision in QUANTIZATIONS),
    )
    for what, is_so in unseen:
        if is_so and case.on_cpu:
            problem = f"engines of several stages are not validated for {what} on a machine without CUDA"
            yield Violation(key, pp, problem, "Use 1; pipeline-parallel trainers are fine")


def heads(case: Case) -> Iterator[Violation]:
    """Tensor parallelism cuts attention heads, KV heads and MLP rows evenly on both sides."""
    if case.model is None:
        return
    model = case.model
    sides = (
        ("policy", case.config.policy.tensor_parallel, model.widths),
        ("generation", case.config.generation.tensor_parallel, model.widths + model.expert_widths),
    )
    for section, tp, widths in sides:
        key = f"{section}.tensor_parallel"
        if model.num_heads % tp:
            remedy = f"Use a divisor of {model.num_heads}"
            yield Violation(
                key, tp, f"it does not divide the {model.num_heads} attention heads of the model", remedy
            )
        if model.num_kv_heads % tp and tp % model.num_kv_heads:
            problem = (
                f"it neither divides nor is a multiple of the {model.num_kv_heads} KV heads of the model"
            )
            yield Violation(key, tp, problem, f"Use a divisor or a multiple of {model.num_kv_heads}")
        for what, width in widths:
            if width % tp:
                yield Violation(
                    key, tp, f"it does not divide the {what} of {width}", f"Use a divisor of {width}"
                )


def model_form(case: Case) -> Iterator[Violation]:
    """The checkpoint is of a family and a form that both sides are known to hold."""
    if case.model is None:
        return
    model, name = case.model, case.config.policy.model
    for problem, remedy in (*model.problems, *(model.cpu_problems if case.on_cpu else ())):
        yield Violation("policy.model", name, problem, remedy)
    wanted = case.config.generation.max_model_len
    if model.max_positions is not None and wanted > model.max_positions:
        yield Violation(
            "generation.max_model_len",
            wanted,
            f"the model has {model.max_positions} positions",
            f"Use at most {model.max_positions}",
        )


def experts(case: Case) -> Iterator[Violation]:
    """Expert parallelism needs experts and even cuts; some of it does not run here."""
    if case.model is None:
        return
    policy, settings, num_experts = case.config.policy, case.config.generation, case.model.num_experts
    for section, ep in (("policy", policy.expert_parallel), ("generation", settings.expert_parallel)):
        key = f"{section}.expert_parallel"
        if ep > 1 and num_experts == 0:
            yield Violation(key, ep, "the model has no experts", "Use 1")
        elif ep > 1 and num_experts % ep:
            yield Violation(
                key, ep, f"it does not divide the {num_experts} experts", f"Use a divisor of {num_experts}"
            )
    yield from _generator_experts(case)


def _generator_experts(case: Case) -> Iterator[Violation]:
    settings = case.config.generation
    ep = settings.expert_parallel
    if ep > 1 and case.on_cpu:
        problem = "vLLM's expert kernel for CPUs ignores the expert map and crashes"
        yield Violation("generation.expert_parallel", ep, problem, "Use 1 with generation.tensor_parallel")
    elif ep > 1 and ep != settings.tensor_parallel:
        problem = f"vLLM spreads experts over all of its {settings.tensor_parallel} tensor-parallel ranks"
        yield Violation("generation.expert_parallel", ep, problem, "Make both equal")


def machine(case: Case) -> Iterator[Violation]:
    """Ports, packages, devices and memory of this machine. Those of an existing cluster are Ray's to judge."""
    if case.config.refit.transport == NIXL and not case.environment.has_nixl:
        remedy = "Install nixl and nixl-cu13, or use auto"
        yield Violation("refit.transport", NIXL, "the package nixl is not installed", remedy)
    if case.config.refit.transport == CUDA_IPC and case.on_cpu:
        remedy = "Use auto or nixl"
        yield Violation("refit.transport", CUDA_IPC, "this machine has no CUDA device to share", remedy)
    cluster, backend = case.config.cluster, case.config.refit.backend
    if case.config.refit.transport == TCP and backend == "nccl":
        problem = "it takes weights in host memory, and with refit.backend=nccl they are on GPUs"
        yield Violation("refit.transport", TCP, problem, "Use auto")
    if cluster.port in case.environment.taken_ports:
        remedy = "Choose another, or 0 for any free one"
        yield Violation("cluster.port", cluster.port, "another process listens on it", remedy)
    if cluster.address is not None:
        if not case.environment.cluster_answers:
            remedy = "Start Ray there, give the right host:port, or use null for a local Ray"
            yield Violation("cluster.address", cluster.address, "no Ray answers at this address", remedy)
        return
    needed_devices = case.config.policy.world_size + case.config.generation.world_size
    num_devices = case.environment.num_cuda_devices
    if backend == "nccl" and num_devices < needed_devices:
        problem = f"{needed_devices} ranks need a CUDA device each, this machine has {num_devices}"
        yield Violation(
            "refit.backend", backend, problem, "Use gloo, fewer ranks, or cluster.address of a cluster"
        )
    yield from _memory(case)


def _memory(case: Case) -> Iterator[Violation]:
    num_params = 0 if case.model is None else case.model.num_params
    estimate = needed_bytes(case.config, num_params)
    asked = case.config.cluster.min_free_memory_bytes
    available = case.environment.available_memory_bytes
    if available >= max(estimate, asked):
        return
    source = "is asked for" if asked > estimate else "is the estimate for this job"
    yield Violation(
        "cluster.min_free_memory_bytes",
        asked,
        f"{available / GIB:.1f} GiB of memory are free, {max(asked, estimate) / GIB:.1f} GiB {source}",
        "Free memory, start fewer ranks or engines, or take a larger machine",
    )


def _within(key: str, value: float, low: float, high: float | None) -> Iterator[Violation]:
    if not value >= low:  # a NaN is refused too
        yield Violation(key, value, f"it must be at least {low}", f"Use {low} or more")
    elif high is not None and value > high:
        yield Violation(key, value, f"it must be at most {high}", f"Use {high} or less")
    elif math.isinf(value):
        yield Violation(key, value, "it must be finite", "Use a number")


RULES: tuple[Rule, ...] = (
    names,
    patterns,
    model_folder,
    model_form,
    heads,
    experts,
    generation,
    engine_stages,
    grpo,
    machine,
)
"""All rules of this file but `sizes`, which holds before any of them may divide."""

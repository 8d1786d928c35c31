"""The gate's rule on LoRA: ranks that can be cut, layers that there are, engines that can serve adapters."""

from __future__ import annotations

import math
from collections.abc import Iterator

from refit.service.config import ADAPTER, LORA_REFITS, PolicyConfig
from refit.service.gate.model import ModelFacts
from refit.service.gate.rules import Case, Violation
from refit.train_side.options import LORA_TARGETS
from refit.transfer.precision.checkpoint import QUANTIZATIONS

MAX_SERVED_RANK = 512


def lora(case: Case) -> Iterator[Violation]:
    """Adapters are cut over the tensor parallel ranks, along their rank where the layer's own cut does not reach."""
    policy = case.config.policy
    if policy.lora_rank < 1:
        yield from _no_adapters(policy)
        return
    if policy.lora_rank % policy.tensor_parallel:
        problem = f"it does not divide by policy.tensor_parallel {policy.tensor_parallel}, over which adapters are cut"
        remedy = f"Use a multiple of {policy.tensor_parallel}"
        yield Violation("policy.lora_rank", policy.lora_rank, problem, remedy)
    if not 0 < policy.lora_alpha < math.inf:
        yield Violation(
            "policy.lora_alpha", policy.lora_alpha, "it must be above 0", "Twice the rank is usual"
        )
    for target in policy.lora_targets or ("",):
        if target not in LORA_TARGETS:
            problem, remedy = "no such layer has adapters", f"Use some of {', '.join(LORA_TARGETS)}"
            yield Violation("policy.lora_targets", policy.lora_targets, problem, remedy)
    if policy.lora_refit not in LORA_REFITS:
        remedy = f"Use one of {', '.join(LORA_REFITS)}"
        yield Violation("policy.lora_refit", policy.lora_refit, "it is not supported", remedy)
    if policy.sends_adapters:
        yield from _adapters_alone(case)
    if case.model is not None:
        yield from _unproven(case, case.model)


def _no_adapters(policy: PolicyConfig) -> Iterator[Violation]:
    if policy.lora_rank < 0:
        yield Violation(
            "policy.lora_rank", policy.lora_rank, "it must be at least 0", "Use 0 for no adapters"
        )
    if policy.lora_refit == ADAPTER:
        problem = f"policy.lora_rank is {policy.lora_rank}, so there are no adapters to send"
        yield Violation("policy.lora_refit", ADAPTER, problem, "Use merged, or policy.lora_rank=8")


def _adapters_alone(case: Case) -> Iterator[Violation]:
    """What vLLM's LoRA, or a version of it that lasts for one refit, does not go with."""
    config, key = case.config, "policy.lora_refit"
    problems = {
        f"policy.lora_rank {config.policy.lora_rank} is above {MAX_SERVED_RANK}, the most that vLLM serves": (
            config.policy.lora_rank > MAX_SERVED_RANK
        ),
        "adapters of models with experts are not validated in vLLM": (
            case.model is not None and case.model.num_experts > 0
        ),
        f"LoRA on engines in {config.generation.precision} is not validated": (
            config.generation.precision in QUANTIZATIONS
        ),
        "with refit.pause keep requests would go on under an adapter that is gone": config.refit.pause
        == "keep",
    }
    for problem, is_so in problems.items():
        if is_so:
            yield Violation(key, config.policy.lora_refit, problem, "Change that, or use merged")


def _unproven(case: Case, model: ModelFacts) -> Iterator[Violation]:
    policy = case.config.policy
    if model.is_hybrid or model.is_latent:
        problem = "adapters of Mamba and of latent attention are not validated"
        yield Violation(
            "policy.lora_rank", policy.lora_rank, problem, "Use 0, or a model with ordinary attention"
        )
    if model.num_experts and policy.tensor_parallel > 1:
        problem = (
            "experts under tensor parallelism share out the sequence, which adapters are not validated with"
        )
        yield Violation(
            "policy.tensor_parallel", policy.tensor_parallel, problem, "Use 1, or policy.lora_rank=0"
        )

"""The gate's rules on how trainers are laid out: pipeline stages and experts."""

from __future__ import annotations

from collections.abc import Iterator

from refit.service.config import PolicyConfig
from refit.service.gate.model import ModelFacts
from refit.service.gate.rules import Case, Violation

_ENDS = ("first_stage_layers", "last_stage_layers")


def stages(case: Case) -> Iterator[Violation]:
    """Every stage of the trainers gets a layer or more, as many each as the keys of the first and the last say."""
    if case.model is None:
        return
    policy, num_layers = case.config.policy, case.model.num_layers
    pp = policy.pipeline_parallel
    given = {key: size for key in _ENDS if (size := getattr(policy, key)) is not None}
    if pp > num_layers:
        problem = f"the model has {num_layers} layers, some stages would be empty"
        yield Violation("policy.pipeline_parallel", pp, problem, f"Use at most {num_layers}")
    elif pp == 1:
        yield from _needs_stages(policy, given)
    elif not given and num_layers % pp:
        yield Violation(
            "policy.pipeline_parallel",
            pp,
            f"it does not divide the {num_layers} layers of the model",
            f"Use a divisor of {num_layers}, or policy.first_stage_layers and policy.last_stage_layers",
        )
    else:
        yield from _cut(case, case.model, given)


def _needs_stages(policy: PolicyConfig, given: dict[str, int]) -> Iterator[Violation]:
    for key, size in given.items():
        yield Violation(f"policy.{key}", size, "there is one stage, which has all layers", "Use null")
    if policy.virtual_pipeline > 1:
        problem = "it cuts pipeline stages, and there is one"
        yield Violation("policy.virtual_pipeline", policy.virtual_pipeline, problem, "Use 1")


def _cut(case: Case, model: ModelFacts, given: dict[str, int]) -> Iterator[Violation]:
    """Megatron's rule: what the named stages leave is shared out evenly over the others."""
    policy = case.config.policy
    left, others = model.num_layers - sum(given.values()), policy.pipeline_parallel - len(given)
    share = left // others if others else 0
    if (given and min(given.values()) < 1) or share * others != left or (others and share < 1):
        key, size = next(iter(given.items()))
        problem = f"it leaves {left} of {model.num_layers} layers to {others} other stages"
        remedy = "Leave each other stage the same number of layers, at least 1"
        yield Violation(f"policy.{key}", size, problem, remedy)
    elif policy.virtual_pipeline > 1:
        yield from _virtual_stages(policy, model, {*given.values(), *([share] if others else [])})


def _virtual_stages(policy: PolicyConfig, model: ModelFacts, num_layers: set[int]) -> Iterator[Violation]:
    key, virtual = "policy.virtual_pipeline", policy.virtual_pipeline
    for size in sorted(num_layers):
        if size % virtual:
            problem = f"it does not divide the {size} layers of a stage"
            yield Violation(key, virtual, problem, f"Use a divisor of {size}")
    if policy.num_microbatches % policy.pipeline_parallel:
        yield Violation(
            "policy.num_microbatches",
            policy.num_microbatches,
            f"virtual stages take turns on as many microbatches as there are stages, {policy.pipeline_parallel}",
            f"Use a multiple of {policy.pipeline_parallel}",
        )
    if model.is_hybrid:
        yield Violation(
            key, virtual, "Megatron-Bridge 0.6 builds Mamba hybrids without virtual stages", "Use 1"
        )


def experts(case: Case) -> Iterator[Violation]:
    """The trainers' experts are cut over the ranks of tensor and data parallelism."""
    if case.model is None:
        return
    policy, model = case.config.policy, case.model
    ranks = policy.tensor_parallel * policy.data_parallel
    ep, etp = policy.expert_parallel, policy.expert_tensor_parallel
    if ranks % (ep * etp):
        over = "" if etp == 1 else f", and policy.expert_tensor_parallel = {etp}"
        yield Violation(
            "policy.expert_parallel",
            ep,
            f"experts are cut over the {ranks} ranks of tensor times data parallelism{over}, which it does not divide",
            f"Set policy.data_parallel so that the product is a multiple of {ep * etp}",
        )
    key = "policy.expert_tensor_parallel"
    if etp > 1 and not model.num_experts:
        yield Violation(key, etp, "the model has no experts", "Use 1")
    for what, width in model.expert_widths:
        if width % etp:
            problem = f"it does not divide the {what} of {width}"
            yield Violation(key, etp, problem, f"Use a divisor of {width}")

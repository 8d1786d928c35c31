"""The gate's rules on how trainers are laid out: pipeline stages and experts."""

from __future__ import annotations

from collections.abc import Iterator

from refit.service.config import PolicyConfig
from refit.service.gate_model import ModelFacts
from refit.service.gate_rules import Case, Violation


def stages(case: Case) -> Iterator[Violation]:
    """Every stage of the trainers gets a layer or more, as many each as the keys of the first and the last say."""
    if case.model is None:
        return
    policy, num_layers = case.config.policy, case.model.num_layers
    pp = policy.pipeline_parallel
    if pp > num_layers:
        problem = f"the model has {num_layers} layers, some stages would be empty"
        yield Violation("policy.pipeline_parallel", pp, problem, f"Use at most {num_layers}")
    elif pp == 1:
        yield from _needs_stages(policy)
    elif policy.first_stage_layers is None and policy.last_stage_layers is None:
        if num_layers % pp:
            yield Violation(
                "policy.pipeline_parallel",
                pp,
                f"it does not divide the {num_layers} layers of the model",
                f"Use a divisor of {num_layers}, or policy.first_stage_layers and policy.last_stage_layers",
            )
        else:
            yield from _virtual_stages(case, num_layers // pp)
    else:
        yield from _uneven(policy, case.model)


def _needs_stages(policy: PolicyConfig) -> Iterator[Violation]:
    for key in ("first_stage_layers", "last_stage_layers"):
        if getattr(policy, key) is not None:
            problem = "there is one stage, which has all layers"
            yield Violation(f"policy.{key}", getattr(policy, key), problem, "Use null")
    if policy.virtual_pipeline > 1:
        problem = "it cuts pipeline stages, and there is one"
        yield Violation("policy.virtual_pipeline", policy.virtual_pipeline, problem, "Use 1")


def _uneven(policy: PolicyConfig, model: ModelFacts) -> Iterator[Violation]:
    """Megatron's rule: what the named stages leave is shared out evenly over the others."""
    given = {
        f"policy.{key}": getattr(policy, key)
        for key in ("first_stage_layers", "last_stage_layers")
        if getattr(policy, key) is not None
    }
    key = next(iter(given))
    left, others = model.num_layers - sum(given.values()), policy.pipeline_parallel - len(given)
    if min(given.values()) < 1 or (left % others or left < others if others else left):
        problem = f"it leaves {left} of {model.num_layers} layers to {others} other stages"
        yield Violation(
            key, given[key], problem, "Leave each other stage the same number of layers, at least 1"
        )
    if policy.virtual_pipeline > 1:
        problem = "virtual stages of unequal pipeline stages are not validated"
        yield Violation("policy.virtual_pipeline", policy.virtual_pipeline, problem, "Use 1, or even stages")
    if model.is_hybrid:
        problem = "a Mamba hybrid is cut into stages of equal length only"
        yield Violation(key, given[key], problem, "Use null")


def _virtual_stages(case: Case, layers_per_stage: int) -> Iterator[Violation]:
    assert case.model is not None, "stages without a model were let through"
    policy, key = case.config.policy, "policy.virtual_pipeline"
    virtual = policy.virtual_pipeline
    if layers_per_stage % virtual:
        problem = f"it does not divide the {layers_per_stage} layers of a stage"
        yield Violation(key, virtual, problem, f"Use a divisor of {layers_per_stage}")
    if virtual > 1 and policy.num_microbatches % policy.pipeline_parallel:
        yield Violation(
            "policy.num_microbatches",
            policy.num_microbatches,
            f"virtual stages take turns on as many microbatches as there are stages, {policy.pipeline_parallel}",
            f"Use a multiple of {policy.pipeline_parallel}",
        )
    if virtual > 1 and case.model.is_hybrid:
        yield Violation(key, virtual, "virtual stages of a Mamba hybrid are not validated", "Use 1")


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

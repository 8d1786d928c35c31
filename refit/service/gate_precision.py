"""The gate's rule on precisions: which pairs of training and serving formats a refit connects."""

from __future__ import annotations

from collections.abc import Iterator

from refit.service.gate_model import ModelFacts
from refit.service.gate_rules import Case, Violation
from refit.transfer.precision.checkpoint import QUANTIZATIONS
from refit.transfer.precision.fp8 import BLOCK, FP8_BLOCK
from refit.transfer.precision.mxfp8 import MXFP8


def precisions(case: Case) -> Iterator[Violation]:
    """Training and serving precision meet in the refit; only some pairs do so exactly."""
    policy, settings = case.config.policy, case.config.generation
    if settings.precision not in QUANTIZATIONS:
        return
    key = "generation.precision"
    if policy.precision != "bf16":
        problem = f"policy.precision {policy.precision!r} is not quantized on the way; only bf16 is"
        yield Violation(key, settings.precision, problem, "Use policy.precision=bf16, or an engine in fp32")
    if case.model is None:
        return
    if settings.precision == MXFP8.name and case.model.num_experts:
        problem = "experts in MXFP8 are not validated"
        yield Violation(key, settings.precision, problem, f"Use {FP8_BLOCK.name} for models with experts")
    if settings.precision == FP8_BLOCK.name:
        yield from _whole_blocks(case.model, settings.tensor_parallel)


def _whole_blocks(model: ModelFacts, tp: int) -> Iterator[Violation]:
    """vLLM's fused layers need each rank's rows of every part to be whole FP8 blocks."""
    heads_per_rank = {"attention": model.num_heads // tp, "KV": max(1, model.num_kv_heads // tp)}
    rows = [(f"{what} rows", heads * model.head_size) for what, heads in heads_per_rank.items()]
    for what, size in (*rows, *((name, width // tp) for name, width in model.widths + model.expert_widths)):
        if size % BLOCK[0]:
            problem = f"with FP8 blocks of {BLOCK[0]}, a rank's {size} of {what} are no whole blocks"
            remedy = "Lower it, use another model, or generation.precision=bf16"
            yield Violation("generation.tensor_parallel", tp, problem, remedy)

"""The gate's rule on precisions: which pairs of training and serving formats a refit connects."""

from __future__ import annotations

from collections.abc import Iterator

from refit.service.gate.model import ModelFacts
from refit.service.gate.rules import PRECISIONS, Case, Violation
from refit.transfer.precision.checkpoint import QUANTIZATIONS
from refit.transfer.precision.codecs import CODECS
from refit.transfer.precision.fp8 import BLOCK, FP8_BLOCK
from refit.transfer.precision.mxfp8 import MXFP8

CAST = frozenset((train, engine) for train in PRECISIONS for engine in PRECISIONS)
QUANTIZED = frozenset(("bf16", form) for form in QUANTIZATIONS)
PAIRS = CAST | QUANTIZED
"""(policy.precision, generation.precision) that a job's refits connect."""


def precisions(case: Case) -> Iterator[Violation]:
    """Training and serving precision meet in the refit; only some pairs do so exactly."""
    policy, settings = case.config.policy, case.config.generation
    key = "generation.precision"
    if (policy.precision, settings.precision) not in PAIRS:
        problem, remedy = _why_not(policy.precision, settings.precision)
        yield Violation(key, settings.precision, problem, remedy)
    if case.model is None or settings.precision not in QUANTIZATIONS:
        return
    if settings.precision == FP8_BLOCK.name:
        yield from _whole_blocks(case.model, settings.tensor_parallel)
    if settings.precision == MXFP8.name:
        yield from _whole_groups(case.model, settings.tensor_parallel)


def _why_not(train: str, engine: str) -> tuple[str, str]:
    """(problem, way out) of a pair that is not among PAIRS; both precisions are named."""
    if train in CODECS:
        return (
            f"policy.precision {train!r} needs Transformer Engine, with which no job trains yet",
            "Use policy.precision=bf16",
        )
    if engine in QUANTIZATIONS:
        return (
            f"policy.precision {train!r} is not quantized on the way; only bf16 is",
            "Use policy.precision=bf16, or an engine in fp32",
        )
    return (
        f"no engine of a job reads it, from policy.precision {train!r} or any other",
        f"Use one of {', '.join((*PRECISIONS, *QUANTIZATIONS))}",
    )


def _whole_groups(model: ModelFacts, tp: int) -> Iterator[Violation]:
    """A scale of MXFP8 is one rank's: columns that tensor parallelism cuts must be whole groups on each."""
    columns = ("attention", model.num_heads // tp * model.head_size)
    for what, size in (columns, *((name, width // tp) for name, width in model.widths + model.expert_widths)):
        if size % MXFP8.unit[1]:
            problem = (
                f"with MXFP8 groups of {MXFP8.unit[1]}, a rank's {size} columns of {what} are no whole groups"
            )
            yield Violation(
                "generation.tensor_parallel", tp, problem, "Lower it, or generation.precision=bf16"
            )


def _whole_blocks(model: ModelFacts, tp: int) -> Iterator[Violation]:
    """vLLM's fused layers need each rank's rows of every part to be whole FP8 blocks."""
    heads_per_rank = {"attention": model.num_heads // tp, "KV": max(1, model.num_kv_heads // tp)}
    rows = [(f"{what} rows", heads * model.head_size) for what, heads in heads_per_rank.items()]
    for what, size in (*rows, *((name, width // tp) for name, width in model.widths + model.expert_widths)):
        if size % BLOCK[0]:
            problem = f"with FP8 blocks of {BLOCK[0]}, a rank's {size} of {what} are no whole blocks"
            remedy = "Lower it, use another model, or generation.precision=bf16"
            yield Violation("generation.tensor_parallel", tp, problem, remedy)

"""What an engine really runs, from the live configuration of its workers, never from what was asked for (vLLM 0.31).

vLLM settles its configuration in several steps: a flag may be echoed and then switched off, or stay on in a mode that
runs no passes. Sequence parallelism is a rewrite of the compiled graph, so it is on only where `pass_config.enable_sp`
has survived vLLM's checks, the tensor-parallel group has a second rank, and the graph is compiled as one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from refit.transfer.errors import TransportError

NOT_ASKED = "vLLM's pass_config.enable_sp is off"
ONE_RANK = "the tensor-parallel group has one rank"


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """One worker. `layers` are the decoder layers `[first, stop)` of its stage; `sequence_off`: why SP is off."""

    tensor_rank: int
    stage: int
    layers: tuple[int, int]
    sequence_off: str
    prompt_embeds: bool


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """What all workers of an engine agree on. `stages` are the layers `[first, stop)` of each, in order."""

    tensor: int
    pipeline: int
    stages: tuple[tuple[int, int], ...]
    sequence_parallel: bool
    sequence_off: str
    prompt_embeds: bool

    @classmethod
    def of(cls, workers: Sequence[WorkerFacts]) -> EngineDescription:
        """Raises TransportError when the workers of one engine differ in what must be equal."""
        for what in ("sequence_off", "prompt_embeds"):
            found = sorted({str(getattr(worker, what)) for worker in workers})
            if len(found) > 1:
                raise TransportError(
                    f"the workers of one engine differ in {what}: {found}; restart this engine"
                )
        stages = {worker.stage: worker.layers for worker in workers}
        first = workers[0]
        return cls(
            tensor=len({worker.tensor_rank for worker in workers}),
            pipeline=len(stages),
            stages=tuple(stages[stage] for stage in sorted(stages)),
            sequence_parallel=not first.sequence_off,
            sequence_off=first.sequence_off,
            prompt_embeds=first.prompt_embeds,
        )

    def message(self) -> dict[str, Any]:
        """Plain values, for records."""
        return asdict(self)

    def __str__(self) -> str:
        layers = " | ".join(f"layers {first} to {stop - 1}" for first, stop in self.stages)
        sequence = "on" if self.sequence_parallel else f"off ({self.sequence_off})"
        return f"TP{self.tensor} PP{self.pipeline}, {layers}, sequence parallel {sequence}"


def worker_facts(vllm_config: Any) -> WorkerFacts:
    """In a worker: its place and the switches, as they are after all of vLLM's checks."""
    from vllm.config import CompilationMode
    from vllm.distributed import get_pp_group, get_tp_group

    compilation, model = vllm_config.compilation_config, vllm_config.model_config
    first, stop = model.get_layers_start_end_indices(vllm_config.parallel_config)
    one_piece = compilation.use_inductor_graph_partition or not compilation.splitting_ops
    return WorkerFacts(
        get_tp_group().rank_in_group,
        get_pp_group().rank_in_group,
        (int(first), int(stop)),
        why_not_sequence_parallel(
            bool(compilation.pass_config.enable_sp),
            get_tp_group().world_size,
            "" if compilation.mode == CompilationMode.VLLM_COMPILE else str(compilation.mode),
            one_piece,
        ),
        bool(model.enable_prompt_embeds),
    )


def why_not_sequence_parallel(enabled: bool, tensor: int, other_mode: str, one_piece: bool) -> str:
    """ "" if the sequence-parallel pass runs. `other_mode` names the compilation mode if it is one without passes."""
    if not enabled:
        return NOT_ASKED
    if tensor == 1:
        return ONE_RANK
    if other_mode:
        return f"compilation mode {other_mode} runs no passes"
    return "" if one_piece else "the graph is compiled in pieces, which the pass cannot rewrite"


def engine_arguments(sequence_parallel: bool, min_tokens: int | None, eager: bool) -> dict[str, Any]:
    """vLLM's arguments for eager mode and the sequence-parallel pass.

    The pass is asked for wherever it is wanted: a platform without it switches it off by itself. Only where passes
    are run is the graph compiled for it, and the least number of tokens forced: elsewhere vLLM 0.31 would keep the flag
    on without the pass, and later stages would take the whole residual for a slice.
    """
    from vllm.platforms import current_platform

    if not sequence_parallel:
        return {"enforce_eager": eager}
    passes: dict[str, Any] = {"enable_sp": True}
    runs_passes = current_platform.is_cuda_alike()
    if runs_passes and min_tokens is not None:
        passes["sp_min_token_num"] = min_tokens
    return {
        "enforce_eager": eager and not runs_passes,
        "compilation_config": {"pass_config": passes},
    }


def stale_draft(vllm_config: Any) -> str:
    """What to know of an engine that speculates with a draft model: refits do not reach that. "" for all others."""
    speculative = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    if (
        draft is None or draft is speculative.target_model_config
    ):  # n-grams and suffixes name the target itself
        return ""
    return (
        f"this engine speculates by {speculative.method!r} with draft model {draft.model!r}, which no refit reaches: "
        f"answers stay right, since the refitted model checks every drafted token, but fewer drafts are taken the "
        f"further the policy moves; start it without a draft model, or with method 'ngram', to be rid of that"
    )

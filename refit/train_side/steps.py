"""Forward and backward passes over microbatches, by Megatron's own pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from refit.train_side import cpu_compat
from refit.train_side.build import BuiltModel
from refit.train_side.microbatches import Microbatch
from refit.train_side.options import TrainOptions


@dataclass(frozen=True, slots=True)
class Forward:
    """What a schedule does with each microbatch's logits, on the last stage.

    `on_logits(item, logits)` returns data when `forward_only`, else Megatron's (loss sum, number of tokens,
    report) of a per-token loss. `items` are the microbatches, each with what its loss needs.
    """

    items: tuple[Any, ...]
    on_logits: Callable[..., Any]
    forward_only: bool

    @classmethod
    def logprobs(cls, model: BuiltModel, microbatches: tuple[Microbatch, ...]) -> Forward:
        """Collects float32 [rows, S] log-probabilities of the targets."""
        return cls(tuple((m, None) for m in microbatches), partial(_collect, model.vocab_size), True)

    @classmethod
    def losses(
        cls,
        model: BuiltModel,
        microbatches: tuple[Microbatch, ...],
        reference: list[Tensor],
        options: TrainOptions,
    ) -> Forward:
        """Collects [3]: sums over response tokens of loss, KL to the reference, clipped; runs backward."""
        # Only the last stage has reference log-probabilities, and only it reads them.
        found = reference or [None] * len(microbatches)
        items = tuple(zip(microbatches, found, strict=True))
        return cls(items, partial(_loss, model.vocab_size, options), False)


def run_schedule(model: BuiltModel, forward: Forward) -> list[Tensor]:
    """Run all microbatches. Returns `on_logits`'s reports, one per microbatch; empty off the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    first: Microbatch = forward.items[0][0]
    chunks = model.chunks
    iterators = [iter(forward.items) for _ in chunks]
    with cpu_compat.cpu_megatron(), torch.set_grad_enabled(not forward.forward_only):
        return get_forward_backward_func()(
            forward_step_func=partial(_forward_step, forward.on_logits, _causal_mask(first)),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(forward.items),
            seq_length=first.length,
            micro_batch_size=first.num_rows,
            forward_only=forward.forward_only,
            collect_non_loss_data=forward.forward_only,
        )


def _causal_mask(microbatch: Microbatch) -> Tensor:
    """[1, 1, S, S], True where attention is forbidden. Padding is on the right: no real token can see it."""
    size = microbatch.length
    return torch.ones(1, 1, size, size, dtype=torch.bool, device=microbatch.tokens.device).triu(1)


def _forward_step(
    on_logits: Callable[..., Any], attention_mask: Tensor, items: Iterator[Any], chunk: Any
) -> tuple[Tensor, Callable[..., Any]]:
    item = next(items)
    tokens = item[0].tokens
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    logits = chunk(input_ids=tokens, position_ids=positions, attention_mask=attention_mask)
    return logits, partial(on_logits, item)


def _collect(vocab_size: int, item: Any, logits: Tensor, *, non_loss_data: bool) -> Tensor:
    from refit.train_side.losses import token_logprobs

    assert non_loss_data, "the schedule was asked for data, not for a loss"
    return token_logprobs(logits, item[0].targets, vocab_size)


def _loss(vocab_size: int, options: TrainOptions, item: Any, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from refit.train_side.losses import grpo_token_losses, token_logprobs

    microbatch, reference = item
    logprobs = token_logprobs(logits, microbatch.targets, vocab_size)
    per_token = grpo_token_losses(
        logprobs,
        microbatch.old_logprobs,
        reference,
        microbatch.advantages,
        options.clip_ratio,
        options.kl_coef,
    )
    loss, kl, clipped = ((part * microbatch.mask).sum() for part in per_token)
    num_tokens = microbatch.mask.sum().to(torch.int)
    return loss, num_tokens, torch.stack((loss.detach(), kl, clipped))

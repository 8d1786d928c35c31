"""How far the generators' distribution is from the trainers': the behavioural check of every refit.

For a token x drawn from the generator q, with the trainer p and r = p(x) / q(x), `(r - 1) - log r` is an unbiased,
never negative estimate of KL(q || p) ("k3" of Schulman 2020, "Approximating KL divergence"). With equal weights
only rounding is left: 1e-5 to 1e-3 in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GenerationKl:
    """Over all sampled tokens: mean and largest k3, mean and largest |log p - log q|, and their number."""

    mean: float
    token_max: float
    logprob_gap_mean: float
    logprob_gap_max: float
    num_tokens: int


def generation_kl(trainer: Sequence[Sequence[float]], generator: Sequence[Sequence[float]]) -> GenerationKl:
    """Compare log probabilities of the same sampled tokens, one row per sample.

    Raises ValueError if rows differ in length or nothing was sampled: a token without a partner must not be dropped.
    """
    gaps: list[float] = []
    if len(trainer) != len(generator):
        raise ValueError(f"{len(trainer)} trainer rows against {len(generator)} generator rows")
    for sample, (ours, theirs) in enumerate(zip(trainer, generator, strict=True)):
        if len(ours) != len(theirs):
            raise ValueError(
                f"sample {sample}: {len(ours)} trainer tokens against {len(theirs)} of the generator"
            )
        gaps += [p - q for p, q in zip(ours, theirs, strict=True)]
    if not gaps:
        raise ValueError("no token was sampled, so there is nothing to compare")
    estimates = [math.exp(min(gap, 50.0)) - 1.0 - gap for gap in gaps]
    sizes = [abs(gap) for gap in gaps]
    return GenerationKl(
        mean=math.fsum(estimates) / len(gaps),
        token_max=max(estimates),
        logprob_gap_mean=math.fsum(sizes) / len(gaps),
        logprob_gap_max=max(sizes),
        num_tokens=len(gaps),
    )

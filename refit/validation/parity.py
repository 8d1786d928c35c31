"""Per-token log-probabilities of an engine against those of an engine of one rank, and how much of a gap is noise.

The same weights in another layout add up in another order, so equal answers are not to be had. How large a difference
means nothing is measured on the engine of one rank itself: the same tokens again, in batches of other shapes. The shape
that matters most to RL is a single row: the longest answer of a batch is decoded alone at its end, token by token, and
kernels may multiply one row by another routine than many.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from refit.plan.sequence import SequenceCut

LOGPROB_LIMIT = {"fp32": 5e-5, "bf16": 5e-3}
"""For the weights of validation runs, with which no layout has come near it; beyond it weights are wrong, not rounding.
Other weights have other gaps: with those of `tests/gen_side/parity.py` TP2 is up to 1.0e-2 from one rank in bf16."""

CROWD = 16
"""Makes 2,240 tokens of `prompts_for(2, ...)`."""

type Prompts = Sequence[Sequence[int]]
type Scores = Sequence[Sequence[float]]
"""Per prompt, the log-probability of each token after the first."""


class Answer(Protocol):
    """See `refit.gen_side.requests.Sample`."""

    @property
    def tokens(self) -> tuple[int, ...]: ...
    @property
    def logprobs(self) -> tuple[float, ...]: ...


class Engine(Protocol):
    """An engine that can say how probable a prompt is to it, and go on with one; see `Generator`."""

    def score(self, prompts: Prompts) -> list[list[float]]: ...
    def generate(
        self, prompts: Prompts, num_samples: int, max_tokens: int, temperature: float, seed: int | None
    ) -> Sequence[Answer]: ...


@dataclass(frozen=True, slots=True)
class Noise:
    """How far an engine is from itself, at most over all tokens.

    `prefill`: prompts all in one batch against one by one, in pairs and in the other order. `crowded`: against a batch
    of CROWD times as many, of which each step takes what it has room for. `decode`: tokens that one request alone
    sampled, one a step, against the prefill of the same tokens.
    """

    prefill: float
    crowded: float
    decode: float

    def __str__(self) -> str:
        return f"prefill {self.prefill:.2e}, crowded {self.crowded:.2e}, decode {self.decode:.2e}"

    @property
    def largest(self) -> float:
        return max(self.prefill, self.crowded, self.decode)


@dataclass(frozen=True, slots=True)
class Gap:
    """The largest difference, and where it is: a token of a prompt, and the sequence-parallel rank that computes it."""

    value: float
    prompt: int
    token: int
    num_tokens: int
    rank: int

    def __str__(self) -> str:
        return (
            f"{self.value:.2e} at token {self.token} of prompt {self.prompt} "
            f"({self.num_tokens} tokens; rank {self.rank} of its slices)"
        )


@dataclass(frozen=True, slots=True)
class Parity:
    """What a comparison found. `noise` is how far one rank is from itself, `divides` and `rest` the gaps to it: over
    prompts whose length the tensor-parallel size divides, and over the others."""

    noise: Noise
    divides: Gap
    rest: Gap

    @property
    def gap(self) -> Gap:
        return max(self.divides, self.rest, key=lambda gap: gap.value)


def prompts_for(tensor: int, vocabulary: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """Random token ids of every length from 2 to 4 * tensor + 1, then three longer ones around a multiple of it."""
    draw = random.Random(seed)  # noqa: S311  not a secret
    lengths = [*range(2, 4 * tensor + 2), 16 * tensor - 1, 16 * tensor, 16 * tensor + 1]
    return tuple(tuple(draw.randrange(vocabulary) for _ in range(length)) for length in lengths)


def noise_floor(engine: Engine, prompts: Prompts) -> tuple[list[list[float]], Noise]:
    """(scores of all prompts in one batch, how far the engine is from itself in batches of other shapes)."""
    together = engine.score(prompts)
    alone = [engine.score([prompt])[0] for prompt in prompts]
    pairs = [each for at in range(0, len(prompts), 2) for each in engine.score(prompts[at : at + 2])]
    backwards = engine.score(prompts[::-1])[::-1]
    prefill = max(largest_delta(together, again) for again in (alone, pairs, backwards))
    crowded = largest_delta(together * CROWD, engine.score([*prompts] * CROWD))
    return together, Noise(prefill, crowded, largest_delta(*decoded(engine, prompts)))


def decoded(engine: Engine, prompts: Prompts) -> tuple[list[list[float]], list[list[float]]]:
    """(scores by prefill, by decode) of answers to the first token of each prompt, one request at a time.

    At temperature 1, each as long as the rest of its prompt or to its end: as many tokens at the same places as the
    prompts score, so that the largest of their differences is one of as many.
    """
    answers = [
        engine.generate([prompt[:1]], 1, len(prompt) - 1, 1.0, seed)[0] for seed, prompt in enumerate(prompts)
    ]
    whole = [(prompt[0], *answer.tokens) for prompt, answer in zip(prompts, answers, strict=True)]
    return engine.score(whole), [list(answer.logprobs) for answer in answers]


def compare(wanted: Scores, found: Scores, noise: Noise, tensor: int) -> Parity:
    """An engine's scores against those of one rank. Some prompts' lengths must be multiples of `tensor`, some not."""
    lengths = [len(scores) + 1 for scores in wanted]
    chosen = {
        whole: [at for at, length in enumerate(lengths) if (length % tensor == 0) == whole]
        for whole in (True, False)
    }
    if tensor == 1:
        chosen[False] = chosen[True]
    return Parity(noise, *(_gap(wanted, found, chosen[whole], tensor) for whole in (True, False)))


def largest_delta(wanted: Scores, found: Scores) -> float:
    """Infinite where one is not a number. Raises ValueError when they are of different shapes."""
    deltas = [
        abs(a - b)
        for mine, theirs in zip(wanted, found, strict=True)
        for a, b in zip(mine, theirs, strict=True)
    ]
    return max(deltas) if all(map(math.isfinite, deltas)) else math.inf


def _gap(wanted: Scores, found: Scores, chosen: Sequence[int], tensor: int) -> Gap:
    if len(wanted) != len(found) or not chosen:
        raise ValueError(f"{len(found)} scores for {len(wanted)} prompts, {len(chosen)} of them to compare")
    places = [
        (largest_delta([[a]], [[b]]), prompt, token + 1)
        for prompt in chosen
        for token, (a, b) in enumerate(zip(wanted[prompt], found[prompt], strict=True))
    ]
    value, prompt, token = max(places)
    cut = SequenceCut(len(wanted[prompt]) + 1, tensor)
    # A token's own probability comes out of the row before it.
    return Gap(value, prompt, token, cut.num_tokens, cut.rank_of(token - 1))

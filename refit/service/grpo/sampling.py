"""Rollouts: problems shared out over the replicas that serve, one step at a time or some steps ahead.

Ahead: each replica answers in the background, in order of the steps, while trainers train and refits run. What a lost
replica owes is asked of the others. Every token says which version sampled it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refit.service.actors import RolloutRow
from refit.service.config import JobConfig
from refit.service.coordinator import Coordinator
from refit.service.grpo.tasks import Codec, Problem, Task
from refit.service.waiting import gather
from refit.transfer.errors import Failure, RefitFailed

SEED_STRIDE = 1_000_003
MAX_TRIES, MAX_REPLICAS = 64, 1024  # so that no two requests of a run share a seed


@dataclass(frozen=True, slots=True)
class Rollout:
    """All samples of a step in prompt order, `samples_per_prompt` neighbours answer one problem.

    `spans` says of each sample which version sampled how many of its tokens, in order.
    """

    problems: tuple[Problem, ...]
    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def weight_version(self) -> int:
        """The oldest version that sampled a token of it."""
        return min(version for spans in self.spans for version, _ in spans)

    @property
    def num_mixed(self) -> int:
        """Samples whose tokens are of more than one version."""
        return sum(len(spans) > 1 for spans in self.spans)


@dataclass(frozen=True, slots=True)
class _Underway:
    """What was asked of whom for one step: numbers of prompts by name of replica."""

    problems: tuple[Problem, ...]
    prompts: tuple[tuple[int, ...], ...]
    shares: Mapping[str, Sequence[int]]
    actors: Mapping[str, Any]


@dataclass(slots=True)
class Sampler:
    """Asks the replicas of a coordinator. `submit` runs ahead of `sample`, which takes the steps in order."""

    config: JobConfig
    coordinator: Coordinator
    task: Task
    codec: Codec
    underway: dict[int, _Underway] = field(default_factory=dict)
    num_submitted: int = 0

    def submit(self, last_step: int) -> None:
        """Begin the rollouts of all steps up to this one that have not begun."""
        while self.num_submitted < last_step:
            self.num_submitted += 1
            self.underway[self.num_submitted] = self._begin(self.num_submitted)

    def sample(self, step: int) -> Rollout:
        """All answers of a step. Raises RefitFailed when no replica is left, or a living one failed."""
        self.submit(step)
        begun = self.underway.pop(step)
        serving = self.coordinator.serving()  # a replacement bears the name of the one that was asked
        asked: dict[str, Any] = {
            who: actor for who, actor in begun.actors.items() if serving.get(who) is actor
        }
        takes: dict[str, Any] = {who: actor.take.remote(step) for who, actor in asked.items()}
        rows = self._rows(takes, begun.shares)
        tries = 0
        while missing := sorted(set(range(len(begun.prompts))) - {row[0] for row in rows}):
            tries += 1
            shares, actors = self._shares(missing)
            calls = {
                who: actors[who].generate.remote(*self._question(begun.prompts, shares, who, step, tries))
                for who in shares
            }
            rows += self._rows(calls, shares)
        rows.sort(key=lambda row: row[0])
        return _rollout(begun.problems, begun.prompts, rows, self.config.grpo.samples_per_prompt)

    def _begin(self, step: int) -> _Underway:
        problems = self.task.problems(step - 1, self.config.grpo.prompts_per_step)
        prompts = tuple(self.codec.encode(problem.question) for problem in problems)
        shares, actors = self._shares(range(len(prompts)))
        for who in shares:
            actors[who].submit.remote(step, *self._question(prompts, shares, who, step, 0))
        return _Underway(problems, prompts, shares, actors)

    def _shares(self, numbers: Sequence[int]) -> tuple[dict[str, Sequence[int]], dict[str, Any]]:
        """The prompts of these numbers, in equal runs over the replicas that serve, and these replicas."""
        serving = self.coordinator.serving()
        if not serving:
            reason = f"no generator serves: {self.coordinator.states()}"
            raise RefitFailed(Failure("generate", "coordinator", reason))
        runs = split_evenly(len(numbers), len(serving))
        shares = {
            who: numbers[first:stop] for who, (first, stop) in zip(serving, runs, strict=True) if first < stop
        }
        return shares, {who: serving[who] for who in shares}

    def _question(
        self,
        prompts: Sequence[tuple[int, ...]],
        shares: Mapping[str, Sequence[int]],
        who: str,
        step: int,
        tries: int,
    ) -> tuple[Any, ...]:
        """The arguments of `generate` for one replica's share.

        Without a seed where answers meet refits: when one does is a matter of time, so no run repeats another.
        """
        generation = self.config.generation
        seed = (self.config.policy.seed * SEED_STRIDE + step * MAX_TRIES + tries) * MAX_REPLICAS
        return (
            [prompts[number] for number in shares[who]],
            self.config.grpo.samples_per_prompt,
            generation.max_new_tokens,
            generation.temperature,
            None if self.config.grpo.max_staleness else seed + list(shares).index(who),
        )

    def _rows(self, calls: Mapping[str, Any], shares: Mapping[str, Sequence[int]]) -> list[RolloutRow]:
        """What came back, by number of prompt; the share of a replica that is lost is missing."""
        timeout_s = self.config.step_timeout_s
        answers = gather(calls, "generate", timeout_s, settle_s=timeout_s)
        failed = answers.cause is not None or bool(answers.silent)
        if failed and not self.coordinator.leave_out(answers, "generate"):
            raise RefitFailed(answers.cause or Failure("generate", "generators", "no answer"))
        return [
            (shares[who][prompt], tokens, logprobs, spans)
            for who, found in answers.results.items()
            for prompt, tokens, logprobs, spans in found
        ]


def split_evenly(num_items: int, num_parts: int) -> tuple[tuple[int, int], ...]:
    """Half-open runs that cut `num_items` into `num_parts`; sizes differ by at most 1, larger ones first."""
    size, extra = divmod(num_items, num_parts)
    starts = [part * size + min(part, extra) for part in range(num_parts + 1)]
    return tuple(itertools.pairwise(starts))


def _rollout(
    problems: Sequence[Problem],
    prompts: Sequence[tuple[int, ...]],
    rows: Sequence[RolloutRow],
    samples_per_prompt: int,
) -> Rollout:
    """Check that every prompt has all its answers, and every token a version. Raises RefitFailed if not."""
    answered = tuple(prompt for prompt, _, _, _ in rows)
    expected = tuple(prompt for prompt in range(len(prompts)) for _ in range(samples_per_prompt))
    if answered != expected:
        reason = f"{len(rows)} answers for {len(prompts)} prompts, {samples_per_prompt} each were asked for, in order"
        raise RefitFailed(Failure("generate", "generators", reason))
    for prompt, tokens, _, spans in rows:
        if sum(count for _, count in spans) != len(tokens):
            reason = f"an answer to prompt {prompt} has {len(tokens)} tokens, but versions {spans}"
            raise RefitFailed(Failure("generate", "generators", reason))
    return Rollout(
        problems=tuple(problems),
        prompts=tuple(prompts[prompt] for prompt in answered),
        responses=tuple(tokens for _, tokens, _, _ in rows),
        logprobs=tuple(logprobs for _, _, logprobs, _ in rows),
        spans=tuple(spans for _, _, _, spans in rows),
    )

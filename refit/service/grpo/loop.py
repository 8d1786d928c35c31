"""The GRPO loop: rollout, reward, logprobs, optimizer step, refit, record.

Step s samples with version s - 1 and ends with the refit to version s. Generation KL and reward of a step thus judge
the refit before it; one more rollout after the last step judges the last refit.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from refit.service.config import JobConfig
from refit.service.coordinator import Coordinator
from refit.service.grpo.advantages import group_advantages
from refit.service.grpo.generation_kl import GenerationKl, generation_kl
from refit.service.grpo.reward import grade
from refit.service.grpo.tasks import Codec, Problem, Task
from refit.service.record import RefitStepRecord, RunRecord, StepRecord, TrainRecord
from refit.service.waiting import collect
from refit.train_side.batch import TrainBatch
from refit.transfer.errors import Failure, RefitFailed

SEED_STRIDE = 1_000_003
MAX_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Rollout:
    """All samples of a step in prompt order, `samples_per_prompt` neighbours answer one problem."""

    problems: tuple[Problem, ...]
    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
    weight_version: int


@dataclass(frozen=True, slots=True)
class Judged:
    """A rollout with its rewards, and the trainers' logprobs of the same tokens."""

    rollout: Rollout
    rewards: tuple[float, ...]
    num_solved: int
    trainer_logprobs: tuple[tuple[float, ...], ...]
    kl: GenerationKl
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class GrpoLoop:
    """The parts of a running job. `run` is the job."""

    config: JobConfig
    trainers: Mapping[str, Any]
    generators: Mapping[str, Any]
    coordinator: Coordinator
    task: Task
    codec: Codec
    record: RunRecord

    def run(self, on_step: Callable[[StepRecord], None]) -> tuple[StepRecord, ...]:
        """All steps of the job and the judging rollout after them. Raises RefitFailed or TransportError."""
        for step in range(1, self.config.grpo.steps + 1):
            record = self.step(step)
            self.record.add(record)
            on_step(record)
        closing = _step_record(
            self.config.grpo.steps + 1, self.judge(self.config.grpo.steps + 1), {}, None, None
        )
        self.record.add(closing)
        on_step(closing)
        return tuple(self.record.steps)

    def step(self, step: int) -> StepRecord:
        """One step; ends with version `step` serving on every engine."""
        judged = self.judge(step)
        started_s = time.monotonic()
        train = self.train(judged)
        trained_s = time.monotonic()
        refit = self.refit(step)
        seconds = {"train": trained_s - started_s, "refit": time.monotonic() - trained_s}
        return _step_record(step, judged, seconds, train, refit)

    def judge(self, step: int) -> Judged:
        """Sample, grade, and compare the generators' logprobs with the trainers'."""
        started_s = time.monotonic()
        rollout = self.sample(step)
        sampled_s = time.monotonic()
        rewards, num_solved = self.grade(rollout)
        batch = TrainBatch(rollout.prompts, rollout.responses, rollout.logprobs, (0.0,) * len(rewards))
        trainer_logprobs = self._all_trainers("logprobs", batch)["train rank 0"]
        seconds = {"rollout": sampled_s - started_s, "logprobs": time.monotonic() - sampled_s}
        kl = generation_kl(trainer_logprobs, rollout.logprobs)
        return Judged(
            rollout, rewards, num_solved, tuple(tuple(row) for row in trainer_logprobs), kl, seconds
        )

    def sample(self, step: int) -> Rollout:
        """Answers to the step's problems, shared out over the replicas in equal runs."""
        grpo, generation = self.config.grpo, self.config.generation
        problems = self.task.problems(step - 1, grpo.prompts_per_step)
        prompts = tuple(self.codec.encode(problem.question) for problem in problems)
        shares = split_evenly(len(prompts), len(self.generators))
        pending = {
            who: actor.generate.remote(
                prompts[first:stop],
                grpo.samples_per_prompt,
                generation.max_new_tokens,
                generation.temperature,
                self.config.policy.seed * SEED_STRIDE + step * len(self.generators) + replica,
            )
            for replica, ((who, actor), (first, stop)) in enumerate(
                zip(self.generators.items(), shares, strict=True)
            )
        }
        rows_of = collect(pending, "generate", self.config.refit.timeout_s)
        rows = [
            (first + prompt, tokens, logprobs, version)
            for (first, _), answers in zip(shares, rows_of.values(), strict=True)
            for prompt, tokens, logprobs, version in answers
        ]
        return _rollout(problems, prompts, rows, grpo.samples_per_prompt)

    def grade(self, rollout: Rollout) -> tuple[tuple[float, ...], int]:
        """The reward of each sample, and how many the task's own checker accepts."""
        rewards, num_solved = [], 0
        size = self.config.grpo.samples_per_prompt
        for index, tokens in enumerate(rollout.responses):
            problem = rollout.problems[index // size]
            ended = tokens[-1] == self.codec.end_token
            text = self.codec.decode(tokens[:-1] if ended else tokens)
            rewards.append(grade(text, ended, problem.answer, self.task.kind.grading))
            num_solved += ended and self.task.verify(text, problem)
        return tuple(rewards), num_solved

    def train(self, judged: Judged) -> TrainRecord:
        """One optimizer step on the rollout."""
        rollout, grpo = judged.rollout, self.config.grpo
        advantages = group_advantages(judged.rewards, grpo.samples_per_prompt, scale=grpo.scale_advantages)
        batch = TrainBatch(rollout.prompts, rollout.responses, judged.trainer_logprobs, advantages)
        return TrainRecord(**self._all_trainers("train_step", batch)["train rank 0"])

    def refit(self, version: int) -> RefitStepRecord:
        """Bring `version` to every engine, and audit it when it is due. Raises RefitFailed if it is not serving."""
        outcome = self.coordinator.refit(version)
        if not outcome.committed:
            reason = (
                f"version {version} was not committed, version {version - 1} still serves: {outcome.reason}"
            )
            raise RefitFailed(Failure("refit", "coordinator", reason))
        every = self.config.refit.verify_every
        verified = self._verify(version) if every and version % every == 0 else None
        return RefitStepRecord(
            version,
            outcome.total_s,
            dict(outcome.seconds),
            outcome.bulk_bytes,
            outcome.misc_bytes,
            outcome.bulk_share,
            verified,
        )

    def _verify(self, version: int) -> bool:
        report = self.coordinator.verify()
        if not report.ok:
            wrong = [str(mismatch) for mismatch in report.mismatches[:MAX_SHOWN]]
            wrong += [
                f"{param} on gen rank {rank} has changed" for rank, param in report.changed_params[:MAX_SHOWN]
            ]
            num_wrong = len(report.mismatches) + len(report.changed_params)
            reason = f"version {version} on the engines is not the trainers' ({num_wrong} found): {'; '.join(wrong)}"
            raise RefitFailed(Failure("verify", "coordinator", reason))
        return True

    def _all_trainers(self, method: str, batch: TrainBatch) -> dict[str, Any]:
        shared = ray.put(batch)
        pending = {who: getattr(actor, method).remote(shared) for who, actor in self.trainers.items()}
        return collect(pending, method, self.config.refit.timeout_s)


def split_evenly(num_items: int, num_parts: int) -> tuple[tuple[int, int], ...]:
    """Half-open runs that cut `num_items` into `num_parts`; sizes differ by at most 1, larger ones first."""
    size, extra = divmod(num_items, num_parts)
    starts = [part * size + min(part, extra) for part in range(num_parts + 1)]
    return tuple(itertools.pairwise(starts))


def _rollout(
    problems: Sequence[Problem],
    prompts: Sequence[tuple[int, ...]],
    rows: Sequence[tuple[int, tuple[int, ...], tuple[float, ...], int]],
    samples_per_prompt: int,
) -> Rollout:
    """Check that every prompt has all its answers, all from one version. Raises RefitFailed if not."""
    answered = tuple(prompt for prompt, _, _, _ in rows)
    expected = tuple(prompt for prompt in range(len(prompts)) for _ in range(samples_per_prompt))
    if answered != expected:
        reason = f"{len(rows)} answers for {len(prompts)} prompts, {samples_per_prompt} each were asked for, in order"
        raise RefitFailed(Failure("generate", "generators", reason))
    versions = sorted({version for _, _, _, version in rows})
    if len(versions) != 1:
        raise RefitFailed(
            Failure("generate", "generators", f"one rollout was sampled by versions {versions}")
        )
    return Rollout(
        problems=tuple(problems),
        prompts=tuple(prompts[prompt] for prompt in answered),
        responses=tuple(tokens for _, tokens, _, _ in rows),
        logprobs=tuple(logprobs for _, _, logprobs, _ in rows),
        weight_version=versions[0],
    )


def _step_record(
    step: int,
    judged: Judged,
    seconds: Mapping[str, float],
    train: TrainRecord | None,
    refit: RefitStepRecord | None,
) -> StepRecord:
    return StepRecord(
        step=step,
        weight_version=judged.rollout.weight_version,
        reward=statistics.fmean(judged.rewards),
        reward_stdev=statistics.pstdev(judged.rewards),
        solved_share=judged.num_solved / len(judged.rewards),
        response_tokens=judged.kl.num_tokens,
        gen_kl=judged.kl.mean,
        gen_kl_token_max=judged.kl.token_max,
        gen_logprob_gap_mean=judged.kl.logprob_gap_mean,
        gen_logprob_gap_max=judged.kl.logprob_gap_max,
        seconds={**judged.seconds, **seconds},
        train=train,
        refit=refit,
    )

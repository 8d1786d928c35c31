"""The GRPO loop: rollout, reward, logprobs, optimizer step, refit, record.

Step s samples with version s - 1 and ends with the refit to version s. Generation KL and reward of a step thus judge
the refit before it; one more rollout after the last step judges the last refit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from refit.service.checkpoint import save_checkpoint
from refit.service.config import JobConfig
from refit.service.coordinator import Coordinator
from refit.service.grpo.advantages import group_advantages
from refit.service.grpo.generation_kl import GenerationKl, generation_kl
from refit.service.grpo.reward import grade
from refit.service.grpo.sampling import Rollout, Sampler
from refit.service.grpo.tasks import Codec, Task
from refit.service.record import RefitStepRecord, RunRecord, StepRecord, TrainRecord
from refit.service.refit_record import PlanRecord, RefitRecord
from refit.service.waiting import collect
from refit.train_side.batch import TrainBatch
from refit.transfer.errors import Failure, RefitFailed, TransportError

MAX_SHOWN = 5
SAVE_TIMEOUT_S = 1800.0  # a large model on a slow disk; a trainer that dies ends the wait at once
STEP_BOUND = "grpo.timeout_s bounds this wait, refit.timeout_s where it is null"


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
    coordinator: Coordinator
    task: Task
    codec: Codec
    sampler: Sampler
    record: RunRecord
    say: Callable[[str], None]

    def run(self, on_step: Callable[[StepRecord], None]) -> tuple[StepRecord, ...]:
        """All steps of the job and the judging rollout after them. Raises RefitFailed or TransportError."""
        for step in range(1, self.config.grpo.steps + 1):
            self.sampler.submit(min(step + self.config.grpo.max_staleness, self.config.grpo.steps))
            record = self.step(step)
            self._keep(record)
            on_step(record)
            if self.config.grpo.checkpoint_every and step % self.config.grpo.checkpoint_every == 0:
                self.checkpoint(step)
        closing = _step_record(
            self.config.grpo.steps + 1, self.judge(self.config.grpo.steps + 1), {}, None, None
        )
        self._keep(closing)
        on_step(closing)
        return tuple(self.record.steps)

    def checkpoint(self, version: int) -> None:
        """Save the policy. A full disk is said and costs the checkpoint, not the run; a lost trainer shows next."""
        try:
            limit_s = max(SAVE_TIMEOUT_S, self.config.step_timeout_s)
            save_checkpoint(self.trainers, self.record.run_dir, version, limit_s)
        except (OSError, RefitFailed, TransportError) as error:
            self.say(f"the checkpoint of version {version} could not be written: {error}")

    def _keep(self, record: StepRecord) -> None:
        """Write a step down. A full disk is said and costs the record, not the run."""
        try:
            self.record.add(record)
        except OSError as error:
            self.say(f"step {record.step} could not be written to {self.record.run_dir}: {error}")

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
        """Answers to the step's problems, from the rollout under way if there is one.

        Raises RefitFailed if a token is older than `grpo.max_staleness` allows.
        """
        rollout = self.sampler.sample(step)
        staleness = step - 1 - rollout.weight_version
        if staleness > self.config.grpo.max_staleness:
            reason = f"step {step} got tokens of version {rollout.weight_version}, {staleness} behind"
            raise RefitFailed(Failure("generate", "generators", reason))
        return rollout

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
        """One optimizer step on the rollout. Ratios are to the policy that sampled: the trainers' own logprobs while it
        is the current one, the generators' where it may be older.
        """
        rollout, grpo = judged.rollout, self.config.grpo
        advantages = group_advantages(judged.rewards, grpo.samples_per_prompt, scale=grpo.scale_advantages)
        sampled_by = rollout.logprobs if grpo.max_staleness else judged.trainer_logprobs
        batch = TrainBatch(rollout.prompts, rollout.responses, sampled_by, advantages)
        return TrainRecord(**self._all_trainers("train_step", batch)["train rank 0"])

    def refit(self, version: int) -> RefitStepRecord:
        """Bring `version` to every engine, and audit it when it is due. Raises RefitFailed if it is not serving."""
        outcome = self._recorded(version)
        if not outcome.committed:
            reason = (
                f"version {version} was not committed, version {version - 1} still serves: {outcome.reason}"
            )
            raise RefitFailed(Failure("refit", "coordinator", reason))
        every = self.config.refit.verify_every
        verified = self._verify(version) if every and version % every == 0 else None
        return RefitStepRecord.of(outcome, verified)

    def _recorded(self, version: int) -> RefitRecord:
        """The coordinator's refit, in the files and metrics of the run also when it fails."""
        started_s, plan = time.monotonic(), self.coordinator.plan_record
        try:
            outcome = self.coordinator.refit(version)
        except (RefitFailed, TransportError) as error:
            lost = RefitRecord.failed(plan, version, str(error), time.monotonic() - started_s)
            self._keep_refit(lost, plan)
            raise
        self._keep_refit(outcome, self.coordinator.plan_record)
        return outcome

    def _keep_refit(self, refit: RefitRecord, plan: PlanRecord) -> None:
        try:
            self.record.add_refit(refit, plan)
        except OSError as error:
            self.say(f"the refit to version {refit.version} could not be written down: {error}")

    def _verify(self, version: int) -> bool:
        report = self.coordinator.verify()
        if not report.ok:
            shown, num_wrong = "; ".join(report.findings[:MAX_SHOWN]), len(report.findings)
            reason = f"version {version} on the engines is not the trainers' ({num_wrong} found): {shown}"
            raise RefitFailed(Failure("verify", "coordinator", reason))
        return True

    def _all_trainers(self, method: str, batch: TrainBatch) -> dict[str, Any]:
        shared = ray.put(batch)
        pending = {who: getattr(actor, method).remote(shared) for who, actor in self.trainers.items()}
        return collect(pending, method, self.config.step_timeout_s, bound=STEP_BOUND)


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
        staleness=step - 1 - judged.rollout.weight_version,
        mixed_samples=judged.rollout.num_mixed,
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

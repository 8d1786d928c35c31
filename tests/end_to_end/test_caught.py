"""A generator that does not hold the trainers' weights is told apart, by behaviour and by bytes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import pytest

from refit.plan import Region
from refit.service.grpo.generation_kl import generation_kl
from refit.service.grpo.reward import grade
from refit.service.grpo.tasks import Problem, Task, open_codec
from refit.train_side.batch import TrainBatch
from refit.train_side.tiny_models import TINY_MODELS
from refit.transfer.errors import RefitFailed
from tests.end_to_end.jobs import Job, JobPool

NUM_PROBLEMS, NUM_SAMPLES = 16, 4
LEARNING_STEPS = 12

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.megatron, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def job(jobs: JobPool) -> Job:
    return jobs.get("default")


@dataclass(frozen=True)
class Lesson:
    """One problem with its right answer, asked again and again: quick to learn, and easy to see whether it was."""

    problem: Problem
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    job: Job

    def batch(self) -> TrainBatch:
        rows = NUM_PROBLEMS
        unscored = TrainBatch(
            (self.prompt,) * rows, (self.answer,) * rows, ((0.0,) * len(self.answer),) * rows, (1.0,) * rows
        )
        logprobs = tuple(tuple(row) for row in self.job.logprobs(unscored))
        return TrainBatch(unscored.prompts, unscored.responses, logprobs, unscored.advantages)

    def judge(self) -> tuple[float, float]:
        """(mean reward, generation KL) of fresh samples."""
        rows = self.job.sample([self.prompt] * NUM_PROBLEMS, NUM_SAMPLES, seed=7)
        rewards = []
        for _, tokens, _, _ in rows:
            ended = tokens[-1] == self.answer[-1]
            text = bytes(t for t in (tokens[:-1] if ended else tokens) if t < 256).decode("latin-1")
            rewards.append(grade(text, ended, self.problem.answer, "integer"))
        responses = tuple(tokens for _, tokens, _, _ in rows)
        sampled = tuple(logprobs for _, _, logprobs, _ in rows)
        batch = TrainBatch((self.prompt,) * len(rows), responses, sampled, (0.0,) * len(rows))
        return statistics.fmean(rewards), generation_kl(self.job.logprobs(batch), sampled).mean


@pytest.fixture(scope="module")
def lesson(job: Job) -> Lesson:
    model = job.config.policy.model
    codec = open_codec(f"{job.config.run_dir}/model", TINY_MODELS[model]({}).to_dict())
    problem = Task.open(job.config.grpo.task, 0).problems(0, 1)[0]
    answer = (*problem.answer.encode(), codec.end_token)
    return Lesson(problem, codec.encode(problem.question), answer, job)


def test_a_refit_that_did_nothing_shows_in_generation_kl_and_reward(job: Job, lesson: Lesson) -> None:
    with job.path("p2p") as coordinator:
        job.refit(coordinator)
        before_reward, before_kl = lesson.judge()
        for _ in range(LEARNING_STEPS):
            job.train(lesson.batch())
        # The refit is left out here: the engine still serves the version before.
        stale_reward, stale_kl = lesson.judge()
        assert not coordinator.verify().ok
        job.refit(coordinator)
        fresh_reward, fresh_kl = lesson.judge()
        assert coordinator.verify().ok
    assert before_kl <= 5e-3 and fresh_kl <= 5e-3, (before_kl, fresh_kl)
    assert stale_kl > 20 * max(before_kl, fresh_kl) and stale_kl > 5e-2, (before_kl, stale_kl, fresh_kl)
    assert stale_reward == before_reward, "the stale engine answers as before, sample for sample"
    assert fresh_reward > before_reward + 0.2, (before_reward, stale_reward, fresh_reward)


@pytest.mark.parametrize(
    ("param", "tensors"),
    [
        ("model.layers.1.mlp.gate_up_proj.weight", ("gate_proj", "up_proj")),
        ("model.layers.0.self_attn.qkv_proj.weight", ("q_proj", "k_proj", "v_proj")),
        ("model.norm.weight", ("model.norm.weight",)),
        ("lm_head.weight", ("lm_head.weight",)),
    ],
)
def test_one_flipped_element_of_a_live_shard_is_found_and_its_tensor_named(
    job: Job, param: str, tensors: tuple[str, ...]
) -> None:
    with job.path("p2p") as coordinator:
        assert job.refit(coordinator).committed
        assert coordinator.verify().ok
        assert job.flip_element(param, 5) >= 1
        report = coordinator.verify()
    assert not report.ok
    named = {mismatch.tensor for mismatch in report.mismatches}
    assert named, report.changed_params
    assert all(any(part in name for part in tensors) for name in named), named
    assert param in {name for _, name in report.changed_params}


def test_a_trainer_that_fails_amid_an_export_leaves_all_of_them_in_step(
    job: Job, lesson: Lesson, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("no folder")
    name = "model.layers.0.mlp.up_proj.weight"
    with job.path("p2p") as coordinator:
        spec = coordinator.plan.train.specs[name]
        box = (name, "float7", Region.whole(spec.shape))
        with pytest.raises(RefitFailed, match="float7"):
            job.all_trainers("weight_digests", [box], {name: spec})
        assert job.refit(coordinator).committed, "a question is no part of a refit"
        with pytest.raises(RefitFailed, match="File exists"):
            job.all_trainers("save", str(taken))
    with job.path("p2p") as coordinator:
        assert job.refit(coordinator).committed and coordinator.verify().ok
    assert len(job.logprobs(lesson.batch())) == NUM_PROBLEMS

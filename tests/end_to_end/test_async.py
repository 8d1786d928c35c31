"""Asynchronous GRPO: rollouts go on amid refits, within a bound, and each token names the version that sampled it."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from refit.service.coordinator import Coordinator
from refit.service.waiting import collect
from refit.train_side.batch import TrainBatch
from tests.end_to_end.jobs import CALL_S, Job, open_job
from tests.end_to_end.test_main_job import run_job

pytestmark = [
    pytest.mark.ray,
    pytest.mark.vllm,
    pytest.mark.megatron,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]

PROMPTS = tuple(tuple(range(40 + k, 44 + k)) for k in range(8))
NUM_TOKENS = 100
AMID_S = 0.3  # from the first token to the refit; 100 tokens take longer
TRIES = 6
STEPS = 6
FEW_AND_LONG = (
    "grpo.prompts_per_step=1",
    "grpo.samples_per_prompt=2",
    "generation.max_model_len=512",
    "generation.max_new_tokens=400",
)
"""A step decodes its tokens one after the other and trains on all at once, so a rollout outlasts the training and the
refit beside it by the more, the fewer and longer its answers are: with these 1.5 to 15 times, on two cores with up to
58 processes that want them."""


def test_rollouts_of_a_job_go_on_amid_its_refits_within_the_staleness_that_was_asked_for(
    tmp_path: Path,
) -> None:
    overrides = [
        "+policy.nccl_xfer_refit=true",
        f"grpo.steps={STEPS}",
        "grpo.max_staleness=1",
        "refit.pause=keep",
        "refit.timeout_s=400",  # of rollouts too, which took up to 138 s there
        *FEW_AND_LONG,
        "refit.verify_every=3",
    ]
    summary = run_job(overrides, {}, tmp_path, timeout_s=1700.0)
    assert summary["steps"] == summary["weight_version"] == STEPS and summary["audits"] == 2
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    print([(s["step"], s["weight_version"], s["staleness"], s["mixed_samples"]) for s in steps])
    beside = beside_refits(steps)
    print(beside)
    assert all(
        0 <= s["staleness"] <= 1 and s["weight_version"] == s["step"] - 1 - s["staleness"] for s in steps
    )
    assert max(step["staleness"] for step in steps) == 1, "no rollout ran ahead"
    assert sum(step["mixed_samples"] for step in steps) > 0, f"no answer has tokens of two versions: {beside}"
    assert steps[-1]["gen_kl"] <= 5e-3, "the last rollout is of the last version alone"


def beside_refits(steps: list[dict[str, Any]]) -> str:
    """Words on what a refit amid a rollout takes: that the rollout outlasts the training and the refit beside it."""
    found = [f"the first rollout took {steps[0]['seconds']['rollout']:.1f} s by itself"]
    for step, after in itertools.pairwise(steps[:-1]):
        beside = {name: round(value, 1) for name, value in step["seconds"].items() if name != "rollout"}
        left_s, num_tokens = after["seconds"]["rollout"], after["response_tokens"]
        found.append(f"the next one ({num_tokens} tokens) went on for {left_s:.1f} s after {beside}")
    return "; ".join(found)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory):
    overrides = ("refit.pause=keep", f"generation.max_new_tokens={NUM_TOKENS}")
    with open_job("default", tmp_path_factory.mktemp("async"), overrides) as opened:
        yield opened


def test_a_token_is_as_likely_as_the_version_on_its_stamp_makes_it_and_not_the_other(job: Job) -> None:
    """Trainer and engine differ in bf16; by how much, answers that met no refit say, of each of the two versions."""
    with job.path("p2p") as coordinator:
        rows, old_version = answers_amid_a_refit(job, coordinator)
        noise = [gap_of_undisturbed_answers(job)]
        new = job.logprobs(batch_of(rows))
        job.scale_weights(0.5)  # back to the old version, bit for bit
        assert job.refit(coordinator).committed
        noise.append(gap_of_undisturbed_answers(job))
    by_version = {old_version: job.logprobs(batch_of(rows)), old_version + 1: new}
    right, wrong = [], []
    for number, (_, tokens, sampled, spans) in enumerate(rows):
        stamps = [version for version, count in spans for _ in range(count)]
        assert len(stamps) == len(tokens) and stamps == sorted(stamps)
        for place, version in enumerate(stamps):
            other = 2 * old_version + 1 - version
            right.append(abs(sampled[place] - by_version[version][number][place]))
            wrong.append(abs(sampled[place] - by_version[other][number][place]))
    gap, other_gap = statistics.fmean(right), statistics.fmean(wrong)
    print(
        {"tokens": len(right), "gap": gap, "of undisturbed answers": noise, "to the other version": other_gap}
    )
    assert gap < 2 * max(noise)
    assert other_gap > 5 * max(noise)


def gap_of_undisturbed_answers(job: Job) -> float:
    """Mean difference, in nats, of the log-probabilities that engine and trainers give to the same sampled tokens."""
    actor = job.cluster.generators[0]
    call = actor.generate.remote(PROMPTS, 1, NUM_TOKENS, 1.0, None)
    rows = collect({"generator 0": call}, "generate", CALL_S)["generator 0"]
    trained = job.logprobs(batch_of(rows))
    return statistics.fmean(
        abs(sampled - trained[number][place])
        for number, row in enumerate(rows)
        for place, sampled in enumerate(row[2])
    )


def batch_of(rows: list[Any]) -> TrainBatch:
    return TrainBatch(
        tuple(PROMPTS[row[0]] for row in rows),
        tuple(row[1] for row in rows),
        tuple(row[2] for row in rows),
        (0.0,) * len(rows),
    )


def answers_amid_a_refit(job: Job, coordinator: Coordinator) -> tuple[list[Any], int]:
    """Answers with tokens of two versions, and the older one; the trainers' weights are doubled in between."""
    assert job.refit(coordinator).committed
    actor = job.cluster.generators[0]
    for _ in range(TRIES):
        job.scale_weights(2.0)
        actor.submit.remote(job.version, PROMPTS, 1, NUM_TOKENS, 1.0, None)
        time.sleep(AMID_S)
        assert job.refit(coordinator).committed
        taken = collect({"generator 0": actor.take.remote(job.version - 1)}, "take", CALL_S)
        rows = [row for row in taken["generator 0"] if len(row[3]) == 2]
        if rows:
            assert all([version for version, _ in row[3]] == [job.version - 1, job.version] for row in rows)
            return rows, job.version - 1
        job.scale_weights(0.5)
        assert job.refit(coordinator).committed
    raise AssertionError(f"no answer met a refit in {TRIES} tries: they end too soon")

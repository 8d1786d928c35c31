"""Prometheus reads a job's metrics from the address that the job names."""

from __future__ import annotations

import bisect
import dataclasses
import re
import time
import urllib.request

import pytest

from refit.service.metrics import SECONDS_BOUNDS, JobMetrics, metrics_address
from refit.service.record import StepRecord, TrainRecord
from tests.end_to_end.jobs import Job, JobPool

PATIENCE_S = 40.0  # Ray hands metrics over every 10 s

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.megatron, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def job(jobs: JobPool) -> Job:
    return jobs.get("default")


def test_the_metrics_endpoint_shows_the_last_refit(job: Job) -> None:
    metrics = JobMetrics()
    with job.path("p2p") as coordinator:
        record = job.refit(coordinator)
    for step in (record_of_step(3, trained=True), record_of_step(4, trained=False)):
        metrics.add_step(step)
    metrics.add_refit(dataclasses.replace(record, delta_share=0.25))
    found = wait_for("ray_refit_version")
    assert found["ray_grpo_step", ""] == 3  # the rollout that closes a run is no step
    assert found["ray_refit_version", ""] == record.version
    assert found["ray_refit_attempts_total", 'outcome="committed"'] == 1
    assert found["ray_refit_bytes_total", 'class="bulk"'] == record.bulk_bytes > 0
    assert found["ray_refit_seconds_count", 'phase="stage"'] == 1
    near = found[
        "ray_refit_seconds_sum", 'phase="stage"'
    ]  # Ray hands on the middle of the bucket, not the value
    low, high = bucket_of(record.seconds["stage"])
    assert low <= near <= high
    assert found["ray_refit_rank_bytes", 'direction="sent",rank="train 0"'] == record.ranks[0].bytes_sent
    assert found["ray_refit_delta_share", ""] == 0.25
    assert found["ray_refit_bound_ratio", ""] == pytest.approx(record.bound_ratio)
    assert found["ray_refit_extra_memory_bytes", 'kind="staging"'] == record.staged_bytes > 0


def record_of_step(step: int, trained: bool) -> StepRecord:
    numbers = dict.fromkeys(
        ("reward", "reward_stdev", "solved_share", "gen_kl", "gen_kl_token_max", "gen_logprob_gap_mean"), 0.0
    )
    train = TrainRecord(0.0, 0.0, 0.0, 0.0, 0.0) if trained else None
    return StepRecord(
        step=step, weight_version=step - 1, response_tokens=0, gen_logprob_gap_max=0.0, train=train, **numbers
    )


def bucket_of(seconds: float) -> tuple[float, float]:
    """The two bounds of the histogram that `seconds` lies between."""
    place = bisect.bisect_left(SECONDS_BOUNDS, seconds)
    return (0.0, *SECONDS_BOUNDS)[place], (*SECONDS_BOUNDS, float("inf"))[place]


def wait_for(name: str) -> dict[tuple[str, str], float]:
    """{(metric, our labels): value} of the endpoint, once it has `name`."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        with urllib.request.urlopen(metrics_address(), timeout=10.0) as answer:
            text = answer.read().decode()
        if re.search(rf"^{name}\b", text, re.MULTILINE):
            return dict(map(sample, re.findall(r"^ray_(?:refit|grpo)_.*$", text, re.MULTILINE)))
        assert time.monotonic() < deadline_s, f"{name} did not show within {PATIENCE_S} s"
        time.sleep(1.0)


def sample(line: str) -> tuple[tuple[str, str], float]:
    name, labels, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()
    ours = re.findall(r'(?:class|direction|kind|outcome|phase|rank)="[^"]*"', labels)
    return (name, ",".join(sorted(ours))), float(value)

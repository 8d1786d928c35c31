"""Records of steps, the summary of a run, and the lines a person reads."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import resource
import types

import pytest

from refit.service.progress import JobProgress, clock_time, remaining_s, step_line
from refit.service.record import (
    RefitStepRecord,
    RunRecord,
    StepRecord,
    TrainRecord,
    reward_noise,
    scalars,
    summarize,
)
from refit.service.refit_record import PlanRecord, RefitRecord


def step(number, reward=0.5, *, gen_kl=1e-4, last=False, verified=None):
    refit = RefitStepRecord(
        version=number,
        total_s=0.1 * number,
        seconds={"wire": 0.01 * number, "stage": 0.05},
        bulk_bytes=990,
        misc_bytes=10,
        bulk_share=0.99,
        verified=verified,
    )
    return StepRecord(
        step=number,
        weight_version=number - 1,
        reward=reward,
        reward_stdev=0.1,
        solved_share=0.25,
        response_tokens=64,
        gen_kl=gen_kl,
        gen_kl_token_max=10 * gen_kl,
        gen_logprob_gap_mean=0.01,
        gen_logprob_gap_max=0.02,
        seconds={"rollout": 1.0, "train": 2.0},
        train=None if last else TrainRecord(0.5, 0.01, 1.0, 0.0, 1e-3),
        refit=None if last else refit,
    )


def run_of(rewards):
    steps = [step(number, reward) for number, reward in enumerate(rewards, start=1)]
    return [*steps[:-1], step(len(steps), rewards[-1], last=True)]


def test_the_summary_has_every_number_that_the_job_promises():
    summary = summarize(run_of([0.1, 0.1, 0.2, 0.4, 0.5, 0.5]))
    assert {
        "steps",
        "reward_first",
        "reward_last",
        "reward_noise",
        "gen_kl_max",
        "refit_s_p50",
        "bulk_bytes",
        "misc_bytes",
        "bulk_share",
        "weight_version",
    } <= summary.keys()
    assert summary["steps"] == 5
    assert summary["weight_version"] == 5
    assert summary["refit_s_p50"] == pytest.approx(0.3)
    assert summary["refit_s_by_phase_p50"] == pytest.approx({"wire": 0.03, "stage": 0.05})
    assert (summary["bulk_bytes"], summary["misc_bytes"], summary["bulk_share"]) == (990, 10, 0.99)


def test_first_and_last_reward_are_means_over_equal_windows_that_do_not_overlap():
    summary = summarize(run_of([0.0] * 5 + [0.5] * 5))
    assert (summary["reward_first"], summary["reward_last"]) == (0.0, 0.5)
    assert summarize(run_of([0.2, 0.4, 0.6]))["reward_window_steps"] == 1
    assert summarize([step(1, 0.3)])["reward_last"] == pytest.approx(0.3)


def test_the_largest_generation_kl_counts_the_rollout_after_the_last_refit():
    steps = [step(1), step(2), step(3, gen_kl=0.3, last=True)]
    assert summarize(steps)["gen_kl_max"] == 0.3


def test_a_run_without_a_step_has_no_summary():
    with pytest.raises(ValueError, match="without a step"):
        summarize([])


def test_noise_ignores_a_trend_and_sees_scatter():
    generator = random.Random(5)
    line = [0.01 * index for index in range(200)]
    scattered = [value + generator.gauss(0.0, 0.1) for value in line]
    assert reward_noise(line) < 0.01
    assert reward_noise(scattered) == pytest.approx(0.1, rel=0.2)
    assert reward_noise([0.5]) == 0.0


def test_a_run_folder_holds_one_json_line_per_step_tensorboard_events_and_the_summary(tmp_path):
    record = RunRecord.open(tmp_path / "run")
    for number in (1, 2):
        record.add(step(number, verified=True))
    record.add(step(3, last=True))
    record.finish({"steps": 2})
    lines = (tmp_path / "run" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        json.loads(json.dumps(dataclasses.asdict(made))) for made in record.steps
    ]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"steps": 2}
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_tensorboard_reads_back_what_was_recorded(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = RunRecord.open(tmp_path)
    record.add(step(1, 0.25))
    record.add(step(2, 0.75))
    record.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 0.25), (2, 0.75)]
    assert "refit/seconds/wire" in events.Tags()["scalars"]


def test_a_second_run_in_a_folder_is_not_taken_for_the_first(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for rewards in ((0.25, 0.75), (0.5,)):
        record = RunRecord.open(tmp_path)
        assert not (tmp_path / "summary.json").exists()
        for number, reward in enumerate(rewards, start=1):
            record.add(step(number, reward))
        record.finish({"steps": len(rewards)})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 0.5)]


def test_every_number_of_a_record_becomes_a_scalar():
    found = scalars(step(4, verified=True))
    assert found["refit/bulk_bytes"] == 990.0
    assert found["train/loss"] == 0.5
    assert found["refit/verified"] == 1.0
    assert found["weight_version"] == 3.0
    assert "step" not in found


def test_the_line_of_a_step_names_what_a_person_watches():
    line = step_line(step(7, 0.125, verified=True))
    for words in (
        "step   7",
        "reward 0.125",
        "loss +0.5",
        "gen KL 1.0e-04 (v6)",
        "refit v7",
        "wire 0.07",
        "audit ok",
    ):
        assert words in line
    assert "misc 0.00 MB" in line
    assert "after the last refit" in step_line(step(8, last=True))


def test_without_a_terminal_progress_is_plain_lines():
    stream = io.StringIO()
    with JobProgress.open(stream) as progress:
        with progress.waiting("build", 2) as tick:
            tick(("train rank 0",))
        with progress.stepping(3) as stepped:
            stepped(step(1))
        progress.say("a [bracket] stays")
    text = stream.getvalue()
    assert "build ...\nbuild: done in" in text
    assert "step   1" in text
    assert "a [bracket] stays" in text
    assert "\x1b" not in text


def test_progress_says_how_much_is_left():
    stream = io.StringIO()
    with JobProgress.open(stream) as progress, progress.stepping(3) as stepped:
        for number in (1, 2, 3):
            stepped(step(number))
    lines = stream.getvalue().splitlines()
    assert ["left 0:00" in line for line in lines] == [True, True, False], (
        "after the last step nothing is left"
    )
    assert remaining_s(4, 10, 20.0) == 30.0 and remaining_s(11, 10, 20.0) == 0.0
    assert (clock_time(125.4), clock_time(3607.0), clock_time(0.2)) == ("2:05", "1:00:07", "0:00")


def test_whoever_serves_metrics_hears_of_every_step_and_refit(tmp_path):
    heard = []
    metrics = types.SimpleNamespace(add_step=heard.append, add_refit=heard.append)
    run = RunRecord.open(tmp_path, metrics)
    lost = RefitRecord.failed(PlanRecord("d", 1, 1, 1, 0, 1, 0, 1.0, "", "", ()), 2, "gone", 1.0)
    run.add(step(1))
    run.add_refit(lost, PlanRecord("d", 1, 1, 1, 0, 1, 0, 1.0, "", "", ()))
    run.close()
    assert heard == [step(1), lost]


def test_a_disk_that_fills_up_amid_a_line_costs_that_line_and_no_other(tmp_path):
    heard = []
    run = RunRecord.open(tmp_path, types.SimpleNamespace(add_step=heard.append, add_refit=heard.append))
    plan = PlanRecord("d", 1, 1, 1, 0, 1, 0, 1.0, "", "", ())
    refits = [RefitRecord.failed(plan, version, "gone", 1.0) for version in (1, 2, 3)]
    run.add_refit(refits[0], plan)
    file = tmp_path / "refits.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 50, hard))  # a part of a line still fits
    try:
        with pytest.raises(OSError, match="too large"):
            run.add_refit(refits[1], plan)
        with pytest.raises(OSError, match="too large"):
            run.add_refit(refits[1], dataclasses.replace(plan, digest="e" * 200, links=tuple(range(999))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run.add_refit(refits[2], plan)
    run.close()
    assert [json.loads(line)["version"] for line in file.read_text().splitlines()] == [1, 3]
    assert [path.name for path in (tmp_path / "plans").iterdir()] == ["d.json"]
    assert heard == [refits[0], refits[1], refits[1], refits[2]], "metrics need no disk"


def test_a_wait_that_fails_does_not_say_done():
    stream = io.StringIO()
    with (
        pytest.raises(RuntimeError, match="broken"),
        JobProgress.open(stream) as progress,
        progress.waiting("build", 1),
    ):
        raise RuntimeError("broken")
    assert "done" not in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_progress_moves_and_the_step_lines_stay(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    with JobProgress.open(stream) as progress:
        with progress.waiting("build", 2) as tick:
            tick(("generator 0",))
        with progress.stepping(3) as stepped:
            stepped(step(1))
    assert "\x1b" in stream.getvalue()
    assert "step   1" in stream.getvalue()

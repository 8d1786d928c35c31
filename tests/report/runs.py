"""A run folder made by the job's own recorder, from rounds that never happened."""

from __future__ import annotations

from refit.service.record import RefitStepRecord, RunRecord, StepRecord, TrainRecord
from refit.service.refit_record import PlanRecord, RefitRecord, Round, record_round
from refit.transfer.protocol import FinishReport, RefitReport
from refit.transfer.report import Span

NUM_TRAIN, NUM_GEN = 2, 2
LINE_BYTES_PER_S = 500_000.0
LINKS = ((0, 2, 1000), (0, 3, 2000), (1, 2, 3000), (1, 3, 4000))
PLAN = PlanRecord(
    "f00d" * 16,
    NUM_TRAIN,
    NUM_GEN,
    10_000,
    64,
    20,
    2,
    1.125,
    "into gen rank 1",
    "out of train rank 1",
    LINKS,
    (("the whitelist leaves <it> out", 2, "model.norm.weight"),),
)


def recorded_run(folder, num_steps=6):
    """Steps 1..num_steps, all committed but the one before the last, which was discarded; then one lost refit."""
    run = RunRecord.open(folder)
    for number in range(1, num_steps + 1):
        reason = "norm.weight differs" if number == num_steps - 1 else ""
        refit = record_round(PLAN, seen(number, reason))
        run.add_refit(refit, PLAN)
        run.add(step_record(number, RefitStepRecord.of(refit, True if number % 2 == 0 else None)))
    run.add_refit(RefitRecord.failed(PLAN, num_steps + 1, "no sign of life from <gen 1>", 2.0), PLAN)
    run.close()
    return folder


def seen(version, reason=""):
    """A round of four ranks on two streams; gen 1 is the straggler."""
    reports = {rank: rank_report(version, rank) for rank in range(NUM_TRAIN + NUM_GEN)}
    finished = {} if reason else {rank: FinishReport(version, 50.06, 0.02, 5000) for rank in range(NUM_GEN)}
    driver = {"pause": 0.001, "stage": 0.05 + 0.001 * version, "verify": 0.002, "commit": 0.03}
    return Round(version, version, reports, finished, int(bool(reason)), reason, driver, LINE_BYTES_PER_S)


def rank_report(version, rank):
    is_gen = rank >= NUM_TRAIN
    own = "unpack" if is_gen else "pack"
    lanes = (0, 1) if is_gen else (0,)
    length = 0.02 if rank == NUM_TRAIN + NUM_GEN - 1 else 0.008
    spans = tuple(
        span
        for lane in lanes
        for span in (Span(own, lane, lane, 0.0, length), Span("wire", lane, lane, length, length + 0.01))
    )
    seconds = {own: length * len(lanes), "wire": 0.01 * len(lanes), "misc": 0.001}
    sent = sum(num_bytes for src, _, num_bytes in LINKS if src == rank)
    received = sum(num_bytes for _, dst, num_bytes in LINKS if dst == rank)
    return RefitReport(
        version, 50.0, sent, received, sent, received, 64, seconds, {"a": {rank: 1}}, {}, 128, spans
    ).message()


def step_record(number, refit):
    return StepRecord(
        step=number,
        weight_version=number - 1,
        reward=0.1 * number,
        reward_stdev=0.05,
        solved_share=0.0,
        response_tokens=64,
        gen_kl=1e-5 * number,
        gen_kl_token_max=1e-3,
        gen_logprob_gap_mean=1e-3,
        gen_logprob_gap_max=1e-2,
        seconds={"rollout": 1.0},
        train=TrainRecord(0.5, 0.01, 1.0, 0.0, 1e-3),
        refit=refit,
    )

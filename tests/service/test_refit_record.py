"""The record of a refit: what is summed, what is the slowest rank's, and who is named."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from types import SimpleNamespace

import pytest

from refit.plan import build_plan
from refit.service.record import RefitStepRecord, RunRecord
from refit.service.refit_record import (
    PlanRecord,
    RefitRecord,
    Round,
    misc_by_reason,
    record_plan,
    record_round,
)
from refit.transfer.protocol import FinishReport, RefitReport
from refit.transfer.report import Span
from tests.plan.worlds import random_world

DRIVER = {"pause": 0.0, "stage": 0.5, "verify": 0.1, "commit": 0.25}
PLAN = PlanRecord("abc", 2, 1, 900, 100, 3, 1, 1.25, "into gen rank 0", "out of train rank 0", ((0, 2, 900),))


def report(started_s, sent=0, received=0, **seconds):
    spans = (Span("pack", 0, 1, 0.0, 0.25), Span("misc", -1, 0, 0.25, 0.5))
    digests = {"a": {2: 7}, "b": {2: 9}}
    return RefitReport(
        5, started_s, sent, received, sent, received, 100, seconds, digests, {"norm": 3}, 64, spans
    ).message()


def seen(reason="", num_differing=0):
    reports = {
        0: report(1000.0, sent=900, pack=0.1, wire=0.3),
        1: report(1000.25, pack=0.2, wire=0.1),
        2: report(1000.0, received=900, unpack=0.1, digest=0.05),
    }
    finished = {} if reason else {0: FinishReport(5, 1000.7, 0.15, 4096)}
    return Round(5, 2, reports, finished, num_differing, reason, DRIVER)


def test_phases_are_the_slowest_rank_and_the_driver_adds_up_to_the_total():
    record = record_round(PLAN, seen())
    assert {"pause", "pack", "wire", "unpack", "digest", "finalize", "stage", "verify", "commit"} <= set(
        record.seconds
    )
    assert (record.seconds["pack"], record.seconds["wire"]) == (0.2, 0.3)
    assert record.seconds["finalize"] == 0.15
    assert record.total_s == pytest.approx(0.85)


def test_bytes_memory_bound_and_digests_are_counted_once():
    record = record_round(PLAN, seen())
    assert (record.bulk_bytes, record.misc_bytes, record.bulk_share) == (900, 100, 0.9)
    assert (record.wire_bytes, record.bound_ratio) == (900, 1.25)
    assert (record.peak_extra_bytes, record.staged_bytes) == (64, 4096)
    assert record.digests_compared == 3, "two bulk tensors and one misc tensor on one generator rank"
    assert record.digest_state == "3 equal"
    assert [(r.name, r.bytes_sent, r.bytes_received, r.misc_bytes) for r in record.ranks] == [
        ("train 0", 900, 0, 100),
        ("train 1", 0, 0, 100),
        ("gen 0", 0, 900, 100),
    ]


def test_the_straggler_is_who_the_others_wait_for_and_not_who_waits():
    record = record_round(PLAN, seen())
    assert record.straggler == "train 1", (
        "it began 0.25 s late; train 0 was longer on the wire, waiting for it"
    )
    assert record.straggler_s == pytest.approx(0.25 + 0.2 - 0.15)


def test_spans_of_all_ranks_count_from_the_first_rank_that_began():
    record = record_round(PLAN, seen())
    assert record.ranks[1].spans[0] == Span("pack", 0, 1, 0.25, 0.5)
    assert record.ranks[2].spans[-1].phase == "finalize"
    assert record.ranks[2].spans[-1].start_s == pytest.approx(0.7)


def test_a_link_has_the_share_of_the_line_rate_that_its_bytes_had_of_the_time_bulk_took():
    """900 bytes in the 0.25 s of a pack span are 3,600 bytes/s; all ranks together took 0.5 s, since one began late."""
    record = record_round(PLAN, dataclasses.replace(seen(), line_bytes_per_s=7200.0))
    rates = {rank.name: (rank.bytes_per_s, rank.line_share) for rank in record.ranks}
    assert rates == {"train 0": (3600.0, 0.5), "train 1": (None, None), "gen 0": (3600.0, 0.5)}
    assert record.line_share == pytest.approx(0.25)


def test_with_deltas_the_plan_keeps_its_bytes_and_rates_are_of_those_that_travelled():
    round_ = seen()
    for number, key in ((0, "wire_bytes_sent"), (2, "wire_bytes_received")):
        round_.reports[number][key] = 90
    record = record_round(PLAN, dataclasses.replace(round_, line_bytes_per_s=7200.0, is_delta=True))
    assert (record.bulk_bytes, record.ranks[0].bytes_sent, record.ranks[2].bytes_received) == (900, 900, 900)
    assert (record.wire_bytes, record.delta_share) == (90, pytest.approx(0.1))
    assert (record.ranks[0].bytes_per_s, record.ranks[0].line_share) == (360.0, 0.05)
    assert record.line_share == pytest.approx(0.025)
    assert record_round(PLAN, seen()).delta_share is None


def test_without_a_line_rate_there_is_a_rate_and_no_share():
    record = record_round(PLAN, seen())
    assert record.line_share is None
    assert (record.ranks[0].bytes_per_s, record.ranks[0].line_share) == (3600.0, None)


def test_a_discarded_round_says_how_many_digests_differ_and_has_no_finalize():
    record = record_round(PLAN, seen("a differs", 1))
    assert not record.committed and record.reason == "a differs"
    assert record.digest_state == "1 of 3 differ"
    assert "finalize" not in record.seconds and record.staged_bytes == 0


@pytest.mark.parametrize("seed", range(20))
def test_the_links_of_a_plan_add_up_to_what_each_rank_sends_and_receives(seed):
    plan = build_plan(*random_world(seed))
    record = record_plan(plan)
    assert sum(number for _, number, _ in record.misc) == record.num_misc
    for reason, number, name in record.misc:
        alike = [
            each for each, tensor in plan.tensors.items() if tensor.kind == "misc" and tensor.reason == reason
        ]
        assert (number, name) == (len(alike), min(alike))
    sent, received = Counter(), Counter()
    for src, dst, num_bytes in record.links:
        assert src < plan.num_train <= dst and num_bytes > 0
        sent[src] += num_bytes
        received[dst - plan.num_train] += num_bytes
    assert sent == sum((+Counter(totals.sent) for totals in plan.totals), Counter())
    assert received == sum((+Counter(totals.received) for totals in plan.totals), Counter())
    assert record.bound_ratio >= 1.0 - 1e-9


def test_the_most_frequent_reason_for_a_broadcast_comes_first():
    kinds = {"c": "rare", "b": "often", "a": "often", "d": None}
    tensors = {
        name: SimpleNamespace(kind="bulk" if reason is None else "misc", reason=reason)
        for name, reason in kinds.items()
    }
    assert misc_by_reason(SimpleNamespace(tensors=tensors)) == (("often", 2, "a"), ("rare", 1, "c"))
    tensors |= {name: SimpleNamespace(kind="misc", reason="rare") for name in "ef"}
    assert misc_by_reason(SimpleNamespace(tensors=tensors))[0] == ("rare", 3, "c")


def test_every_refit_leaves_a_line_and_each_plan_one_file(tmp_path):
    run = RunRecord.open(tmp_path)
    run.add_refit(record_round(PLAN, seen()), PLAN)
    run.add_refit(RefitRecord.failed(PLAN, 6, "train 1 died", 3.0), PLAN)
    run.close()
    lines = [json.loads(line) for line in (tmp_path / "refits.jsonl").read_text().splitlines()]
    assert [(line["version"], line["committed"]) for line in lines] == [(5, True), (6, False)]
    assert lines[0]["ranks"][1]["spans"][0]["phase"] == "pack"
    assert lines[1]["reason"] == "train 1 died" and lines[1]["total_s"] == 3.0
    plan = json.loads((tmp_path / "plans" / "abc.json").read_text())
    assert plan == json.loads(json.dumps(dataclasses.asdict(PLAN)))


def test_a_step_keeps_the_numbers_of_its_refit():
    short = RefitStepRecord.of(record_round(PLAN, seen()), True)
    assert (short.version, short.bulk_bytes, short.straggler, short.verified) == (5, 900, "train 1", True)
    assert short.seconds["finalize"] == 0.15

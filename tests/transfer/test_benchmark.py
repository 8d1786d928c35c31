"""The benchmark runs, and its line holds what the README quotes."""

import json

import pytest

from benchmarks import delta, transfer

TIMES = ("p2p_s", "raw_s", "golden_s", "gather_broadcast_s", "p2p_digest_s")


@pytest.mark.processes
def test_the_tiny_benchmark_moves_the_bytes_of_the_plan_on_every_path(capsys):
    line = transfer.main(["--tiny", "--repeats", "1", "--without-mcore", "--cases", "dense_2x2"])
    assert json.loads(capsys.readouterr().out) == line
    (case,) = line["cases"]
    train, gen, options = transfer.manifests(transfer.TINY[0])
    plan = transfer.build_plan(train, gen, options)
    assert (case["plan_digest"], case["routes"]) == (plan.digest, plan.num_routes)
    assert case["bytes"] == sum(
        parcel.payload_bytes
        for rank, manifest in enumerate(train.ranks)
        for stage in plan.rank_plan(rank).stages
        for parcel in transfer.compile_stage(
            plan, stage, rank, {spec.name: spec.dtype for spec in manifest.params}, transfer.CPU
        ).parcels
    )
    assert all(case[name] > 0 for name in TIMES)
    assert case["p2p_over_raw"] == pytest.approx(case["p2p_s"] / case["raw_s"], rel=0.05)
    assert case["p2p_cpu_over_raw"] == pytest.approx(case["p2p_cpu_s"] / case["raw_cpu_s"], rel=0.05)
    assert case["mcore_bytes"] == 0 and case["extra_rss_bytes"] >= 0


@pytest.mark.slow
@pytest.mark.megatron
@pytest.mark.processes
def test_the_tiny_benchmark_runs_megatron_core_on_the_dense_layouts():
    dense, experts = transfer.main(["--tiny", "--repeats", "1"])["cases"]
    assert dense["mcore_s"] > 0 and dense["mcore_bytes"] == pytest.approx(dense["bytes"], rel=0.02)
    assert experts["mcore_s"] is None and experts["mcore_bytes"] == 0


@pytest.mark.slow
@pytest.mark.processes
def test_the_tiny_delta_benchmark_sends_few_bytes_for_few_changes_and_never_more_than_all(capsys):
    line = delta.main(["--tiny", "--repeats", "1"])
    assert json.loads(capsys.readouterr().out) == line
    train, gen, options = transfer.manifests(delta.TINY)
    assert line["plan_digest"] == transfer.build_plan(train, gen, options).digest
    rows = line["shares"]
    assert [row["share"] for row in rows] == list(delta.SHARES)
    assert all(row["full_s"] > 0 and row["delta_s"] > 0 for row in rows)
    assert len({row["full_bytes"] for row in rows}) == 1
    shares = [row["delta_share"] for row in rows]
    assert shares == sorted(shares) and shares[0] < 0.01 and 1 <= shares[-1] < 1.01
    assert rows[-1]["break_even_gbps"] in (0.0, None), "where everything changes, a delta saves nothing"

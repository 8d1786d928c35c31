"""Every way of moving weights leaves the same bits in the engines, in every ready configuration, twice in a row."""

from __future__ import annotations

import pytest

from tests.end_to_end.jobs import PATHS, Job, JobPool, some_batch

CONFIGS = (
    "default",
    "tp2_to_tp1",
    "tp1_to_tp2",
    "ep2_moe_to_tp2",
    "dp2_to_2x_tp1",
    "norms_by_broadcast",
    "pp2_to_pp2_tp2",
)
EVERY_RUN = ("default",)

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.megatron, pytest.mark.timeout(900)]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in EVERY_RUN else pytest.mark.slow) for name in CONFIGS],
)
def job(request: pytest.FixtureRequest, jobs: JobPool) -> Job:
    opened = jobs.get(request.param)
    opened.train(some_batch())
    return opened


def test_p2p_golden_and_conventional_leave_bit_identical_generators_over_two_refits(job: Job) -> None:
    found = {}
    for name in PATHS:
        with job.path(name) as coordinator:
            for factor in (2.0, 0.5):
                job.scale_weights(factor)
                record = job.refit(coordinator)
                assert record.committed, record.reason
                report = coordinator.verify()
                assert report.ok, (report.mismatches, report.changed_params)
                found[name, factor] = report.params_sha256
            assert (record.bulk_bytes == 0) == (name == "conventional"), (name, record)
            if name != "conventional":
                assert record.bulk_share >= 0.99, record
    assert all(hashes for by_rank in found.values() for hashes in by_rank)
    for factor in (2.0, 0.5):
        assert found["p2p", factor] == found["golden", factor] == found["conventional", factor]
    assert found["p2p", 2.0] != found["p2p", 0.5], "the second refit changed nothing"


def test_the_bulk_and_misc_classes_cover_the_model_and_misc_is_used_where_it_is_asked_for(job: Job) -> None:
    with job.path("p2p") as coordinator:
        plan = coordinator.plan
        names = plan.misc_names
    if job.config.refit.force_misc:
        assert names and all(name.endswith("norm.weight") for name in names), names
        assert plan.misc_bytes > 0
    else:
        assert not names, {
            name: tensor.reason for name, tensor in plan.tensors.items() if tensor.kind == "misc"
        }

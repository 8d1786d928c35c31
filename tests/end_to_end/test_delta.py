"""A real job that sends only what changed: the engines hold the trainers' weights, audit by audit, for fewer bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from refit.service.coordinator import Coordinator
from refit.service.waiting import collect
from tests.end_to_end.jobs import CALL_S, Job, open_job, some_batch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.vllm,
    pytest.mark.megatron,
    pytest.mark.timeout(900),
]


def count_changes(actor: Any) -> tuple[int, int]:
    """Elements of the trained parameters whose bits differ from those of the last call, and how many there are."""
    from refit.transfer.memory import as_bits

    params = {name: param.detach().clone() for name, param in actor._policy.params().items()}
    before, actor.seen_params = getattr(actor, "seen_params", params), params
    num_changed = sum(int((as_bits(params[name]) != as_bits(before[name])).sum()) for name in params)
    return num_changed, sum(param.numel() for param in params.values())


def changed_share(job: Job) -> float:
    calls = {
        who: actor.__ray_call__.remote(count_changes) for who, actor in job.cluster.named_trainers().items()
    }
    counts = collect(calls, "count changes", CALL_S).values()
    return sum(changed for changed, _ in counts) / sum(total for _, total in counts)


def trained_and_refitted(job: Job, coordinator: Coordinator) -> tuple[float, float]:
    """After one step of training: shares of elements that changed, and of bulk bytes that were sent for them."""
    job.train(some_batch())
    changed = changed_share(job)
    record = job.refit(coordinator)
    assert record.committed, record.reason
    report = coordinator.verify()
    assert report.ok, (report.mismatches, report.changed_params)
    planned = sum(rank.bytes_sent for rank in record.ranks)
    assert record.delta_share == pytest.approx(record.wire_bytes / planned)
    print(f"version {record.version}: {changed:.4%} of the elements changed, {record.delta_share:.4%} sent")
    return changed, record.wire_bytes / planned


@pytest.mark.parametrize("lr", [1e-3, 1e-6])
def test_deltas_of_real_steps_leave_what_the_trainers_hold_and_outlive_a_new_plan(
    lr: float, tmp_path: Path
) -> None:
    overrides = (f"policy.lr={lr}", "+policy.nccl_xfer_refit=true", "refit.delta=true")
    with open_job("default", tmp_path, overrides) as job:
        changed_share(job)
        found = []
        for _ in range(2):  # the second time with new groups, as after the loss of a replica
            with job.path("p2p") as coordinator:
                found += [trained_and_refitted(job, coordinator) for _ in range(3)]
    assert found[0][1] >= 1, "the first refit is sent in full"
    for changed, sent in found[1:]:
        assert sent <= min(1.01, 2.1 * changed + 0.02)  # two bytes, and at most two for the place of each

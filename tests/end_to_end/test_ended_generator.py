"""A generator that is ended amid a job leaves no process and no shared memory, while the job goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from refit.transfer.segments import shared_memory_of
from tests.end_to_end.jobs import open_job

pytestmark = [
    pytest.mark.ray, pytest.mark.vllm, pytest.mark.megatron, pytest.mark.slow, pytest.mark.timeout(900),
]  # fmt: skip


def test_an_ended_generator_of_two_ranks_leaves_nothing_in_shared_memory(tmp_path: Path) -> None:
    with open_job("default", tmp_path) as job:
        cluster = job.cluster
        below = [*cluster._below[0]]
        mapped = {segment for process in below for segment in shared_memory_of(process.pid)}
        assert mapped and all(segment.exists() for segment in mapped)
        cluster.end_generator(0)
        assert not any(process.is_running() for process in below)
        assert {segment for segment in mapped if segment.exists()} == set()
        assert all(job.all_trainers("process_id").values()), "the trainers live"

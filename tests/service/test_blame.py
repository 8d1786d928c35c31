"""Who is left out: whom a failure happened to, whatever its place was before, and nobody who was only slow."""

from __future__ import annotations

import contextlib
import time

import pytest
import ray

from refit.chaos.__main__ import a_ray
from refit.chaos.campaign import config_of
from refit.chaos.crew import THREADS, Crew
from refit.chaos.faults import Fault
from refit.chaos.parties import PlainReplica
from refit.service.coordinator import Coordinator
from refit.transfer import endpoint

pytestmark = [pytest.mark.ray, pytest.mark.processes]
TIMEOUT_S = 4.0
BUSY_S = 1.5 * TIMEOUT_S  # longer than others may take to end after a failure, shorter than a finish may take


class Cramped(PlainReplica):
    """It joins the plan and has no room for its tables then."""

    def prepare_refit(self, init_info):
        def no_room(*_, **__):
            raise MemoryError("no room for the tables")

        endpoint.compile_stage = no_room
        super().prepare_refit(init_info)


class Busy(PlainReplica):
    """Requests under way keep it from its commit for a while, as `refit.pause=wait` lets them."""

    def finish(self, version, attempt):
        time.sleep(BUSY_S)
        return super().finish(version, attempt)


class Restless(PlainReplica):
    """Its requests never end, so that it commits nothing, and serves on."""

    def finish(self, version, attempt):
        self.num_tries = getattr(self, "num_tries", 0) + 1
        with self._doing("finish", told=True):
            raise RuntimeError(f"requests have not ended, time {self.num_tries}")


class MixedCrew(Crew):
    """`kinds` says which class the next actors of a replica are made of; plain ones after those."""

    def __init__(self, num_replicas, logs, kinds):
        self._kinds = kinds
        super().__init__(2, num_replicas, logs)

    def _replica(self, number):
        kinds = self._kinds.get(number, [])
        kind = kinds.pop(0) if kinds else PlainReplica
        return self._actor(kind, THREADS, number, str(self._logs / f"gen-{number}.log"))


@pytest.fixture(scope="module")
def job_of():
    """Opens a job: (coordinator, crew)."""

    @contextlib.contextmanager
    def opened(folder, num_replicas, kinds):
        crew = MixedCrew(num_replicas, folder, kinds)
        config = config_of(num_replicas, TIMEOUT_S)
        coordinator = Coordinator.prepare(config, crew.trainers, crew.generators, crew)
        yield coordinator, crew
        coordinator.close()

    with a_ray(config_of(3, TIMEOUT_S)):
        yield opened


def test_a_replacement_that_cannot_prepare_is_left_out_and_not_who_had_its_place_before(job_of, tmp_path):
    with job_of(tmp_path, 3, {0: [PlainReplica, Cramped]}) as (coordinator, crew):
        crew.arm(Fault("generator", 0, "round", "kill"), tmp_path / "mark")
        assert coordinator.refit(1).committed
        assert coordinator.states()["generator 0"].startswith("failed")
        (coming,) = coordinator._roster._coming.values()
        assert ray.wait([coming.built], timeout=60.0)[0], "else the next refit goes without it"
        record = coordinator.refit(2)
        assert record.committed
        states = coordinator.states()
        assert "no room for the tables" in states.pop("generator 0")
        assert states == {"generator 1": "serving(2)", "generator 2": "serving(2)"}


def test_who_takes_its_time_to_commit_is_not_left_out_because_another_died(job_of, tmp_path):
    with job_of(tmp_path, 2, {1: [Busy]}) as (coordinator, crew):
        busy = crew.generators[1]
        crew.arm(Fault("generator", 0, "commit", "kill"), tmp_path / "mark")
        assert coordinator.refit(1).committed
        assert coordinator.states()["generator 1"] == "serving(1)"
        assert crew.generators[1] is busy, "nobody replaced it"
        assert ray.get(busy.weight_version.remote(), timeout=60.0) == 1


def test_who_does_not_commit_again_and_again_is_left_out_and_the_rest_go_on(job_of, tmp_path):
    with job_of(tmp_path, 2, {1: [Restless]}) as (coordinator, _):
        record = coordinator.refit(1)
        assert record.committed
        assert any("requests have not ended, time 2" in words for words in record.incidents), (
            "it was repeated"
        )
        assert record.replicas["generator 0"] == "serving(1)"
        assert record.replicas["generator 1"].startswith("failed(version 1 was to be committed")

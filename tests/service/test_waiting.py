"""Waiting for real Ray actors: deadlines, root causes, and an end that leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import ray

from refit.run import load_config
from refit.service.cluster import BUILD_BOUND, Cluster
from refit.service.processes import end_processes
from refit.service.waiting import FIXED_BOUND, collect, no_answer, root_cause
from refit.transfer.errors import Failure, RefitFailed, TransportError

pytestmark = pytest.mark.ray


class Worker:
    """An actor that answers, fails, hangs or dies when told to."""

    def answer(self, value):
        return value

    def fail_with_cause(self, phase, who, message):
        raise RefitFailed(Failure(phase, who, message))

    def fail(self, message, after_s=0.0):
        time.sleep(after_s)
        raise ValueError(message)

    def hang(self):
        time.sleep(30)

    def die(self, after_s=0.0):
        time.sleep(after_s)
        os._exit(1)


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory):
    """The Ray of a job, opened by the code under test; the job's own actors are created but never built."""
    cluster = Cluster.open(load_config("tp1_to_tp2"), tmp_path_factory.mktemp("logs"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def workers(local_ray):
    """Actors that do several calls at a time, so that a call that hangs is nobody else's trouble."""
    made = [ray.remote(Worker).options(num_cpus=0, max_concurrency=8).remote() for _ in range(3)]
    ray.get([worker.answer.remote(0) for worker in made], timeout=120)
    return made


def test_results_come_in_the_order_asked_for(workers):
    pending = {"b": workers[0].answer.remote(1), "a": workers[1].answer.remote(2)}
    assert list(collect(pending, "test", 30.0).items()) == [("b", 1), ("a", 2)]


def test_a_failure_names_actor_phase_and_cause(workers):
    with pytest.raises(RefitFailed) as failed:
        collect({"train rank 1": workers[0].fail.remote("bad shape")}, "build", 30.0)
    assert failed.value.failure == Failure("build", "train rank 1", "ValueError: bad shape")


def test_a_cause_that_an_actor_already_knows_passes_unchanged(workers):
    with pytest.raises(RefitFailed) as failed:
        collect(
            {"train rank 0": workers[0].fail_with_cause.remote("wire", "gen 1", "disk full")}, "refit", 30.0
        )
    assert failed.value.failure == Failure("wire", "gen 1", "disk full")


def test_one_failure_ends_the_wait_for_those_that_hang(workers):
    started_s = time.monotonic()
    with pytest.raises(RefitFailed, match="bad shape"):
        collect({"a": workers[0].hang.remote(), "b": workers[1].fail.remote("bad shape")}, "refit", 50.0)
    assert time.monotonic() - started_s < 15.0


def test_a_death_is_the_cause_even_if_a_survivor_complains_first(workers):
    pending = {"survivor": workers[0].fail.remote("connection reset"), "victim": workers[2].die.remote(1.0)}
    with pytest.raises(RefitFailed) as failed:
        collect(pending, "refit", 30.0)
    assert failed.value.failure.who == "victim"
    assert "died" in failed.value.failure.message


def test_a_missed_deadline_names_who_is_missing_and_the_way_out(workers):
    pending = {"train rank 0": workers[0].answer.remote(1), "generator 0": workers[1].hang.remote()}
    with pytest.raises(
        TransportError, match=r"save: no answer from generator 0 after .* s \(a fixed limit\)"
    ):
        collect(pending, "save", 2.0, bound=FIXED_BOUND)


def test_a_missed_deadline_names_the_key_that_bounds_it():
    assert "(refit.timeout_s bounds this wait)" in no_answer("prepare", ("generator 0",), 120.0)
    assert "(cluster.build_timeout_s bounds" in no_answer("build", ("generator 0",), 600.0, BUILD_BOUND)


def test_the_watcher_hears_who_is_still_awaited(workers):
    heard = []
    with pytest.raises(TransportError):
        collect({"a": workers[0].answer.remote(1), "b": workers[1].hang.remote()}, "test", 2.0, heard.append)
    assert heard[0] == ("a", "b")
    assert heard[-1] == ("b",)


def test_the_first_failure_is_the_cause_when_nobody_died():
    first, second, death = (Failure("refit", who, "x") for who in ("a", "b", "c"))
    assert root_cause([(False, first), (False, second)]) is first
    assert root_cause([(False, first), (True, death)]) is death


def test_processes_that_do_not_leave_by_themselves_are_ended():
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        process = psutil.Process(child.pid)
        end_processes([process], patience_s=1.0)
        assert not process.is_running()


def test_a_job_keeps_its_own_answer_to_sigterm(local_ray):
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # as it was before this Ray


def test_closing_leaves_no_process_behind(local_ray):
    """Last in this file: it closes the Ray of the others."""
    roots = local_ray._ray_processes
    mine = [*roots, *(child for root in roots for child in root.children(recursive=True))]
    assert len(mine) >= 6  # the Ray daemons, the job's actors and the workers of this file
    local_ray.close()
    assert [
        process for process in mine if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    ] == []
    assert not ray.is_initialized()

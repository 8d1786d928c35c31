"""Pools of forked processes: results by name, deaths and hangs named, nothing left behind. Real processes."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import wait

import psutil
import pytest

from refit.validation.pool import Job, Pool
from tests.validation import bodies

pytestmark = [pytest.mark.processes, pytest.mark.timeout(60)]


@pytest.fixture
def pool(tmp_path):
    opened = Pool("test", "tests.validation.bodies:load_nothing", tmp_path / "log")
    yield opened
    opened.close()
    assert not opened.is_alive


def results(pool, count):
    found = []
    deadline = time.monotonic() + 30
    while len(found) < count:
        assert wait([pool.pipe], deadline - time.monotonic()), f"only {found}"
        found += pool.poll()
    return {result.who: result for result in found}


def test_each_job_runs_in_a_process_of_its_own_and_answers_by_its_name(pool):
    pool.start([Job(f"rank {i}", bodies.double, (i,)) for i in range(3)])
    found = results(pool, 3)
    assert {who: result.value for who, result in found.items()} == {"rank 0": 0, "rank 1": 2, "rank 2": 4}
    assert not any(result.error for result in found.values())


def test_an_exception_comes_back_with_process_step_and_traceback(pool):
    pool.start([Job("rank 7", bodies.refuse, ())])
    (found,) = results(pool, 1).values()
    assert found.error.startswith("rank 7: ValueError during 'counting': three is not two")
    assert "bodies.py" in found.error and not found.died


def test_a_process_that_dies_names_itself_its_step_and_the_signal(pool):
    pool.start([Job("rank 1", bodies.die, ()), Job("rank 2", bodies.double, (4,))])
    found = results(pool, 2)
    assert found["rank 1"].error == "rank 1: killed by SIGKILL during 'dying'"
    assert found["rank 1"].died and found["rank 2"].value == 8


def test_stopping_kills_what_hangs_and_says_where_it_was(pool, tmp_path):
    pool.start([Job("rank 3", bodies.hang, (tmp_path / "pid",))])
    pid = int(text_of(tmp_path / "pid"))
    assert pool.stop() == {"rank 3": "hanging"}
    assert not psutil.pid_exists(pid)
    pool.start([Job("rank 4", bodies.double, (1,))])
    assert results(pool, 1)["rank 4"].value == 2


def test_a_parent_that_cannot_load_its_framework_is_reported(tmp_path):
    pool = Pool("broken", "tests.validation.bodies:fail_to_load", tmp_path / "log")
    pool.start([Job("rank 0", bodies.double, (1,))])
    (found,) = results(pool, 1).values()
    assert found.error == "the parent of the broken ranks died (exit code 1)"
    assert "no such framework" in (tmp_path / "log").read_text()
    pool.close()


def test_a_killed_owner_takes_the_whole_pool_with_it(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from refit.validation.pool import Job, Pool; from tests.validation import bodies\n"
        "folder = Path(sys.argv[1])\n"
        "pool = Pool('test', 'tests.validation.bodies:load_nothing', folder / 'log')\n"
        "pool.start([Job('rank 0', bodies.hang, (folder / 'pid',))]); time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    rank = psutil.Process(int(text_of(tmp_path / "pid")))
    parent = rank.parent()
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait(10)
    _, alive = psutil.wait_procs([rank, parent], timeout=10)
    assert not alive


def text_of(file):
    """The text that another process writes, once it is there."""
    deadline = time.monotonic() + 30
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline, f"nobody wrote {file}"
        time.sleep(0.05)
    return file.read_text()

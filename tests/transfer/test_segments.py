"""Named shared memory of real processes: found by its name, removed when nobody maps it."""

import mmap
import os
import subprocess
import sys
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from refit.transfer.segments import remove_unmapped, shared_memory_of

pytestmark = pytest.mark.processes

MAPS_IT = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0)
print("mapped", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def segment():
    path = Path("/dev/shm") / f"vllm_dist_refit_test{os.getpid()}-tp:0-[0-1]-cpushm_0"
    path.write_bytes(bytes(4096))
    yield path
    path.unlink(missing_ok=True)


def test_shared_memory_of_a_process_is_found_by_its_name():
    segment = shared_memory.SharedMemory(create=True, size=4096)
    try:
        assert Path("/dev/shm") / segment.name.lstrip("/") in shared_memory_of(os.getpid())
    finally:
        segment.close()
        segment.unlink()
    assert shared_memory_of(2**22 + 1) == set()


def test_what_another_process_maps_stays_until_that_one_has_ended(segment):
    with subprocess.Popen(
        [sys.executable, "-c", MAPS_IT, str(segment)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"mapped\n"
        assert shared_memory_of(other.pid) == {segment}
        remove_unmapped({segment})
        assert segment.exists()
        other.kill()
        other.wait(10)
        remove_unmapped({segment, segment.with_name("refit_never_was")})
    assert not segment.exists()


def test_what_this_process_maps_stays_unless_that_does_not_count(segment):
    with segment.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        remove_unmapped({segment})
        assert segment.exists()
        remove_unmapped({segment}, besides=(os.getpid(),))
        assert not segment.exists()

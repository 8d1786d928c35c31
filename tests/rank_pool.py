"""Ranks of one side for tests: forks of a process that has its framework imported, so that a layout costs seconds."""

import atexit
import os
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

from refit.gen_side.bare import forget_ranks
from refit.validation.pool import Job, Pool
from refit.validation.runner import meeting_addresses

START_S = 300.0
"""The first call waits for the imports too."""


class RankPool:
    """Opened by its first call; it ends with the thread that opened it, and its ranks with it."""

    def __init__(self, name, preload):
        self._name, self._preload = name, preload
        self._addresses = meeting_addresses()
        self._pool = None

    def run(self, body, num_ranks, args, timeout_s):
        """body(rank, address, *args) in `num_ranks` processes; their results in rank order.

        Raises AssertionError with every traceback, TimeoutError with the ranks that gave no result.
        """
        if self.open():
            timeout_s += START_S
        address = next(self._addresses)
        names = [f"rank {rank}" for rank in range(num_ranks)]
        self._pool.start([Job(name, _run, (body, rank, address, args)) for rank, name in enumerate(names)])
        try:
            found = self._collect(names, timeout_s)
        finally:
            self._pool.stop()
            forget_ranks(address)
        return [found[name] for name in names]

    def _collect(self, names, timeout_s):
        found = {}
        deadline = time.monotonic() + timeout_s
        while missing := [name for name in names if name not in found]:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"no result from {', '.join(missing)} within {timeout_s:.0f} s")
            wait([self._pool.pipe], left_s)
            results = self._pool.poll()
            errors = [result.error for result in results if result.error]
            if errors:
                time.sleep(1.0)  # the others' errors, and whether one of them died
                errors += [result.error for result in self._pool.poll() if result.error]
                raise AssertionError("\n".join(errors))
            found |= {result.who: result.value for result in results}
        return found

    def open(self):
        """For calls from threads that end earlier. False if it was open."""
        if self._pool is not None and self._pool.is_alive:
            return False
        file, log = tempfile.mkstemp(prefix=f"refit-test-{self._name}-", suffix=".log")
        os.close(file)
        self._pool = Pool(self._name, self._preload, Path(log))
        atexit.register(self._close, self._pool, Path(log))
        return True

    @staticmethod
    def _close(pool, log):
        pool.close()
        log.unlink(missing_ok=True)


def _run(_tell, body, rank, address, args):
    return body(rank, address, *args)

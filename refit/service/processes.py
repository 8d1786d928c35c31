"""Ending processes by their id."""

from __future__ import annotations

import contextlib
import time

import psutil  # type: ignore[import-untyped]


def end_processes(processes: list[psutil.Process], patience_s: float) -> None:
    """Wait for processes to leave; ask, then force, those still there after half and all of `patience_s`."""
    deadline_s = time.monotonic() + patience_s
    alive = psutil.wait_procs(processes, timeout=patience_s / 2)[1]
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    alive = psutil.wait_procs(alive, timeout=max(0.0, deadline_s - time.monotonic()))[1]
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=patience_s / 2)

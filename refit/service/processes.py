"""Ending processes by their id, and finding what they leave behind."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]

SHARED_MEMORY = "/dev/shm/"  # noqa: S108  not a temporary file of ours


def shared_memory_of(pid: int) -> set[Path]:
    """The named shared memory segments that a process maps; empty where there is no /proc, or no such process."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    names = {line.partition(SHARED_MEMORY)[2] for line in lines if SHARED_MEMORY in line}
    return {Path(SHARED_MEMORY) / name for name in names if not name.endswith(" (deleted)")}


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

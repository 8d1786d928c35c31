"""Named shared memory on Linux: which of it processes map, and the removal of what they leave when they are ended.

vLLM's workers on a CPU add up through segments of 4 MiB that only a worker which leaves in order removes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

SHARED_MEMORY = "/dev/shm/"  # noqa: S108  not a temporary file of ours
_PROCESSES = Path("/proc")


def shared_memory_of(pid: int) -> set[Path]:
    """The named shared memory segments that a process maps; empty where there is no /proc, or no such process."""
    try:
        lines = (_PROCESSES / str(pid) / "maps").read_text().splitlines()
    except OSError:
        return set()
    names = {line.partition(SHARED_MEMORY)[2] for line in lines if SHARED_MEMORY in line}
    return {Path(SHARED_MEMORY) / name for name in names if not name.endswith(" (deleted)")}


def remove_unmapped(segments: Iterable[Path], besides: Collection[int] = ()) -> None:
    """Remove those of `segments` that no process maps any more, but for the processes `besides`.

    Call when the processes that mapped them have ended. Who maps one that is removed may go on with it.
    """
    left = {segment for segment in segments if segment.exists()}
    if not left:
        return
    for process in _PROCESSES.glob("[0-9]*"):
        if int(process.name) not in besides:
            left -= shared_memory_of(int(process.name))
    for segment in left:
        segment.unlink(missing_ok=True)

"""What earlier jobs left: shared memory that nobody maps, processes without a job, folders of Ray."""

from __future__ import annotations

import os
import re
import shlex
import time
from pathlib import Path

from refit.doctor.check import SHARED_MEMORY, Check, Host, Process, amount

AREA = "leftovers"
OURS = re.compile(r"psm_|torch_|sem\.|nccl-|plasma|ray|vllm|refit|cuda\.shm|loky|mp-|pym-|.*-cpushm_[0-9]+$")
"""Names that Python's multiprocessing, torch, NCCL, Ray and vLLM give to segments. vLLM's collectives on a CPU begin
theirs with a port where ranks meet at one."""
PROGRAMS = re.compile(
    r"^ray::|^\S*/raylet |^\S*/gcs_server |^VLLM::|^\S*python\S* .*-m (refit\.run|vllm\.entrypoints)|^\S*vllm serve"
)
YOUNG_S = 60.0  # a job that is just coming up
RAY_WISHED_BYTES = 10**9
MAX_NAMES = 5
MAX_SEGMENTS = 100  # of one command


def shared_memory(host: Host) -> Check:
    """Segments of this user that no process maps and that are older than a minute."""
    folder = host.path(SHARED_MEMORY)
    if not folder.is_dir():
        return Check(AREA, "shared memory", "ok", "no /dev/shm")
    mapped = "".join(process.mapped() for process in host.processes()) + _own_maps()
    now_s = time.time()
    found = {
        path: path.stat().st_blocks * 512
        for path in sorted(folder.iterdir())
        if OURS.match(path.name)
        and path.stat().st_uid == os.getuid()
        and now_s - path.stat().st_mtime > YOUNG_S
        and f"{SHARED_MEMORY}/{path.name}\n" not in mapped
    }
    if not found:
        return Check(AREA, "shared memory", "ok", "no segment without a process")
    more = len(found) - MAX_SEGMENTS
    advice = f"no process maps them: rm {shlex.join(map(str, list(found)[:MAX_SEGMENTS]))}"
    if more > 0:
        advice += f" (and {more} more: run doctor again then)"
    return Check(
        AREA, "shared memory", "warn", f"{len(found)} segments, {amount(sum(found.values()))}", advice
    )


def processes(host: Host) -> Check:
    """Ray nodes, actors and engines of this user. Whether a job still needs them only their owner knows."""
    found = [each for each in host.processes() if PROGRAMS.search(each.command) and each.age_s > YOUNG_S]
    if not found:
        return Check(AREA, "processes", "ok", "no Ray node, actor or engine is running")
    oldest = sorted(found, key=lambda process: -process.age_s)
    shown = ", ".join(
        f"{each.pid} ({_short(each)}, {each.age_s / 60:.0f} min)" for each in oldest[:MAX_NAMES]
    )
    more = f" and {len(found) - MAX_NAMES} more" if len(found) > MAX_NAMES else ""
    advice = "if no job of yours is running here, they are left over: end them by their ids"
    return Check(AREA, "processes", "warn", f"{shown}{more}", advice)


def ray_folders(host: Host) -> Check:
    """Session folders below Ray's temporary folder that no process uses any more."""
    top = Path(host.environ.get("RAY_TMPDIR") or host.environ.get("TMPDIR") or "/tmp") / "ray"  # noqa: S108
    commands = " ".join(process.command for process in host.processes())
    dead = [
        folder
        for folder in sorted(top.glob("session_2*"))
        if folder.is_dir() and not folder.is_symlink() and folder.name not in commands
    ]
    size = sum(_size(folder) for folder in dead)
    found = f"{len(dead)} of ended sessions in {top}, {amount(size)}"
    if size > RAY_WISHED_BYTES:
        return Check(AREA, "Ray's folders", "warn", found, f"rm -r {top}/session_2* while no Ray runs here")
    return Check(AREA, "Ray's folders", "ok", found)


def _own_maps() -> str:
    return Path("/proc/self/maps").read_text(errors="replace")


def _size(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512  # noqa: PTH118
            except OSError:
                continue  # removed meanwhile
    return total


def _short(process: Process) -> str:
    return Path(process.command.split()[0]).name if process.command else "?"

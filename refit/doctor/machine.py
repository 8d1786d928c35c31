"""The machine: processor, memory, shared memory, limits, disk."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from pathlib import Path

from refit.doctor.check import GB, MIB, SHARED_MEMORY, Check, Host, amount

AREA = "machine"
SHM_NEEDED_BYTES = 320 * MIB
"""Ray's object store in a job of its own takes 256 MiB, each engine of several workers 16 MiB for messages."""
SHM_WISHED_BYTES = 1024 * MIB  # the object store of a node that the Slurm scripts start
FILES_NEEDED, FILES_WISHED = 1024, 8192  # Ray 2.60 asks for 8192
DISK_NEEDED_BYTES, DISK_WISHED_BYTES = GB // 2, 5 * GB
RAY_FULL = 0.95  # Ray makes no objects on a disk that is fuller
SOCKET_PATH_CHARACTERS = 107
RAY_SOCKET_CHARACTERS = (
    68  # of "/ray/session_<date>_<time>_<microseconds>_<pid>/sockets/plasma_store" below it
)


def processor(host: Host) -> Check:
    """Which kernels vLLM's CPU wheel chooses, and what that means for a refit."""
    name = "processor"
    if platform.machine() != "x86_64":
        return Check(AREA, name, "warn", platform.machine(), "the CPU environment was tried on x86-64 only")
    lines = (host.text("/proc/cpuinfo") or "").splitlines()
    flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
    if "avx2" not in flags:
        return Check(
            AREA, name, "fail", "no AVX2", "vLLM's CPU wheel needs AVX2; run on a GPU or a newer processor"
        )
    shown = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in flags]
    means = []
    if "avx512f" not in flags:
        means.append("without AVX-512 vLLM uses its AVX2 kernels, which are slower; bf16 weights stay plain")
    elif "avx512_bf16" not in flags:
        means.append("vLLM uses its AVX-512 kernels without bf16 instructions")
    if "amx_tile" not in flags:
        means.append(
            "without AMX generation.precision=fp8 and mxfp8 decode weights at each use: right, and slow"
        )
    return Check(AREA, name, "ok", f"{os.cpu_count()} CPUs, {', '.join(shown)}", "; ".join(means))


def memory(host: Host, needed_bytes: int) -> Check:
    """`needed_bytes`: what the default job takes, by the gate's own estimate."""
    free, whose = free_memory(host)
    found = f"{amount(free)} free {whose}"
    if free < needed_bytes:
        advice = (
            f"the default job takes about {amount(needed_bytes)} and is refused with less; end other processes or"
            " raise the limit of the container"
        )
        return Check(AREA, "memory", "warn", found, advice)
    return Check(AREA, "memory", "ok", found)


def free_memory(host: Host) -> tuple[int, str]:
    """(bytes, where that limit comes from): of the machine, or of the control group if that leaves less."""
    lines = (host.text("/proc/meminfo") or "").splitlines()
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    limit, used = host.text("/sys/fs/cgroup/memory.max"), host.text("/sys/fs/cgroup/memory.current")
    if limit and used and limit.strip().isdigit() and int(limit) - int(used) < free:
        return int(limit) - int(used), "in this container"
    return free, "on this machine"


def shared_memory(host: Host) -> Check:
    name, folder = SHARED_MEMORY, host.path(SHARED_MEMORY)
    if not folder.is_dir():
        return Check(
            AREA, name, "fail", "not there", "mount a tmpfs on /dev/shm: Ray and vLLM talk through it"
        )
    usage = shutil.disk_usage(folder)
    found = f"{amount(usage.free)} free of {amount(usage.total)}"
    advice = "docker run --shm-size=2g; Kubernetes: an emptyDir of medium Memory; mount -o remount,size=2g /dev/shm"
    if usage.free < SHM_NEEDED_BYTES:
        return Check(AREA, name, "fail", found, f"a job needs {SHM_NEEDED_BYTES // MIB} MiB: {advice}")
    if usage.free < SHM_WISHED_BYTES:
        return Check(
            AREA, name, "warn", found, f"a node of a cluster takes {SHM_WISHED_BYTES // MIB} MiB: {advice}"
        )
    return Check(AREA, name, "ok", found)


def open_files(limits: tuple[int, int] | None = None) -> Check:
    """Ray raises the soft limit to the hard one by itself, so the hard one counts. `limits`: (soft, hard)."""
    soft, hard = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"soft {_limit(soft)}, hard {_limit(hard)}"
    usable = 2**62 if hard == resource.RLIM_INFINITY else hard
    advice = f"raise the hard limit to {FILES_WISHED} or more: ulimit -Hn, LimitNOFILE= of the service, or limits.conf"
    if usable < FILES_NEEDED:
        return Check(AREA, "open files", "fail", found, advice)
    return Check(
        AREA,
        "open files",
        "warn" if usable < FILES_WISHED else "ok",
        found,
        advice if usable < FILES_WISHED else "",
    )


def locked_memory(host: Host, limits: tuple[int, int] | None = None) -> list[Check]:
    """InfiniBand and RoCE pin the memory they move. Nothing to say without such a device."""
    folder = host.path("/sys/class/infiniband")
    devices = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
    if not devices:
        return []
    soft, _ = limits or resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = f"{', '.join(devices)}; locked memory {_limit(soft)}"
    if soft == resource.RLIM_INFINITY:
        return [Check(AREA, "RDMA devices", "ok", found)]
    advice = (
        "ulimit -l unlimited (LimitMEMLOCK=infinity): NCCL and NIXL register memory with the network card"
    )
    return [Check(AREA, "RDMA devices", "warn", found, advice)]


def disk(folder: Path, what: str) -> Check:
    """Free space and the right to write, where `folder` is or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    name = f"disk, {what}"
    if not there.is_dir():
        return Check(AREA, name, "fail", f"{there} is not a folder", f"give another folder than {folder}")
    if not os.access(there, os.W_OK):
        return Check(
            AREA,
            name,
            "fail",
            f"{there} is not writable",
            f"chown or chmod it, or give another than {folder}",
        )
    usage = shutil.disk_usage(there)
    found = f"{amount(usage.free)} free in {there}"
    if usage.free < DISK_NEEDED_BYTES:
        return Check(
            AREA,
            name,
            "fail",
            found,
            f"free {amount(DISK_NEEDED_BYTES)} or more: records and logs are lost",
        )
    if usage.free < DISK_WISHED_BYTES or usage.used > RAY_FULL * usage.total:
        full = f"{usage.used / usage.total:.0%} full"
        return Check(
            AREA,
            name,
            "warn",
            f"{found}, {full}",
            "free some: checkpoints, logs and Ray (up to 95 %) need room",
        )
    return Check(AREA, name, "ok", found)


def socket_paths(host: Host) -> Check:
    """Ray puts sockets below its temporary folder; Linux allows 107 characters."""
    folder = host.environ.get("RAY_TMPDIR") or host.environ.get("TMPDIR") or "/tmp"  # noqa: S108  Ray's default
    length = len(folder) + RAY_SOCKET_CHARACTERS
    found = f"{folder}, paths of up to {length} characters"
    if length > SOCKET_PATH_CHARACTERS:
        advice = f"Linux allows {SOCKET_PATH_CHARACTERS}: export RAY_TMPDIR=/tmp"
        return Check(AREA, "Ray's folder", "fail", found, advice)
    return Check(AREA, "Ray's folder", "ok", found)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)

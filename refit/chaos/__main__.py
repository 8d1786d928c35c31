"""`python -m refit.chaos`: random faults on real processes, a table of what came of them, and one JSON line.

Two trainers and some replicas, plain processes that run the real endpoint on real parameters, led by the service's own
coordinator on a Ray of its own. Exit code 0 if every fault struck, ended as it must and in time, and no torn version
was ever served.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import ray
from rich.console import Console
from rich.table import Table

from refit.chaos.campaign import NUM_TRAINERS, Campaign, config_of
from refit.chaos.crew import Crew
from refit.chaos.judge import Outcome, table_of
from refit.service.cluster import ENVIRONMENT, LEAVE_S, start_ray
from refit.service.config import JobConfig
from refit.service.processes import end_processes
from refit.transfer.protocol import AUTO, TRANSPORTS


def main(argv: Sequence[str] | None = None) -> int:
    """Run one campaign; the last line of standard output is its summary."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    for name in ("faults", "replicas", "timeout_s"):
        if not vars(arguments)[name] >= 1:
            parser.error(f"--{name.replace('_', '-')} is {vars(arguments)[name]}; give at least 1")
    config = config_of(arguments.replicas, arguments.timeout_s, arguments.transport)
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    started_s = time.monotonic()
    with a_ray(config):
        crew = Crew(NUM_TRAINERS, arguments.replicas, arguments.run_dir / "logs")
        campaign = Campaign(crew, config, arguments.run_dir)
        try:
            with (arguments.run_dir / "outcomes.jsonl").open("w", buffering=1) as stream:
                campaign.run(arguments.faults, arguments.seed, lambda outcome: stream.write(line_of(outcome)))
        finally:
            campaign.close()
    summary = summary_of(campaign, arguments.seed, time.monotonic() - started_s)
    show(campaign, Console(file=sys.stderr))
    print(json.dumps(summary))
    return 0 if not campaign.wrong and not campaign.sampler.torn else 1


@contextlib.contextmanager
def a_ray(config: JobConfig) -> Iterator[None]:
    """A Ray of our own on loopback; nothing of it is left afterwards."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    processes = start_ray(config)
    try:
        yield
    finally:
        below = []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself
                below += process.children(recursive=True)
        ray.shutdown()
        end_processes([*processes, *below], LEAVE_S)


def line_of(outcome: Outcome) -> str:
    fault = str(outcome.fault)
    line = [fault, outcome.struck, outcome.ending, round(outcome.seconds, 2), outcome.detail]
    return json.dumps(line) + "\n"


def summary_of(campaign: Campaign, seed: int, wall_s: float) -> dict[str, object]:
    seconds = sorted(outcome.seconds for outcome in campaign.outcomes)
    return {
        "faults": len(campaign.outcomes),
        "struck": sum(outcome.struck for outcome in campaign.outcomes),
        "seed": seed,
        "torn": campaign.sampler.torn,
        "wrong": campaign.wrong,
        "samples": campaign.sampler.num_samples,
        "version": campaign.version,
        "jobs": campaign.num_jobs,
        "seconds_max": round(seconds[-1], 1),
        "seconds_p50": round(seconds[len(seconds) // 2], 2),
        "limit_s": campaign.limit_s,
        "wall_s": round(wall_s, 1),
    }


def show(campaign: Campaign, console: Console) -> None:
    """The table of outcomes, and every broken invariant."""
    table = Table("role", "fault", "times", "endings", "longest, s")
    for row in table_of(campaign.outcomes):
        table.add_row(*map(str, row))
    console.print(table)
    for line in (*campaign.sampler.torn, *campaign.wrong):
        console.print(f"BROKEN: {line}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m refit.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--timeout-s", type=float, default=6.0, help="the deadline of one refit")
    parser.add_argument("--transport", choices=TRANSPORTS, default=AUTO, help="of bulk")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/chaos"), help="logs and outcomes.jsonl")
    return parser


if __name__ == "__main__":
    sys.exit(main())

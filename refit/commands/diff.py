"""`diff`: two holders of weights compared by digests, then by elements where they differ; nothing stops serving.

A side is `trainers` or `engine:K` of the job in --run-dir, the URL of a vLLM server, or the folder of an HF checkpoint.
"""

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refit.commands.read import add_engine_arguments
from refit.plan import ConfigError

if TYPE_CHECKING:
    from refit.service.diff import Weights

TRAINERS, ENGINE = "trainers", "engine:"
MAX_SHOWN = 20
TRIES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for side in ("left", "right"):
        parser.add_argument(
            side, metavar=side.upper(), help="trainers, engine:K, http://HOST:PORT, or a folder"
        )
    add_engine_arguments(parser)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="tensors whose canonical name fits")
    parser.add_argument(
        "--strict", action="store_true", help="exit 1 also when some tensor could not be compared"
    )
    parser.add_argument("--json", action="store_true", help="a JSON object as the last line of stdout")


def run(arguments: argparse.Namespace) -> int:
    """0 if nothing differs; 1 if something does, an engine gives no answer or (--strict) something was left out."""
    from refit.transfer.errors import RefitFailed, TransportError

    try:
        report = _by_the_job(arguments) if TRAINERS in (arguments.left, arguments.right) else _here(arguments)
    except (RefitFailed, TransportError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    _show(report)
    if arguments.json:
        print(json.dumps(report))
    return 0 if report["equal"] and not (arguments.strict and report["skipped"]) else 1


def _by_the_job(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trainers take part in collectives only between two steps of their job, which therefore compares."""
    from refit.service.access import ask_trainers
    from refit.transfer.errors import TransportError

    other = arguments.right if arguments.left == TRAINERS else arguments.left
    if not other.startswith(ENGINE):
        raise ConfigError(
            f"trainers are compared with an engine of their job; {other!r} is none, write engine:0"
        )
    answer = ask_trainers(arguments.run_dir, _place(other), arguments.only)
    if "error" in answer:
        raise TransportError(answer["error"])
    report: dict[str, Any] = answer["report"]
    return report


def _here(arguments: argparse.Namespace) -> dict[str, Any]:
    from refit.service.diff import diff, plain_report
    from refit.service.reader import VersionMoved

    for tried in range(1, TRIES + 1):
        with ExitStack() as stack:
            left, right = (_weights(side, arguments, stack) for side in (arguments.left, arguments.right))
            try:
                return plain_report(diff(left, right, arguments.only))
            except VersionMoved:
                if tried == TRIES:
                    raise
    raise AssertionError("the last try returns or raises")


def _weights(side: str, arguments: argparse.Namespace, stack: ExitStack) -> "Weights":
    from refit.service.access import job_reader, server_reader
    from refit.service.holders import CheckpointWeights, EngineWeights

    if side.startswith(ENGINE):
        reader = stack.enter_context(job_reader(arguments.run_dir, _place(side), arguments.timeout))
        return EngineWeights(reader)
    if side.startswith(("http://", "https://")):
        return EngineWeights(stack.enter_context(server_reader(side, arguments.address, arguments.timeout)))
    if not Path(side).is_dir():
        raise ConfigError(
            f"{side!r} is no side: write trainers, engine:K, http://HOST:PORT, or a folder that is there"
        )
    return CheckpointWeights.open(side)


def _place(side: str) -> int:
    number = side.removeprefix(ENGINE)
    if not number.isdigit():
        raise ConfigError(f"{side!r} names no engine of a job; write engine:0, engine:1, ...")
    return int(number)


def _show(report: dict[str, Any]) -> None:
    for name, reason in report["skipped"].items():
        print(f"not compared: {name}: {reason}")
    for one in report["differences"][:MAX_SHOWN]:
        print(one["text"])
    hidden = len(report["differences"]) - MAX_SHOWN
    if hidden > 0:
        print(f"... and {hidden} more tensors")
    versions = ", ".join(
        f"{report[side]} (version {version})" if version is not None else str(report[side])
        for side, version in zip(("left", "right"), report["versions"], strict=True)
    )
    print(
        f"{versions}: {report['num_tensors']} tensors, {report['num_bytes']} bytes, "
        f"{len(report['differences'])} differ, {len(report['skipped'])} not compared, {report['seconds']:.2f} s"
    )

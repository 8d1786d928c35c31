"""`validate`: golden-versus-real runs. Real trainers refit real generator ranks; every generator byte is compared."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from refit.commands.common import wait_seconds
from refit.commands.misc import lines
from refit.commands.tables import show

if TYPE_CHECKING:
    from refit.validation.outcome import Outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--matrix", default="l0", metavar="l0|l1|fp8|read|FILE", help="which cases (default l0)"
    )
    parser.add_argument(
        "--case", action="append", default=[], metavar="NAME", help="only this case; repeatable"
    )
    parser.add_argument("--list", action="store_true", help="show the cases and run none")
    parser.add_argument(
        "--timeout", type=wait_seconds, default=150.0, metavar="S", help="limit per case (default 150)"
    )
    parser.add_argument("--json", action="store_true", help="a JSON object as the last line of stdout")


def run(arguments: argparse.Namespace) -> int:
    """0 if every case that can run passed, 1 if one failed."""
    from refit.validation.matrix import choose, load_matrix

    cases = choose(load_matrix(arguments.matrix), arguments.case)
    if arguments.list:
        rows = [(case.name, case.model, case.layout, case.unrunnable or "runs") for case in cases]
        show(f"{len(cases)} cases of {arguments.matrix}", ("case", "model", "layout", "here"), rows)
        return 0
    from refit.validation.runner import Runner, run_all

    with Runner(arguments.timeout) as runner:
        outcomes = run_all(cases, runner, _tell)
        failed = [outcome for outcome in outcomes if outcome.failures]
        if failed:
            for side in ("train", "gen"):
                print(f"--- end of the {side} ranks' output\n{runner.log_tail(side)}", file=sys.stderr)
    _report(arguments.matrix, outcomes)
    if arguments.json:
        print(json.dumps(_summary(outcomes)))
    return 1 if failed else 0


def _tell(outcome: "Outcome") -> None:
    print(f"{outcome.status:10} {outcome.seconds:6.1f} s  {outcome.case.name}", flush=True)
    for failure in outcome.failures:
        print(f"    {failure}", flush=True)


def _report(matrix: str, outcomes: "tuple[Outcome, ...]") -> None:
    rows = [
        (
            outcome.case.name,
            outcome.case.layout,
            outcome.status,
            f"{outcome.bulk_bytes}",
            f"{outcome.bulk_share:.4f}",
            len(outcome.misc),
            "" if outcome.logprob_delta is None else f"{outcome.logprob_delta:.1e}",
            "" if outcome.kl is None else f"{outcome.kl:.1e}",
            f"{outcome.seconds:.1f}",
        )
        for outcome in outcomes
        if outcome.status != "unrunnable"
    ]
    headings = ("case", "layout", "status", "bulk bytes", "bulk share", "misc", "logprobs", "KL", "s")
    show(f"validation matrix {matrix}: two refits a case, compared bit for bit", headings, rows)
    for line in lines(pair for outcome in outcomes for pair in outcome.misc):
        print(line)
    not_run = [
        (outcome.case.name, outcome.case.unrunnable) for outcome in outcomes if outcome.case.unrunnable
    ]
    if not_run:
        show("cases that this machine cannot run", ("case", "why, and what stands in"), not_run)
    first = next((outcome for outcome in outcomes if outcome.failures), None)
    if first is not None:
        print(f"first failure: {first.case.name}: {first.failures[0]}")


def _summary(outcomes: "tuple[Outcome, ...]") -> dict[str, object]:
    """`bulk_share_min` is over the cases that must be bulk, the other minimum over those that need only be exact."""
    passed = [outcome for outcome in outcomes if outcome.status == "passed"]
    known = [outcome.bulk_share for outcome in passed if outcome.case.min_bulk_share > 0]
    unknown = [outcome.bulk_share for outcome in passed if outcome.case.min_bulk_share == 0]
    return {
        "cases": len(outcomes),
        "passed": len(passed),
        "failed": sum(outcome.status == "failed" for outcome in outcomes),
        "unrunnable": [
            {"name": outcome.case.name, "reason": outcome.case.unrunnable}
            for outcome in outcomes
            if outcome.case.unrunnable
        ],
        "bulk_share_min": min(known, default=None),
        "bulk_share_min_of_unknown_families": min(unknown, default=None),
        "logprob_delta_max": max(
            (o.logprob_delta for o in outcomes if o.logprob_delta is not None), default=None
        ),
        "kl_max": max((outcome.kl for outcome in outcomes if outcome.kl is not None), default=None),
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
    }

"""`simulate`: a timeline of the bulk transfer on a fabric, with stragglers and failures; writes an SVG picture."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from refit.commands.common import Planned, add_plan_arguments, count, planned, rank_name
from refit.commands.tables import amount, seconds, show
from refit.plan import ConfigError, Plan
from refit.plan.cost import cost_of
from refit.plan.simulate import Faults, Timeline, simulate

MAX_ROWS = 48
WIDTH, ROW, LEFT = 900, 14, 90
COLOURS = ("#3b6ea5", "#c0603a", "#4f8a5b", "#8c5fa8", "#b59a2c", "#3f9aa0", "#a5455f", "#6b6b6b")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_plan_arguments(parser)
    parser.add_argument(
        "--streams",
        type=count,
        default=0,
        help="trainer stages in flight per generator; 0 (default) means all",
    )
    parser.add_argument(
        "--slow",
        action="append",
        default=[],
        metavar="RANK=FACTOR",
        help="train:3=0.5 halves that rank's link",
    )
    parser.add_argument(
        "--fail",
        action="append",
        default=[],
        metavar="RANK=SECOND",
        help="gen:0=0.2 kills that rank at 0.2 s",
    )
    parser.add_argument(
        "--deadline", type=float, default=60.0, help="seconds until peers of a dead rank give up"
    )
    parser.add_argument(
        "--fan-out",
        action="store_true",
        help="two hops: into a generator node once, then NVLink; needs --topology",
    )
    parser.add_argument(
        "--picture", type=Path, default=None, metavar="FILE.svg", help="write the timeline here"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.fan_out and not arguments.topology:
        raise ConfigError("--fan-out needs the nodes: give --topology, for example ranks_per_node=8")
    if not arguments.deadline > 0:
        raise ConfigError(f"--deadline is {arguments.deadline:g} s; it must be above 0")
    done = planned(arguments)
    slow = _faults(done.plan, "--slow", arguments.slow)
    for factor in slow.values():
        _require_slow(factor)
    faults = Faults(slow, _faults(done.plan, "--fail", arguments.fail), arguments.deadline)
    timeline = simulate(
        done.plan, done.topology, arguments.streams or None, faults, done.fan if arguments.fan_out else None
    )
    if arguments.picture is not None:
        _write(arguments.picture, picture(done.plan, timeline))
    if arguments.json:
        print(json.dumps(_report(done, timeline)))
    else:
        _print(done, timeline, arguments)
    return 0


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise ConfigError(f"--picture {file} cannot be written: {error}; name another file") from error


def _faults(plan: Plan, option: str, texts: Sequence[str]) -> dict[int, float]:
    """All of one option, by joint rank."""
    found: dict[int, float] = {}
    for text in texts:
        rank, value = _fault(plan, text)
        if rank in found:
            raise ConfigError(f"{option} is given twice for one rank: {found[rank]:g} and {text!r}; drop one")
        found[rank] = value
    return found


def _fault(plan: Plan, text: str) -> tuple[int, float]:
    """`train:3=0.5` as (joint rank, value)."""
    place, equals, value = text.partition("=")
    side, colon, rank = place.partition(":")
    try:
        number, factor = int(rank), float(value)
    except ValueError:
        number, factor = -1, -1.0
    count = {"train": plan.num_train, "gen": plan.num_gen}.get(side, 0)
    if not (equals and colon and 0 <= number < count and factor >= 0):
        raise ConfigError(
            f"fault {text!r} must be train:RANK=NUMBER or gen:RANK=NUMBER with a rank of this plan"
        )
    return (number if side == "train" else plan.num_train + number), factor


def _require_slow(factor: float) -> None:
    if not 0 < factor <= 1:
        raise ConfigError(
            f"a --slow factor is a share of the link's rate, above 0 and up to 1, and got {factor:g}; use --fail for a"
            " dead rank, --topology for faster links"
        )


def _report(done: Planned, timeline: Timeline) -> dict[str, object]:
    return {
        "model": done.model,
        "seconds": timeline.seconds,
        "bound_s": cost_of(done.plan, done.topology).bound_s,
        "failure": timeline.failure,
        "straggler": rank_name(done.plan, timeline.straggler),
        "num_chunks": timeline.num_chunks,
        "utilization": timeline.utilization,
        "spans": [asdict(span) for span in timeline.spans],
        "digest": done.plan.digest,
    }


def _print(done: Planned, timeline: Timeline, arguments: argparse.Namespace) -> None:
    plan = done.plan
    two_hops = done.fan if arguments.fan_out else None
    if arguments.fan_out and two_hops is None:
        print("no two generators of a node want the same bytes: the direct plan is simulated")
    bound_s = (cost_of(plan, done.topology) if two_hops is None else two_hops.cost()).bound_s
    if timeline.failure:
        print(f"FAILED: {timeline.failure}")
    rows: list[tuple[object, ...]] = [
        ("simulated" if not timeline.failure else "given up after", seconds(timeline.seconds)),
        (f"lower bound of a {'direct' if two_hops is None else 'two-hop'} plan", seconds(bound_s)),
        ("stages in flight", arguments.streams or len(plan.stages)),
        ("generator links in use", f"{timeline.utilization:.1%}"),
        ("busy last", rank_name(plan, timeline.straggler)),
        ("chunks", timeline.num_chunks),
    ]
    show(f"{done.model}: simulated bulk transfer", ("what", "value"), rows)
    last = sorted(timeline.spans, key=lambda span: (-span.stop_s, span.rank))[:8]
    show(
        "latest to finish",
        ("rank", "stage", "from", "to", "bytes"),
        [
            (
                rank_name(plan, span.rank),
                span.stage,
                seconds(span.start_s),
                seconds(span.stop_s),
                amount(span.num_bytes),
            )
            for span in last
        ],
    )
    if arguments.picture is not None:
        print(f"picture: {arguments.picture}")


def picture(plan: Plan, timeline: Timeline) -> str:
    """The timeline as SVG: a row per rank, a bar per stage; at most MAX_ROWS ranks, evenly chosen."""
    ranks = sorted({span.rank for span in timeline.spans})
    step = max(1, -(-len(ranks) // MAX_ROWS))
    rows = {rank: number for number, rank in enumerate(ranks[::step])}
    height = ROW * (len(rows) + 3)
    scale = (WIDTH - LEFT - 20) / (timeline.seconds or 1.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif"'
        ' font-size="10">',
        f'<text x="4" y="12">bulk transfer, {timeline.seconds:.3f} s{"  FAILED" if timeline.failure else ""};'
        " colour = trainer stage</text>",
    ]
    for rank, row in rows.items():
        parts.append(f'<text x="4" y="{ROW * (row + 2) + 10}">{rank_name(plan, rank)}</text>')
    for span in timeline.spans:
        if span.rank in rows:
            x, width = LEFT + span.start_s * scale, max(1.0, (span.stop_s - span.start_s) * scale)
            y = ROW * (rows[span.rank] + 2)
            colour = COLOURS[span.stage % len(COLOURS)]
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 1}" width="{width:.1f}" height="{ROW - 3}" fill="{colour}"'
                f' fill-opacity="{0.55 / span.hop:.2f}"><title>{rank_name(plan, span.rank)} stage {span.stage}'
                f"{', NVLink' if span.hop == 2 else ''}:"
                f" {span.start_s:.4f}-{span.stop_s:.4f} s, {amount(span.num_bytes)}</title></rect>"
            )
    return "\n".join([*parts, "</svg>", ""])

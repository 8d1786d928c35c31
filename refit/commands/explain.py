"""`explain`: one tensor, its class and reason, how both sides hold it, and every route, drawn."""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from refit.commands.common import add_plan_arguments, planned, rank_name
from refit.commands.tables import amount, show
from refit.plan import ConfigError, Plan, Route, canonical
from refit.plan.sides import Entry, Layout

WIDTH = 64
MAX_NAMES = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "tensor", metavar="TENSOR", help="HF name; experts as experts.7.up_proj.weight or experts.*"
    )
    add_plan_arguments(parser)
    parser.add_argument("--rank", type=int, default=None, help="only routes of this joint rank")
    parser.add_argument("--limit", type=int, default=40, help="most routes to list (default 40)")


def run(arguments: argparse.Namespace) -> int:
    plan = planned(arguments).plan
    name, expert = canonical(arguments.tensor)
    tensor = plan.tensors.get(name)
    if tensor is None:
        raise ConfigError(f"tensor {name!r} is not in this model; {_nearest(name, plan.tensors)}")
    if expert is not None and expert >= tensor.shape[0]:
        raise ConfigError(f"{arguments.tensor!r}: the experts of this layer are 0 to {tensor.shape[0] - 1}")
    routes = [
        route
        for route in routes_of(plan, name)
        if arguments.rank in (None, route.src_rank, route.dst_rank)
        and (expert is None or route.region.starts[0] <= expert < route.region.stops[0])
    ]
    if arguments.json:
        print(json.dumps({"tensor": asdict(tensor), "routes": [asdict(route) for route in routes]}))
        return 0
    print(f"{name}  {list(tensor.shape)} {tensor.dtype}  {amount(tensor.num_bytes)}")
    print(f"class: {tensor.kind} ({tensor.reason})")
    _draw("trainers", plan.train.layouts.get(name), tensor.shape)
    _draw("generators", plan.gen.layouts.get(name), tensor.shape)
    rows = [
        (rank_name(plan, route.src_rank), rank_name(plan, route.dst_rank), str(route.region), route.stage)
        for route in routes[: arguments.limit]
    ]
    show(f"routes ({len(rows)} of {len(routes)})", ("from", "to", "box", "stage"), rows)
    return 0


def routes_of(plan: Plan, name: str) -> Iterable[Route]:
    """All routes of one tensor."""
    ranks = plan.train.manifest.ranks
    for flow in plan.flows:
        if name in flow.tensors:
            for position in range(len(flow.holders)):
                for stripe in flow.sent_by(position):
                    if stripe.tensor == name:
                        region = flow.part(stripe.first_row, stripe.stop_row)
                        stage = ranks[stripe.holder].stage
                        yield Route(name, region, stripe.holder, plan.num_train + stripe.receiver, stage)


def _nearest(name: str, known: Iterable[str]) -> str:
    tail = name.rsplit(".", 2)[-2:]
    near = [other for other in known if other.rsplit(".", 2)[-2:] == tail][:3]
    return f"did you mean {', '.join(near)}?" if near else "try `plan` to see the model"


def _draw(side: str, layout: Layout | None, shape: Sequence[int]) -> None:
    if layout is None:
        print(f"{side}: hold no part of it")
        return
    print(f"{side}: {len(layout.entries)} distinct box(es)")
    for entry in layout.entries[:16]:
        cut = [dim for dim, size in enumerate(shape) if entry.box.shape[dim] != size]
        bars = "  ".join(f"dim {dim} {_bar(entry, dim, shape[dim])}" for dim in cut[:2]) or "everything"
        print(f"  {bars}  ranks {_names(entry.ranks)}")
    if len(layout.entries) > 16:
        print(f"  ... {len(layout.entries) - 16} more")


def _bar(entry: Entry, dim: int, size: int) -> str:
    width = WIDTH // 2
    low = entry.box.starts[dim] * width // size
    high = max(low + 1, entry.box.stops[dim] * width // size)
    return "|" + "." * low + "#" * (high - low) + "." * (width - high) + "|"


def _names(ranks: Sequence[int]) -> str:
    shown = ",".join(map(str, ranks[:MAX_NAMES]))
    return shown if len(ranks) <= MAX_NAMES else f"{shown},... ({len(ranks)} ranks)"

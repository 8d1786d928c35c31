"""`plan`: bytes by class, extremes per rank and link, memory, seconds, digest."""

import argparse
import json
import time
from typing import Any

from refit.commands.common import Planned, add_plan_arguments, count, planned, rank_name
from refit.commands.misc import by_reason, lines
from refit.commands.tables import amount, seconds, show
from refit.plan import MISC, Plan, RankPlan
from refit.plan.cost import Cost, cost_of, max_over_mean_in_stage
from refit.plan.fanout import FanOut

DEFAULT_STREAMS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_plan_arguments(parser)
    parser.add_argument(
        "--streams",
        type=count,
        default=0,
        help="trainer stages in flight at once for predicted_s; 0 (default) means all",
    )


def run(arguments: argparse.Namespace) -> int:
    done = planned(arguments)
    cost = cost_of(done.plan, done.topology, arguments.streams or None)
    report = _report(done, cost, arguments)
    if arguments.json:
        print(json.dumps(report))
    else:
        _print(report, done, cost)
    return 0


def _report(done: Planned, cost: Cost, arguments: argparse.Namespace) -> dict[str, Any]:
    plan = done.plan
    shares, slowest_s = _busiest_shares(done, cost)
    return {
        "model": done.model,
        "train": arguments.train,
        "gen": arguments.gen,
        "num_train": plan.num_train,
        "num_gen": plan.num_gen,
        "num_stages": len(plan.stages),
        "num_tensors": len(plan.tensors),
        "routes": plan.num_routes,
        **_classes(plan),
        "manifests_s": round(done.manifests_s, 6),
        "plan_s": round(done.plan_s, 6),
        "rank_plan_s": round(slowest_s, 6),
        "sent_bytes": sum(cost.sent),
        "send_max_bytes": max(cost.sent),
        "send_min_bytes": min(cost.sent),
        "send_max_over_mean": round(cost.send_max_over_mean, 6),
        "send_max_over_mean_in_stage": round(max_over_mean_in_stage(plan.totals), 6),
        "idle_senders": cost.idle_senders,
        "receive_max_bytes": max(cost.received),
        "receive_min_bytes": min(cost.received),
        "busiest_link": cost.busiest.name,
        "busiest_link_bytes": cost.busiest.num_bytes,
        "bound_s": cost.bound_s,
        "bound_link": cost.bound_link,
        "bound_ratio": round(cost.bound_ratio, 6),
        "predicted_s": cost.predicted_s,
        "predicted_two_streams_s": cost_of(plan, done.topology, DEFAULT_STREAMS).predicted_s,
        "peak_bytes_per_rank": max(max(share.peak_send_bytes, share.peak_receive_bytes) for share in shares),
        "bucket_bytes": plan.options.bucket_bytes,
        "rounds_max": max(len(stage.rounds) for share in shares for stage in share.stages),
        "fan_out": None if done.fan is None else _fan_out(done.fan, arguments.streams),
        "digest": plan.digest,
    }


def _classes(plan: Plan) -> dict[str, Any]:
    total = plan.bulk_bytes + plan.misc_bytes
    return {
        "bulk_bytes": plan.bulk_bytes,
        "misc_bytes": plan.misc_bytes,
        "bulk_share": plan.bulk_bytes / total if total else 1.0,
        "misc": by_reason(_misc(plan)),
    }


def _misc(plan: Plan) -> list[tuple[str, str]]:
    return [(tensor.name, tensor.reason) for tensor in plan.tensors.values() if tensor.kind == MISC]


def _fan_out(fan: FanOut, num_streams: int) -> dict[str, Any]:
    cost = fan.cost(num_streams or None)
    return {
        "bound_s": cost.bound_s,
        "bound_ratio": round(cost.bound_ratio, 6),
        "busiest_link": cost.busiest.name,
        "busiest_link_s": cost.busiest.seconds,
        "nvlink_s": fan.nvlink_s,
        "relayed_bytes": sum(fan.relayed_in.values()),
        "predicted_s": cost.predicted_s,
    }


def _busiest_shares(done: Planned, cost: Cost) -> tuple[list[RankPlan], float]:
    """Rank plans of the busiest sender and receiver, and the longer of the two times to make one."""
    plan = done.plan
    ranks = (
        max(range(plan.num_train), key=lambda rank: cost.sent[rank]),
        plan.num_train + max(range(plan.num_gen), key=lambda rank: cost.received[rank]),
    )
    shares, slowest_s = [], 0.0
    for rank in ranks:
        started = time.perf_counter()
        shares.append(plan.rank_plan(rank))
        slowest_s = max(slowest_s, time.perf_counter() - started)
    return shares, slowest_s


def _print(report: dict[str, Any], done: Planned, cost: Cost) -> None:
    plan, fabric = done.plan, done.topology
    show(
        f"{report['model']}: {report['num_train']} trainers -> {report['num_gen']} generators",
        ("what", "value"),
        [
            ("tensors", report["num_tensors"]),
            ("bulk", f"{amount(plan.bulk_bytes)} ({report['bulk_share']:.4%})"),
            ("misc", f"{amount(plan.misc_bytes)}, {len(plan.misc_names)} HF tensors"),
            ("routes", report["routes"]),
            ("trainer stages", report["num_stages"]),
            ("rounds, most of a stage", report["rounds_max"]),
            ("peak buffer of a rank", amount(report["peak_bytes_per_rank"])),
            ("planned and proven in", seconds(report["plan_s"])),
            ("one rank's share in", seconds(report["rank_plan_s"])),
            ("digest", report["digest"]),
        ],
    )
    for line in lines(_misc(plan)):
        print(line)
    show("bytes per rank", ("side", "ranks", "least", "most", "most / mean", "idle"), _sides(cost))
    _print_time(report, done, cost)
    if report["fan_out"] is not None:
        _print_fan_out(report["fan_out"], report["predicted_s"])
    print(
        "Assumes: line rate on every NIC, trainers and generators on different nodes, bulk only (no pause, no misc,"
        f" no finalize), {fabric.latency_s * 1e6:.0f} us per round, {fabric.op_s * 1e6:.0f} us per operation."
    )


def _print_time(report: dict[str, Any], done: Planned, cost: Cost) -> None:
    plan, fabric = done.plan, done.topology
    sender = max(range(plan.num_train), key=lambda rank: cost.sent[rank])
    show(
        f"time at {fabric.nic_bytes_per_s * 8 / 1e9:.0f} Gb/s x {fabric.nics_per_node} NICs"
        f" for {fabric.ranks_per_node} ranks a node",
        ("what", "seconds", "where"),
        [
            ("lower bound", seconds(cost.bound_s), cost.bound_link),
            ("busiest link", seconds(cost.busiest.seconds), cost.busiest.name),
            ("ratio to the bound", f"{cost.bound_ratio:.4f}", ""),
            ("predicted", seconds(cost.predicted_s), f"busiest sender is {rank_name(plan, sender)}"),
            (
                "predicted, 2 stages at a time",
                seconds(report["predicted_two_streams_s"]),
                "NRL_REFIT_NUM_STREAMS=2",
            ),
        ],
    )


def _print_fan_out(fan: dict[str, Any], direct_s: float) -> None:
    show(
        "with fan-out inside generator nodes (planned and proven; the executor moves direct plans only)",
        ("what", "value"),
        [
            ("lower bound", seconds(fan["bound_s"])),
            ("busiest NIC link", f"{seconds(fan['busiest_link_s'])}, {fan['busiest_link']}"),
            ("ratio to the bound", f"{fan['bound_ratio']:.4f}"),
            (
                "over NVLink",
                f"{amount(fan['relayed_bytes'])}, {seconds(fan['nvlink_s'])} on the busiest rank",
            ),
            ("predicted", f"{seconds(fan['predicted_s'])}, direct {seconds(direct_s)}"),
        ],
    )


def _sides(cost: Cost) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for side, loads in (("trainers send", cost.sent), ("generators receive", cost.received)):
        mean = sum(loads) / len(loads)
        ratio = f"{max(loads) / mean:.4f}" if mean else "-"
        rows.append((side, len(loads), amount(min(loads)), amount(max(loads)), ratio, loads.count(0)))
    return rows

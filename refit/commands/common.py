"""Arguments and steps that the commands share."""

import argparse
import math
import time
from dataclasses import dataclass, replace

from refit.plan import Plan, PlanOptions, build_plan
from refit.plan.cost import Topology, parse_topology
from refit.plan.fanout import FanOut, fan_out
from refit.plan.synth.config import load_model, shipped_models
from refit.plan.synth.gen import gen_manifest
from refit.plan.synth.parallel import parse_gen, parse_train
from refit.plan.synth.train import train_manifest

DEFAULTS = PlanOptions()


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, layouts, options."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME|DIR",
        help=f"a folder with config.json, or {', '.join(shipped_models())}",
    )
    parser.add_argument(
        "--train",
        required=True,
        metavar="LAYOUT",
        help='trainers: "tp=1,pp=16,ep=16,dp=1"; also etp, gtp, vpp, first, last, layers',
    )
    parser.add_argument(
        "--gen", required=True, metavar="LAYOUT", help='generators: "tp=32,replicas=8"; also pp, dp, ep=1'
    )
    parser.add_argument(
        "--bucket-bytes", type=int, default=DEFAULTS.bucket_bytes, help="most bytes a rank sends per round"
    )
    parser.add_argument(
        "--max-ops", type=int, default=DEFAULTS.max_ops_per_round, help="most operations of a rank per round"
    )
    parser.add_argument(
        "--topology",
        default="",
        metavar="FABRIC",
        help='"ranks_per_node=8,nics_per_node=8,nic_gbps=400,nvlink_gbps=3600,latency_us=20,op_us=4"',
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of tables")


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan from the command line, the fabric, and how long the steps took.

    `fan` is the fan-out inside generator nodes; None without a topology, or where no node wants a byte twice.
    """

    model: str
    plan: Plan
    topology: Topology
    fan: FanOut | None
    manifests_s: float
    plan_s: float


def planned(arguments: argparse.Namespace) -> Planned:
    """Read the arguments, make both manifests, plan. Raises PlanError and ConfigError with a remedy."""
    topology = parse_topology(arguments.topology)
    options = PlanOptions(arguments.bucket_bytes, arguments.max_ops)
    if arguments.topology:
        nodes = (topology.ranks_per_node, topology.nics_per_node)
        options = replace(options, ranks_per_node=nodes[0], nics_per_node=nodes[1])
    train_mesh, gen_mesh = parse_train(arguments.train), parse_gen(arguments.gen)
    started = time.perf_counter()
    model = load_model(arguments.model)
    train, gen = train_manifest(model, train_mesh), gen_manifest(model, gen_mesh)
    described = time.perf_counter()
    plan = build_plan(train, gen, options)
    done = time.perf_counter()
    fan = fan_out(plan, topology) if arguments.topology else None
    return Planned(model.name, plan, topology, fan, described - started, done - described)


def wait_seconds(text: str) -> float:
    """The type of an option that bounds a wait: seconds above 0 and finite."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no limit of a wait; give seconds above 0")
    return found


def count(text: str) -> int:
    """A whole number from 0 on, for argparse."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is below 0")
    return number


def rank_name(plan: Plan, rank: int) -> str:
    """A joint rank in words."""
    return f"train {rank}" if rank < plan.num_train else f"gen {rank - plan.num_train}"

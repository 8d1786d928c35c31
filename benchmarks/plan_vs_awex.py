"""Our planner and awex's own planner on the same models and layouts, in one run. Prints one JSON line.

    python benchmarks/plan_vs_awex.py            # the full cases, some minutes
    python benchmarks/plan_vs_awex.py --tiny     # seconds

awex (a dev dependency of this benchmark only) plans per rank and per HF tensor: every rank runs its planner over all
tensors, and nobody can start before the slowest has its plan.

* ours_s: `build_plan`, which plans and proves all ranks; ours_with_share_s adds `rank_plan` of one rank, which awex has
  no counterpart to (rounds and buckets);
* awex_s: its plan of all ranks, which is what `build_plan` makes, without a proof; once, tensor by tensor;
* awex_rank_s: `TransferPlanBuilder.build_local_transfer_plan` for the first train and the first generator rank.

`speedup` is awex_s / ours_s: both plan all ranks. `speedup_one_rank` sets the slower awex rank against our plan of
all ranks. Seconds are CPU seconds of this process, which has one thread: other work on the machine does not count.
awex starts from metadata by tensor, which this script derives outside the timing; ours starts from manifests by rank.

Balance: awex's send bytes come from its own plan of all ranks, run tensor by tensor.
"""

import argparse
import json
import logging
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from refit.plan import Manifest, Region, build_plan
from refit.plan.cost import Topology, cost_of
from refit.plan.sides import Layout, Side
from refit.plan.synth.config import model_from_config
from refit.plan.synth.gen import gen_manifest
from refit.plan.synth.parallel import parse_gen, parse_train
from refit.plan.synth.train import train_manifest


@dataclass(frozen=True, slots=True)
class Case:
    """A mixture-of-experts model of the Qwen3 form and a pair of layouts."""

    name: str
    num_layers: int
    num_experts: int
    train: str
    gen: str


FULL = (
    Case("64 ranks -> 8 engines of TP8", 64, 128, "tp=4,ep=16,etp=1,dp=4", "tp=8,replicas=8"),
    Case("64 ranks -> 3 engines of TP8", 64, 128, "tp=4,ep=16,etp=1,dp=4", "tp=8,replicas=3"),
)
TINY = (Case("8 ranks -> 3 engines of TP2", 2, 8, "tp=2,ep=4,etp=1,dp=2", "tp=2,replicas=3"),)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases and print one JSON line. Returns 0, or 2 when awex is not installed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tiny", action="store_true", help="a case of seconds")
    parser.add_argument("--repeat", type=int, default=3, help="runs per timing; the median counts")
    parser.add_argument("--without-awex", action="store_true", help="only our side")
    arguments = parser.parse_args(argv)
    if not arguments.without_awex:
        try:
            from awex.transfer import transfer_plan as awex_planner
        except ImportError as fault:
            print(f"awex is not importable ({fault}): pip install --no-deps awex", file=sys.stderr)
            return 2
        awex_planner.logger.level = logging.WARNING  # its logger prints to stdout, once per call
    cases = [run_case(case, arguments) for case in (TINY if arguments.tiny else FULL)]
    print(
        json.dumps({"benchmark": "plan_vs_awex", "commit": commit(), "hardware": hardware(), "cases": cases})
    )
    return 0


def run_case(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """One case through both planners."""
    train, gen, hf_tensors = manifests(case)
    timings, shares = [], []
    for _ in range(arguments.repeat):
        started = time.process_time()
        plan = build_plan(train, gen)
        timings.append(time.process_time() - started)
        plan.rank_plan(0)
        shares.append(time.process_time() - started)
    cost = cost_of(plan, Topology())
    result: dict[str, Any] = {
        "case": case.name,
        "num_hf_tensors": hf_tensors,
        "ours_s": statistics.median(timings),
        "ours_with_share_s": statistics.median(shares),
        "routes": plan.num_routes,
        "send_max_over_mean": {"ours": round(cost.send_max_over_mean, 4)},
        "idle_senders": {"ours": cost.idle_senders},
        "digest": plan.digest,
    }
    if not arguments.without_awex:
        result |= awex_side(case, train, gen, result, arguments.repeat)
    return result


def manifests(case: Case) -> tuple[Manifest, Manifest, int]:
    """Both sides of a case, and how many HF tensors it has."""
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": 4096,
        "num_hidden_layers": case.num_layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_experts": case.num_experts,
        "moe_intermediate_size": 1536,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    }
    model = model_from_config("synthetic", config)
    train = train_manifest(model, parse_train(case.train))
    gen = gen_manifest(model, parse_gen(case.gen))
    names = {spec.name: spec.shape for rank in train.ranks for spec in rank.tensors}
    return train, gen, sum(shape[0] if ".*." in name else 1 for name, shape in names.items())


def awex_side(
    case: Case, train: Manifest, gen: Manifest, ours: dict[str, Any], repeat: int
) -> dict[str, Any]:
    """The same case through awex: seconds of one rank, and the balance of its whole plan."""
    from awex.transfer.transfer_plan import TransferPlanBuilder

    engines = parse_gen(case.gen).replicas
    one_engine = Manifest("gen", tuple(rank for rank in gen.ranks if rank.replica == 0))
    train_meta, infer_meta = awex_meta(train), awex_meta(one_engine)
    builder = TransferPlanBuilder(len(gen.ranks), len(train.ranks), num_infer_engines=engines)
    seconds = {}
    for rank in (0, len(gen.ranks)):  # awex counts generators first
        timings = []
        for _ in range(repeat):
            started = time.process_time()
            builder.build_local_transfer_plan(infer_meta, train_meta, global_transfer_rank=rank)
            timings.append(time.process_time() - started)
        seconds["generator" if rank == 0 else "trainer"] = statistics.median(timings)
    sent = [0] * len(train.ranks)
    num_routes = 0
    started = time.process_time()
    for infer_one, train_one in zip(infer_meta, train_meta, strict=True):
        for op in builder.build_weights_mapping_operations([infer_one], [train_one]):
            num_routes += 1
            elements = 1
            for size in op.overlap_shape:
                elements *= size
            sent[op.send_rank - len(gen.ranks)] += 2 * elements
    all_ranks_s = time.process_time() - started
    one_rank_s = max(seconds.values())
    mean = sum(sent) / len(sent)
    return {
        "awex_s": all_ranks_s,
        "awex_rank_s": seconds,
        "awex_routes": num_routes,
        "speedup": round(all_ranks_s / ours["ours_s"], 1),
        "speedup_one_rank": round(one_rank_s / ours["ours_s"], 1),
        "speedup_one_rank_with_share": round(one_rank_s / ours["ours_with_share_s"], 1),
        "send_max_over_mean": ours["send_max_over_mean"] | {"awex": round(max(sent) / mean, 4)},
        "idle_senders": ours["idle_senders"] | {"awex": sent.count(0)},
    }


def awex_meta(manifest: Manifest) -> list[Any]:
    """A side as awex's ParameterMeta list: one entry per HF tensor, one replica per full copy, by name."""
    side = Side.of(manifest)
    found: dict[str, Any] = {}
    for name, layout in side.layouts.items():
        shape = side.specs[name].shape
        if ".*." not in name:
            found[name] = _parameter(name, shape, _copies(layout), len(manifest.ranks))
        else:
            for expert in range(shape[0]):
                hf_name = name.replace(".*.", f".{expert}.")
                found[hf_name] = _parameter(hf_name, shape[1:], _copies(layout, expert), len(manifest.ranks))
    return [found[name] for name in sorted(found)]


def _copies(layout: Layout, expert: int | None = None) -> list[list[tuple[Region, int]]]:
    """Shards (box, rank) of each full copy of a tensor; of one expert's slice if it is stacked."""
    holders: list[tuple[Region, tuple[int, ...]]] = []
    for entry in layout.entries:
        box = entry.box
        if expert is None:
            holders.append((box, entry.ranks))
        elif box.starts[0] <= expert < box.stops[0]:
            holders.append((Region(box.starts[1:], box.stops[1:]), entry.ranks))
    num_copies = min(len(ranks) for _, ranks in holders)
    return [[(box, ranks[copy]) for box, ranks in holders] for copy in range(num_copies)]


def _parameter(
    name: str, shape: tuple[int, ...], copies: list[list[tuple[Region, int]]], world_size: int
) -> Any:
    import torch
    from awex.meta.weight_meta import ParameterMeta, ParameterReplicaMeta, ParameterShardMeta

    def shard(box: Region, rank: int, num_shards: int) -> Any:
        return ParameterShardMeta(
            tp_rank=0,
            attn_tp_rank=0,
            pp_rank=0,
            ep_rank=0,
            ep_tp_rank=0,
            global_rank=rank,
            world_size=world_size,
            engine_rank=0,
            name=name,
            shape=box.shape,
            numel=box.num_elements,
            dtype=torch.bfloat16,
            global_offset=box.starts,
            num_shards=num_shards,
        )

    replicas = [
        ParameterReplicaMeta(shards=[shard(box, rank, len(copy)) for box, rank in copy]) for copy in copies
    ]
    elements = Region.whole(shape).num_elements
    every = [one for replica in replicas for one in replica.shards]
    return ParameterMeta(name, elements, shape, torch.bfloat16, every, replicas)


def commit() -> str:
    """Short commit of the working tree, or "unknown"."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def hardware() -> str:
    """What this ran on, in words."""
    return f"{platform.machine()} {platform.system()}, one process, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())

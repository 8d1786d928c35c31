"""Bytes between real processes over gloo: our paths, the raw limit, the peers. Prints one JSON line.

    python -m benchmarks.transfer                 # 2+2 and 4+4 processes, 1 GiB and more: minutes, 14 GiB of RAM
    python -m benchmarks.transfer --tiny          # seconds
    python -m benchmarks.transfer --without-mcore # where megatron-core is not installed
    python -m benchmarks.transfer --only-ours     # raw and p2p, without golden and the peers

Per case, in every repeat, in turn:

* `raw` sends the bytes of the plan between the same pairs from flat buffers and does nothing else: the limit;
* `p2p` moves the model; `p2p_digest` is the same with digests on both ends, and `digest_s` the difference;
* `golden` is our oracle: gather, broadcast, slice, tensor by tensor;
* `gather_broadcast` gathers full tensors on trainer 0 and broadcasts them packed, as a conventional refit does;
* `mcore` is Megatron-Core's resharding with its gloo service: the same model, from the trainers' layout to the Megatron
  layout that has the generators' parallel sizes. Dense cases only: `mcore_s` is null where the trainers cut experts.

Seconds are those of the slowest rank, medians over the repeats (peers: PEER_REPEATS of them). `*_cpu_s` are processor
seconds of all threads of all ranks, sums over ranks of medians: with fewer cores than ranks they bound what a path can
reach, and other work on the machine blurs them less.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.gather_broadcast import GatherBroadcast
from benchmarks.ranks import CPU, TIMEOUT_S, Mover, run_ranks
from refit.plan import Manifest, PlanOptions, build_plan
from refit.plan.synth.config import model_from_config
from refit.plan.synth.gen import gen_manifest
from refit.plan.synth.parallel import parse_gen, parse_train
from refit.plan.synth.train import train_manifest
from refit.transfer import bulk, golden
from refit.transfer.compiled import CompiledRound, compile_stage
from refit.transfer.groups import Groups, open_group, open_groups
from refit.transfer.memory import torch_dtype
from refit.transfer.protocol import AUTO, PROCESS_GROUP, TCP
from refit.transfer.rendezvous import ControlStore
from refit.transfer.report import BulkReport
from refit.transfer.transports.seam import Parcel

RAW_PIECE_BYTES = 256 << 20  # of one operation; smaller ones are slower, and a limit must not be
PEER_REPEATS = 1
OURS = ("raw", "p2p", "p2p_digest")
PEERS = ("golden", "gather_broadcast")
MCORE = "mcore"
PRELOADED = ("torch.distributed", "refit.transfer.endpoint", "benchmarks.gather_broadcast")
PRELOADED_MCORE = (
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.resharding.refit",
    "benchmarks.megatron_peer",
)


@dataclass(frozen=True, slots=True)
class Case:
    """A model and two layouts."""

    name: str
    config: dict[str, object]
    train: str
    gen: str
    bucket_bytes: int
    transport: str = AUTO


def dense(layers: int, hidden: int, vocab: int) -> dict[str, object]:
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(4, hidden // 128),
        "num_key_value_heads": 4,
        "head_dim": max(16, hidden // max(4, hidden // 128)),
        "intermediate_size": 3 * hidden,
        "tie_word_embeddings": False,
        "vocab_size": vocab,
    }


def moe(layers: int, hidden: int, experts: int, vocab: int) -> dict[str, object]:
    return dense(layers, hidden, vocab) | {
        "model_type": "qwen3_moe",
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": hidden // 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }


CASES = (
    Case("small_tensors_2x2", dense(940, 64, 1024), "tp=2", "tp=2", 8 << 20),
    Case("dense_2x2", dense(10, 2048, 32768), "pp=2", "tp=2", 32 << 20),
    Case("moe_2x2", moe(12, 1024, 28, 32768), "ep=2", "tp=2", 32 << 20),
    Case("dense_4x4", dense(10, 2048, 32768), "tp=2,pp=2", "tp=4", 32 << 20),
    Case("moe_4x4", moe(6, 1024, 28, 32768), "ep=4", "tp=2,replicas=2", 32 << 20),
)
TINY = (
    Case("dense_2x2", dense(2, 128, 512), "pp=2", "tp=2", 1 << 16),
    Case("moe_2x2", moe(2, 64, 4, 512), "ep=2", "tp=2", 1 << 16),
)


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Run the cases, print the line and return it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-mcore", action="store_true")
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--cases", nargs="*", help="names of cases to run (default: all)")
    parser.add_argument("--transport", choices=(AUTO, PROCESS_GROUP, TCP), default=AUTO, help="of p2p")
    options = parser.parse_args(argv)
    cases = TINY if options.tiny else CASES
    cases = tuple(replace(case, transport=options.transport) for case in cases)
    if options.cases:
        cases = tuple(case for case in cases if case.name in options.cases)
    peers = () if options.only_ours else PEERS if options.without_mcore else (*PEERS, MCORE)
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        [*PRELOADED, *(PRELOADED_MCORE if MCORE in peers else ())]
    )
    rows = []
    for case in cases:
        rows.append(run_case(case, options.repeats, peers))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    line: dict[str, object] = {
        "benchmark": "transfer",
        "commit": commit(),
        "hardware": hardware(),
        "repeats": options.repeats,
        "peer_repeats": min(PEER_REPEATS, options.repeats),
        "cases": rows,
    }
    print(json.dumps(line))
    return line


def manifests(case: Case) -> tuple[Manifest, Manifest, PlanOptions]:
    model = model_from_config(case.name, case.config)
    train = train_manifest(model, parse_train(case.train))
    return train, gen_manifest(model, parse_gen(case.gen)), PlanOptions(case.bucket_bytes)


def run_case(case: Case, repeats: int, peers: Sequence[str]) -> dict[str, object]:
    """Start the ranks, collect their rows, take the slowest rank per repeat and the median over repeats."""
    train, gen, _ = manifests(case)
    if "ep=" in case.train:
        # megatron-core 0.19 finds experts under another expert parallel size only by Transformer Engine's grouped names
        peers = [path for path in peers if path != MCORE]
    num_ranks = len(train.ranks) + len(gen.ranks)
    found = run_ranks(case.name, num_ranks, rank_main, case, repeats, peers)
    return case_row(case, [row for row in found if isinstance(row, dict)])


def case_row(case: Case, rows: Sequence[dict[str, dict[str, list[float]]]]) -> dict[str, object]:
    first = rows[0]["facts"]
    paths = list(rows[0]["seconds"])
    slowest = {
        path: [max(times) for times in zip(*(row["seconds"][path] for row in rows), strict=True)]
        for path in paths
    }
    median = {path: statistics.median(values) for path, values in slowest.items()}
    p2p = median["p2p"]
    cpu = {path: sum(statistics.median(row["cpu_seconds"][path]) for row in rows) for path in OURS}
    return {
        "name": case.name,
        "train": case.train,
        "gen": case.gen,
        "bytes": sum(row["facts"]["bytes_sent"] for row in rows),
        "routes": first["routes"],
        "plan_digest": first["digest"],
        "bucket_bytes": case.bucket_bytes,
        "transport": case.transport,
        "mcore_s": None,
        **{f"{path}_s": round(value, 4) for path, value in median.items()},
        "digest_s": round(median["p2p_digest"] - p2p, 4),
        "p2p_over_raw": round(p2p / median["raw"], 3),
        "p2p_digest_over_raw": round(median["p2p_digest"] / median["raw"], 3),
        "p2p_best_over_raw_best": round(min(slowest["p2p"]) / min(slowest["raw"]), 3),
        **{f"{path}_over_p2p": round(median[path] / p2p, 2) for path in paths if path not in OURS},
        **{f"{path}_cpu_s": round(value, 4) for path, value in cpu.items()},
        "p2p_cpu_over_raw": round(cpu["p2p"] / cpu["raw"], 3),
        "mcore_bytes": sum(row["facts"]["mcore_bytes"] for row in rows),
        "p2p_phases_s": rows[-1]["facts"]["phases"],
        "extra_rss_bytes": max(row["facts"]["extra_rss_bytes"] for row in rows),
    }


def rank_main(rank: int, port: int, case: Case, repeats: int, peers: Sequence[str]) -> None:
    """One rank: open groups, then every path in turn."""
    torch.set_num_threads(1)
    control = ControlStore.join("127.0.0.1", port, case.name)
    bench = Bench(control, rank, case, MCORE in peers)
    seconds: dict[str, list[float]] = {path: [] for path in (*OURS, *peers)}
    cpu_seconds: dict[str, list[float]] = {path: [] for path in seconds}
    warm = [
        path for path in (*OURS, MCORE) if path in seconds
    ]  # mcore plans in its first call, and keeps the plan
    for repeat in range(-1, repeats):
        for path in warm if repeat < 0 else OURS if repeat >= PEER_REPEATS else seconds:
            cpu_before = time.process_time()
            took = bench.timed(path)
            if repeat >= 0:
                seconds[path].append(took)
                cpu_seconds[path].append(time.process_time() - cpu_before)
    control.put(f"row/{rank}", {"seconds": seconds, "cpu_seconds": cpu_seconds, "facts": bench.facts()})
    bench.barrier()


class Bench:
    """What one rank holds: its params, its groups, flat buffers for the raw path, Megatron's model."""

    def __init__(self, control: ControlStore, rank: int, case: Case, with_mcore: bool) -> None:
        train, gen, options = manifests(case)
        self.plan = build_plan(train, gen, options)
        self.rank, self.bucket_bytes = rank, case.bucket_bytes
        manifest = (*train.ranks, *gen.ranks)[rank]
        self.groups: Groups = open_groups(control, rank, self.plan, "gloo", TIMEOUT_S, case.transport)
        everyone = tuple(range(self.plan.num_train + self.plan.num_gen))
        deadline = time.monotonic() + TIMEOUT_S
        self.all = open_group(control, "everyone", everyone, rank, "gloo", deadline)
        # all ones, because replicas must agree (golden checks)
        self.params = {
            spec.name: torch.ones(spec.shape, dtype=torch_dtype(spec.dtype)) for spec in manifest.params
        }
        dtypes = {spec.name: spec.dtype for spec in manifest.params}
        stages = self.plan.rank_plan(rank).stages
        self.stages = [
            compile_stage(
                self.plan,
                stage,
                rank,
                dtypes,
                CPU,
                gathers=self.groups.stages[stage.stage].transport.gathers,
            )
            for stage in stages
        ]
        self.mover = Mover(self.plan, rank, self.params, self.groups)
        self.gather = GatherBroadcast(self.plan, manifest, self.params, self.all, self.groups.misc)
        self.report = BulkReport()
        self.extra_rss_bytes = 0
        pairs = [pair_bytes(stage.rounds) for stage in self.stages]
        sizes = {peer: n for sends, receives in pairs for peer, n in (sends | receives).items()}
        self.flat = {peer: torch.ones(num_bytes, dtype=torch.uint8) for peer, num_bytes in sizes.items()}
        self.mcore = None
        if with_mcore:
            from benchmarks.megatron_peer import MegatronPeer

            self.mcore = MegatronPeer.of_case(case.config, case.train, case.gen, rank, len(everyone), control)

    def facts(self) -> dict[str, object]:
        return {
            "routes": self.plan.num_routes,
            "digest": self.plan.digest,
            "bytes_sent": self.report.bytes_sent,
            "phases": {phase: round(value, 4) for phase, value in self.report.seconds.items()},
            "extra_rss_bytes": self.extra_rss_bytes,
            "mcore_bytes": 0 if self.mcore is None else self.mcore.received_bytes,
        }

    def barrier(self) -> None:
        process_group = self.all.process_group
        assert process_group is not None, "the group of everyone has a process group"
        process_group.barrier().wait()

    def timed(self, path: str) -> float:
        deadline = time.monotonic() + TIMEOUT_S
        runs: dict[str, Callable[[], object]] = {
            "raw": lambda: self.raw(deadline),
            "p2p": lambda: self.mover.move(self.stages, bulk.move_stage),
            "p2p_digest": lambda: self.mover.move(self.stages, bulk.move_stage, with_digests=True),
            "golden": lambda: self.mover.move(self.stages, golden.move_stage),
            "gather_broadcast": lambda: self.gather.run(self.bucket_bytes, deadline),
        }
        if self.mcore is not None:
            runs[MCORE] = self.mcore.reshard
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = memory_bytes("VmRSS")
        self.barrier()
        began = time.perf_counter()
        result = runs[path]()
        took = time.perf_counter() - began
        if path == "p2p" and isinstance(result, BulkReport):
            self.report = result
            self.extra_rss_bytes = max(self.extra_rss_bytes, memory_bytes("VmHWM") - before)
        return took

    def raw(self, deadline: float) -> None:
        """The same bytes between the same pairs by gloo, from and into flat buffers, all posted before any wait."""
        waiting = []
        for stage in self.stages:
            group = self.groups.stages[stage.stage]
            transport = group.collectives or group.transport
            sends, receives = pair_bytes(stage.rounds)
            for tag in range(max([0, *(-(-n // RAW_PIECE_BYTES) for n in (sends | receives).values())])):
                out = [Parcel(peer, part) for peer, part in self._parts(sends, tag)]
                into = [Parcel(peer, part) for peer, part in self._parts(receives, tag)]
                waiting.append((transport, transport.post(out, into, tag)))
        for transport, ticket in waiting:
            transport.wait(ticket, deadline)

    def _parts(self, pairs: dict[int, int], tag: int) -> Iterator[tuple[int, torch.Tensor]]:
        for peer, num_bytes in sorted(pairs.items()):
            part = self.flat[peer][tag * RAW_PIECE_BYTES : min(num_bytes, (tag + 1) * RAW_PIECE_BYTES)]
            if part.numel():
                yield peer, part


def pair_bytes(rounds: Sequence[CompiledRound]) -> tuple[dict[int, int], dict[int, int]]:
    """Bytes to and from each peer over all rounds."""
    sends: dict[int, int] = {}
    receives: dict[int, int] = {}
    for round_ in rounds:
        for parcel in round_.sends:
            sends[parcel.peer] = sends.get(parcel.peer, 0) + parcel.num_bytes
        for parcel in round_.receives:
            receives[parcel.peer] = receives.get(parcel.peer, 0) + parcel.num_bytes
    return sends, receives


def memory_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()


def hardware() -> dict[str, object]:
    return {
        "machine": platform.machine(),
        "num_cores": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 1),
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

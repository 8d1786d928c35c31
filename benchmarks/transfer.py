"""Bytes between real processes over gloo: our paths, the raw limit, the conventional path. Prints one JSON line.

    python benchmarks/transfer.py                 # 2+2 and 4+4 processes, 1 GiB and more: minutes, 12 GiB of RAM
    python benchmarks/transfer.py --tiny          # seconds

Per case, in every repeat, in turn: `raw` sends the bytes of the plan between the same pairs from flat buffers and does
nothing else (the limit); `p2p` and `golden` move the model; `gather_broadcast` gathers full tensors on trainer 0 and
broadcasts them packed, as a conventional refit does. `p2p_digest` is p2p with digests on both ends. Seconds are those
of the slowest rank, medians over the repeats.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from refit.plan import Manifest, Plan, PlanOptions, RankManifest, Region, TensorSpec, build_plan
from refit.plan.synth.config import model_from_config
from refit.plan.synth.gen import gen_manifest
from refit.plan.synth.parallel import parse_gen, parse_train
from refit.plan.synth.train import train_manifest
from refit.transfer import bulk, golden
from refit.transfer.broadcast import receive_packed, send_packed
from refit.transfer.bulk import StageJob
from refit.transfer.compiled import compile_stage
from refit.transfer.groups import Groups, open_group, open_groups
from refit.transfer.lanes import run_lanes
from refit.transfer.memory import copy_cast, strided_box, torch_dtype
from refit.transfer.rendezvous import ControlStore
from refit.transfer.report import BulkReport
from refit.transfer.transport import Parcel

CPU = torch.device("cpu")
TIMEOUT_S = 300.0
PATHS = ("raw", "p2p", "p2p_digest", "golden", "gather_broadcast")


@dataclass(frozen=True, slots=True)
class Case:
    """A model and two layouts."""

    name: str
    config: dict[str, object]
    train: str
    gen: str
    bucket_bytes: int


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
    Case("dense_2x2", dense(11, 2048, 32768), "pp=2", "tp=2", 32 << 20),
    Case("moe_2x2", moe(12, 1024, 28, 32768), "ep=2", "tp=2", 32 << 20),
    Case("dense_4x4", dense(11, 2048, 32768), "tp=2,pp=2", "tp=4", 32 << 20),
    Case("moe_4x4", moe(12, 1024, 28, 32768), "ep=4", "tp=2,replicas=2", 32 << 20),
    Case("small_tensors_2x2", dense(940, 64, 1024), "tp=2", "tp=2", 8 << 20),
)
TINY = (
    Case("dense_2x2", dense(2, 128, 512), "pp=2", "tp=2", 1 << 16),
    Case("moe_2x2", moe(2, 64, 4, 512), "ep=2", "tp=2", 1 << 16),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="*", help="names of cases to run (default: all)")
    options = parser.parse_args(argv)
    cases = TINY if options.tiny else CASES
    if options.cases:
        cases = tuple(case for case in cases if case.name in options.cases)
    rows = []
    for case in cases:
        rows.append(run_case(case, options.repeats))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    line = {
        "benchmark": "transfer",
        "commit": commit(),
        "hardware": hardware(),
        "repeats": options.repeats,
        "cases": rows,
    }
    print(json.dumps(line))
    return 0


def manifests(case: Case) -> tuple[Manifest, Manifest, PlanOptions]:
    model = model_from_config(case.name, case.config)
    train = train_manifest(model, parse_train(case.train))
    return train, gen_manifest(model, parse_gen(case.gen)), PlanOptions(case.bucket_bytes)


def run_case(case: Case, repeats: int) -> dict[str, object]:
    """Start the ranks, collect their rows, take the slowest rank per repeat and the median over repeats."""
    train, gen, _ = manifests(case)
    num_ranks = len(train.ranks) + len(gen.ranks)
    host = ControlStore.host(run_id=case.name)
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=rank_main, args=(rank, host.port, case, repeats), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        found = [host.get(f"row/{rank}", TIMEOUT_S * 4) for rank in range(num_ranks)]
    finally:
        for process in processes:
            process.join(10)
            process.kill()
        host.close()
    rows = [row for row in found if isinstance(row, dict)]
    return case_row(case, rows, repeats)


def case_row(case: Case, rows: Sequence[dict[str, object]], repeats: int) -> dict[str, object]:
    seconds = {
        path: [max(row["seconds"][path][i] for row in rows) for i in range(repeats)]  # type: ignore[index]
        for path in PATHS
    }
    median = {path: statistics.median(values) for path, values in seconds.items()}
    return {
        "name": case.name,
        "train": case.train,
        "gen": case.gen,
        "bytes": sum(row["bytes_sent"] for row in rows),  # type: ignore[misc]
        "routes": rows[0]["routes"],
        "plan_digest": rows[0]["digest"],
        "bucket_bytes": case.bucket_bytes,
        **{f"{path}_s": round(value, 4) for path, value in median.items()},
        "p2p_best_s": round(min(seconds["p2p"]), 4),
        "raw_best_s": round(min(seconds["raw"]), 4),
        "p2p_over_raw": round(median["p2p"] / median["raw"], 3),
        "golden_over_p2p": round(median["golden"] / median["p2p"], 2),
        "gather_broadcast_over_p2p": round(median["gather_broadcast"] / median["p2p"], 2),
        "p2p_phases_s": rows[-1]["phases"],
        "extra_rss_bytes": max(row["extra_rss_bytes"] for row in rows),  # type: ignore[type-var]
    }


def rank_main(rank: int, port: int, case: Case, repeats: int) -> None:
    """One rank: open groups, then every path in turn."""
    torch.set_num_threads(1)
    control = ControlStore.join("127.0.0.1", port, case.name)
    train, gen, options = manifests(case)
    plan = build_plan(train, gen, options)
    manifest = train.ranks[rank] if rank < plan.num_train else gen.ranks[rank - plan.num_train]
    bench = Bench(control, rank, plan, manifest, case.bucket_bytes)
    seconds: dict[str, list[float]] = {path: [] for path in PATHS}
    for repeat in range(-1, repeats):  # one round to warm up
        for path in PATHS:
            took = bench.timed(path)
            if repeat >= 0:
                seconds[path].append(took)
    row = {
        "seconds": seconds,
        "routes": plan.num_routes,
        "digest": plan.digest,
        "bytes_sent": bench.report.bytes_sent,
        "phases": {phase: round(value, 4) for phase, value in bench.report.seconds.items()},
        "extra_rss_bytes": bench.extra_rss_bytes,
    }
    control.put(f"row/{rank}", row)
    bench.barrier()


class Bench:
    """What one rank holds: its params, its groups, flat buffers for the raw path."""

    def __init__(
        self, control: ControlStore, rank: int, plan: Plan, manifest: RankManifest, bucket_bytes: int
    ) -> None:
        self.rank, self.plan, self.manifest, self.bucket_bytes = rank, plan, manifest, bucket_bytes
        self.groups: Groups = open_groups(control, rank, plan, "gloo", TIMEOUT_S)
        everyone = tuple(range(plan.num_train + plan.num_gen))
        deadline = time.monotonic() + TIMEOUT_S
        self.all = open_group(control, "everyone", everyone, rank, "gloo", deadline)
        self.params = {
            spec.name: torch.ones(
                spec.shape, dtype=torch_dtype(spec.dtype)
            )  # replicas must agree (golden checks)
            for spec in manifest.params
        }
        stages = plan.rank_plan(rank).stages
        self.stages = [compile_stage(plan, stage, CPU) for stage in stages]
        self.report = BulkReport()
        self.extra_rss_bytes = 0
        pairs = [pair_bytes(stage.rounds) for stage in self.stages]
        sizes = {peer: n for sends, receives in pairs for peer, n in (sends | receives).items()}
        self.flat = {peer: torch.ones(num_bytes, dtype=torch.uint8) for peer, num_bytes in sizes.items()}

    def barrier(self) -> None:
        process_group = self.all.process_group
        assert process_group is not None, "the group of everyone has a process group"
        process_group.barrier().wait()

    def timed(self, path: str) -> float:
        run = {
            "raw": self.raw,
            "p2p": self.p2p,
            "p2p_digest": lambda: self.move(bulk.move_stage, with_digests=True),
            "golden": lambda: self.move(golden.move_stage),
            "gather_broadcast": self.gather_broadcast,
        }[path]
        self.barrier()
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    def p2p(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = memory_bytes("VmRSS")
        self.report = self.move(bulk.move_stage)
        self.extra_rss_bytes = max(self.extra_rss_bytes, memory_bytes("VmHWM") - before)

    def move(self, mover, with_digests: bool = False) -> BulkReport:  # noqa: ANN001
        deadline = time.monotonic() + TIMEOUT_S
        jobs = [
            StageJob(
                self.plan,
                stage,
                self.rank,
                self.params,
                self.groups.stages[stage.stage],
                deadline,
                CPU,
                with_digests,
            )
            for stage in self.stages
        ]
        return run_lanes(jobs, mover, 2, lambda _: self.groups.abort())

    def raw(self) -> None:
        """The same bytes between the same pairs, in pieces of at most a bucket, from and into flat buffers."""
        deadline = time.monotonic() + TIMEOUT_S
        for stage in self.stages:
            transport = self.groups.stages[stage.stage].transport
            sends, receives = pair_bytes(stage.rounds)
            tickets = []
            for tag in range(max([0, *(-(-n // self.bucket_bytes) for n in (sends | receives).values())])):
                out = [Parcel(peer, part) for peer, part in self._parts(sends, tag)]
                into = [Parcel(peer, part) for peer, part in self._parts(receives, tag)]
                tickets.append(transport.post(out, into, tag))
            for ticket in tickets:
                transport.wait(ticket, deadline)

    def _parts(self, pairs: dict[int, int], tag: int) -> Iterator[tuple[int, torch.Tensor]]:
        for peer, num_bytes in sorted(pairs.items()):
            part = self.flat[peer][tag * self.bucket_bytes : min(num_bytes, (tag + 1) * self.bucket_bytes)]
            if part.numel():
                yield peer, part

    def gather_broadcast(self) -> None:
        """Full tensors gathered on trainer 0, broadcast packed to the generators, sliced there."""
        deadline = time.monotonic() + TIMEOUT_S
        specs = {
            tensor.name: TensorSpec(tensor.name, tensor.shape, tensor.dtype)
            for tensor in self.plan.tensors.values()
        }
        chunk_bytes = self.bucket_bytes
        if self.rank < self.plan.num_train:
            tensors = self._gathered(deadline)
            if self.rank == 0:
                assert self.groups.misc is not None, "trainer 0 is in the misc group"
                send_packed(tensors, self.groups.misc, specs, chunk_bytes, deadline, CPU)
            else:
                for _ in tensors:
                    pass
            return
        assert self.groups.misc is not None, "generators are in the misc group"
        mine: dict[str, list] = {}
        for holding in self.manifest.holdings:
            mine.setdefault(holding.tensor, []).append(holding)
        for name, full in receive_packed(self.groups.misc, specs, chunk_bytes, deadline, CPU):
            for holding in mine.get(name, []):
                copy_cast(self._box(holding), golden.cut(full, holding.region))

    def _gathered(self, deadline: float) -> Iterator[tuple[str, torch.Tensor]]:
        for number, tensor in enumerate(self.plan.tensors.values()):
            full = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype)) if self.rank == 0 else None
            covered: list[Region] = []
            for rank in self.plan.train.manifest.ranks:
                for holding in rank.holdings:
                    if holding.tensor == tensor.name and holding.region not in covered:
                        covered.append(holding.region)
                        self._bring(full, holding, rank.rank, number, deadline)
            if full is not None:
                yield tensor.name, full
            else:
                yield tensor.name, torch.empty(0)

    def _bring(self, full, holding, holder: int, tag: int, deadline: float) -> None:  # noqa: ANN001
        """One holding to trainer 0."""
        if self.rank not in (0, holder):
            return
        dtype = torch_dtype(self.plan.tensors[holding.tensor].dtype)
        if holder == 0:
            if full is not None:
                copy_cast(golden.cut(full, holding.region), self._box(holding))
            return
        packed = torch.empty(holding.region.shape, dtype=dtype)
        payload = packed.view(-1).view(torch.uint8)
        if self.rank == holder:
            copy_cast(packed, self._box(holding))
            ticket = self.all.transport.post([Parcel(0, payload)], [], tag)
        else:
            ticket = self.all.transport.post([], [Parcel(holder, payload)], tag)
        self.all.transport.wait(ticket, deadline)
        if full is not None:
            copy_cast(golden.cut(full, holding.region), packed)

    def _box(self, holding) -> torch.Tensor:  # noqa: ANN001
        return strided_box(self.params[holding.param], holding.region.shape, holding.strides, holding.offset)


def pair_bytes(rounds) -> tuple[dict[int, int], dict[int, int]]:  # noqa: ANN001
    """Bytes to and from each peer over all rounds."""
    sends: dict[int, int] = {}
    receives: dict[int, int] = {}
    for round_ in rounds:
        for bucket in round_.sends:
            sends[bucket.peer] = sends.get(bucket.peer, 0) + bucket.num_bytes
        for bucket in round_.receives:
            receives[bucket.peer] = receives.get(bucket.peer, 0) + bucket.num_bytes
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
    sys.exit(main())

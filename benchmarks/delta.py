"""Delta refits against full ones between real processes, over shares of changed elements. Prints one JSON line.

    python -m benchmarks.delta            # 2 trainers (PP2), 2 generators (TP2), 0.5 GiB: a minute, 4 GiB of RAM
    python -m benchmarks.delta --tiny     # seconds

Per share and repeat, in turn, the same model moves in full (`bulk.move_stage`, as it is tuned) and as a delta against
the move before, both without digests. Seconds are those of the slowest rank, medians over the repeats; loopback is
faster than a network, so what a delta costs shows and what it saves does not. `*_own_s` are the seconds of packing,
comparing, changing, unpacking and keeping, those of the slowest trainer and of the slowest generator added up as if
nothing of it overlapped. `break_even_gbps` is the rate of a rank's link below which a delta is faster: bytes that the
busiest trainer does not send, over what `delta_own_s` is longer than `full_own_s`. None where it is no longer, 0 where
no byte is saved. `*_cpu_s` and `break_even_cpu_gbps` are the same of processor seconds, those of the transport
included: with fewer cores than ranks, or beside other work, these are the better guide.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.ranks import CPU, TIMEOUT_S, Mover, run_ranks
from benchmarks.transfer import Case, commit, dense, hardware, manifests
from refit.plan import build_plan
from refit.transfer import bulk
from refit.transfer.compiled import CompiledStage, compile_stage
from refit.transfer.delta.base import Base, token_of
from refit.transfer.delta.mover import DeltaMove
from refit.transfer.groups import open_group, open_groups
from refit.transfer.memory import as_bits, torch_dtype
from refit.transfer.rendezvous import ControlStore
from refit.transfer.report import PACK, UNPACK

SHARES = (0.001, 0.01, 0.1, 1.0)
FULL, DELTA = "full", "delta"
NORMAL = Case("dense_2x2", dense(4, 2048, 16384), "pp=2", "tp=2", 32 << 20)
TINY = Case("dense_2x2", dense(2, 128, 512), "pp=2", "tp=2", 1 << 16)


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Run all shares, print the line and return it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    case = TINY if options.tiny else NORMAL
    before = hardware()
    multiprocessing.get_context("forkserver").set_forkserver_preload(["refit.transfer.endpoint"])
    train, gen, _ = manifests(case)
    num_ranks = len(train.ranks) + len(gen.ranks)
    rows = run_ranks(case.name, num_ranks, rank_main, case, options.repeats)
    line: dict[str, object] = {
        "benchmark": "delta",
        "commit": commit(),
        "hardware": before,
        "repeats": options.repeats,
        "train": case.train,
        "gen": case.gen,
        "plan_digest": rows[0]["plan_digest"],
        "base_bytes": max(row["base_bytes"] for row in rows),
        "shares": [share_row(share, rows) for share in SHARES],
    }
    print(json.dumps(line))
    return line


def share_row(share: float, rows: Sequence[dict]) -> dict[str, object]:
    """One share of changed elements, over all ranks."""
    found = [row["shares"][str(share)] for row in rows]
    seconds = {way: _median_of_slowest([row[way]["seconds"] for row in found]) for way in (FULL, DELTA)}
    own = {
        way: sum(_median_of_slowest([row[way][phase] for row in found]) for phase in (PACK, UNPACK, "keep"))
        for way in (FULL, DELTA)
    }
    cpu = {way: _busiest([row[way]["cpu"] for row in found]) for way in (FULL, DELTA)}
    wire = {way: [row[way]["wire_bytes"] for row in found] for way in (FULL, DELTA)}
    saved = max(wire[FULL]) - max(wire[DELTA])
    return {
        "share": share,
        "full_s": round(seconds[FULL], 4),
        "delta_s": round(seconds[DELTA], 4),
        "full_cpu_s": round(cpu[FULL], 4),
        "delta_cpu_s": round(cpu[DELTA], 4),
        "full_own_s": round(own[FULL], 4),
        "delta_own_s": round(own[DELTA], 4),
        "full_bytes": sum(wire[FULL]),
        "delta_bytes": sum(wire[DELTA]),
        "delta_share": round(sum(wire[DELTA]) / sum(wire[FULL]), 5),
        "break_even_gbps": _break_even(saved, own[DELTA] - own[FULL]),
        "break_even_cpu_gbps": _break_even(saved, cpu[DELTA] - cpu[FULL]),
    }


def _break_even(saved_bytes: int, more_s: float) -> float | None:
    return round(8e-9 * max(0, saved_bytes) / more_s, 2) if more_s > 0 else None


def _busiest(times: Sequence[Sequence[float]]) -> float:
    """The medians of the busiest trainer and of the busiest generator, added up; half of the ranks are trainers."""
    medians = [statistics.median(repeats) for repeats in times]
    return max(medians[: len(medians) // 2]) + max(medians[len(medians) // 2 :])


def _median_of_slowest(times: Sequence[Sequence[float]]) -> float:
    return statistics.median(max(repeat) for repeat in zip(*times, strict=True))


@dataclass
class Rank:
    """One process: its params and their base, and the stages compiled for both ways."""

    control: ControlStore
    rank: int
    case: Case

    def __post_init__(self) -> None:
        train, gen, options = manifests(self.case)
        self.plan = build_plan(train, gen, options)
        manifest = (*train.ranks, *gen.ranks)[self.rank]
        self.is_trainer = self.rank < self.plan.num_train
        self.groups = open_groups(self.control, self.rank, self.plan, "gloo", TIMEOUT_S)
        everyone = tuple(range(self.plan.num_train + self.plan.num_gen))
        self.all = open_group(
            self.control, "everyone", everyone, self.rank, "gloo", time.monotonic() + TIMEOUT_S
        )
        self.params = {
            spec.name: torch.ones(spec.shape, dtype=torch_dtype(spec.dtype)) for spec in manifest.params
        }
        self.base = Base()
        self.base.fit(manifest, self.plan)
        dtypes = {spec.name: spec.dtype for spec in manifest.params}
        self.stages: dict[str, list[CompiledStage]] = {}
        for way in (FULL, DELTA):
            self.stages[way] = [
                compile_stage(
                    self.plan,
                    stage,
                    self.rank,
                    dtypes,
                    CPU,
                    gathers=way == FULL and self.groups.stages[stage.stage].transport.gathers,
                )
                for stage in self.plan.rank_plan(self.rank).stages
            ]
        self.mover = Mover(self.plan, self.rank, self.params, self.groups)
        self.version = 0

    def barrier(self) -> None:
        process_group = self.all.process_group
        assert process_group is not None, "the group of everyone has a process group"
        process_group.barrier().wait()

    def change(self, share: float) -> None:
        """As a step of training: flip the lowest bit of a random share of the elements."""
        if not self.is_trainer:
            return
        generator = torch.Generator().manual_seed(1000 * self.version + self.rank)
        for param in self.params.values():
            bits = as_bits(param)
            bits ^= (torch.rand(param.shape, generator=generator) < share).to(bits.dtype)

    def measured(self, way: str) -> dict[str, float]:
        """Seconds and bytes of one move; that of a delta ends with what is kept for the next."""
        self.version += 1
        self.barrier()
        began, cpu_before = time.perf_counter(), time.process_time()
        if way == FULL:
            report, keep_s = self.mover.move(self.stages[FULL], bulk.move_stage), 0.0
        else:
            move = DeltaMove(self.base, self.base.begin(self.params))
            report = self.mover.move(self.stages[DELTA], move.move_stage)
            moved = time.perf_counter()
            self.base.end(self.params, token_of("benchmark", self.version, 0))
            self.base.committed()
            keep_s = time.perf_counter() - moved
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_before
        phases = {phase: report.seconds[phase] for phase in (PACK, UNPACK)}
        return {
            "seconds": seconds,
            "cpu": cpu_s,
            **phases,
            "keep": keep_s,
            "wire_bytes": report.wire_bytes_sent,
        }


def rank_main(rank: int, port: int, case: Case, repeats: int) -> None:
    """One rank: for every share both ways in turn; the first delta, which sends all, is not counted."""
    torch.set_num_threads(1)
    control = ControlStore.join("127.0.0.1", port, case.name)
    own = Rank(control, rank, case)
    for way in (FULL, DELTA):
        own.measured(way)
    found: dict[str, dict[str, dict[str, object]]] = {}
    for share in SHARES:
        rows: dict[str, list[dict[str, float]]] = {FULL: [], DELTA: []}
        for _ in range(repeats):
            own.change(share)
            for way in (FULL, DELTA):
                rows[way].append(own.measured(way))
        found[str(share)] = {
            way: {
                **{key: [row[key] for row in measured] for key in ("seconds", "cpu", PACK, UNPACK, "keep")},
                "wire_bytes": int(statistics.median(row["wire_bytes"] for row in measured)),
            }
            for way, measured in rows.items()
        }
    facts = {"plan_digest": own.plan.digest, "base_bytes": own.base.num_bytes, "shares": found}
    control.put(f"row/{rank}", facts)
    own.barrier()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

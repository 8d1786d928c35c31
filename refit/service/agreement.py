"""What the coordinator decides from the ranks' messages: the plan all agree on, and whether a version may be committed.

No Ray here: the messages come through the control store, and the comparisons are plain functions of plain values.
The keys and messages are those of `refit.transfer.protocol`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from refit.plan import Manifest, Plan, PlanOptions, build_plan, decode_rank_manifest, replan
from refit.plan.errors import PlanError
from refit.plan.region import Region, merge_adjacent
from refit.transfer.errors import TransportError
from refit.transfer.protocol import (
    AUTO,
    GO,
    INPUTS,
    OK,
    FinishReport,
    Inputs,
    describe_key,
    digest_key,
    finished_key,
    ready_key,
    report_key,
)
from refit.transfer.rendezvous import ControlStore

DIGEST_MODULUS = 2**64
SHOWN = 5  # how many mismatches a message spells out


@dataclass(frozen=True, slots=True)
class Terms:
    """What all ranks are told besides the two manifests."""

    num_train: int
    num_gen: int
    options: PlanOptions
    backend: str
    bulk: str
    num_streams: int
    timeout_s: float
    transport: str = AUTO
    delta: bool = False


@dataclass(frozen=True, slots=True, order=True)
class Mismatch:
    """A tensor whose digest on a generator rank is not the trainers'. Digests are hex, None where nobody gave one.

    `place` are words on which boxes of the tensor that rank gets, and from whom, `parts` on those that differ; "" where
    that is not known.
    """

    tensor: str
    gen_rank: int
    trained: str | None
    generated: str | None
    place: str = field(default="", compare=False)
    parts: str = field(default="", compare=False)

    def __str__(self) -> str:
        place = f" ({self.place})" if self.place else ""
        parts = f": they differ in {self.parts}" if self.parts else ""
        return (
            f"{self.tensor} on gen rank {self.gen_rank}{place}: trainers sent digest {self.trained}, "
            f"the generator holds {self.generated}{parts}"
        )


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What the engines hold now against what the trainers hold now.

    `mismatches` are tensors whose live elements differ; `changed_params` names, per generator rank, live parameters
    whose bytes are no longer those of the commit (found also where vLLM packs a layout that cannot be digested).
    `silent` are the generator ranks that should hold something and gave no digest at all, as before the first commit:
    nothing is known of them. `num_compared` counts the digests that both sides gave.
    """

    mismatches: tuple[Mismatch, ...]
    changed_params: tuple[tuple[int, str], ...]
    params_sha256: tuple[Mapping[str, str], ...]
    silent: tuple[int, ...] = ()
    num_compared: int = 0

    @property
    def ok(self) -> bool:
        """Every rank was compared, and nothing differs."""
        return not self.findings

    @property
    def findings(self) -> tuple[str, ...]:
        """What is wrong, in words."""
        changed = [f"{param} on gen rank {rank} has changed" for rank, param in self.changed_params]
        silent = [f"gen rank {rank} gave no digest: it has committed no refit" for rank in self.silent]
        return (*map(str, self.mismatches), *changed, *silent)


def agree_on_plan(control: ControlStore, terms: Terms, before: Plan | None = None) -> Plan:
    """Collect all descriptions, plan, and have every rank confirm the digest before any collective is entered.

    `before` is the plan for other generators: with the same trainers and options, what it knows is used again.

    Raises PlanError when descriptions contradict each other or a rank computes another plan, TransportError when a
    rank does not answer in time, RefitFailed when one failed.
    """
    deadline = Deadline(terms.timeout_s)
    train = _collect_manifest(control, "train", terms.num_train, deadline)
    gen = _collect_manifest(control, "gen", terms.num_gen, deadline)
    if before is not None and (before.train.manifest, before.options) == (train, terms.options):
        plan = replan(before, gen)
    else:
        plan = build_plan(train, gen, terms.options)
    inputs = Inputs(
        train,
        gen,
        terms.options,
        terms.backend,
        terms.bulk,
        terms.num_streams,
        terms.timeout_s,
        plan.digest,
        terms.transport,
        terms.delta,
    )
    control.put(INPUTS, inputs.message())
    ranks = range(terms.num_train + terms.num_gen)
    for rank in ranks:
        digest = control.get(digest_key(rank), deadline.left_s)
        if digest != plan.digest:
            raise PlanError(
                f"rank {rank} computed plan {digest}, the coordinator {plan.digest}, from the same manifests: "
                "the refit package differs between the nodes; install one version everywhere"
            )
    control.put(GO, OK)
    for rank in ranks:
        control.get(ready_key(rank), deadline.left_s)
    return plan


def collect_reports(
    control: ControlStore, plan: Plan, attempt: int, version: int, timeout_s: float
) -> dict[int, Any]:
    """The report of every joint rank on one attempt, by rank. Raises TransportError if one moved another version."""
    deadline = Deadline(timeout_s)
    ranks = range(plan.num_train + plan.num_gen)
    reports: dict[int, Any] = {
        rank: control.get(report_key(attempt, rank), deadline.left_s) for rank in ranks
    }
    for rank, report in reports.items():
        if report["version"] != version:
            raise TransportError(
                f"rank {rank} moved version {report['version']} in attempt {attempt}, the coordinator asked for "
                f"version {version}; start both with the same one"
            )
    return reports


def finished_reports(control: ControlStore, plan: Plan, attempt: int) -> dict[int, FinishReport]:
    """What commits cost, by generator rank. Does not wait: a rank puts it before its server says that it serves."""
    found = {rank: control.peek(finished_key(attempt, rank)) for rank in range(plan.num_gen)}
    return {rank: FinishReport.of_message(message) for rank, message in found.items() if message is not None}


def mismatches_of(plan: Plan, reports: Mapping[int, Any]) -> tuple[Mismatch, ...]:
    """Every (tensor, generator rank) whose digests disagree, bulk and misc, sorted. The first SHOWN say their place.

    A tensor that only one side reported is a mismatch too: silence is not agreement.
    """
    trainers = [reports[rank] for rank in range(plan.num_train)]
    found: list[Mismatch] = []
    for gen_rank in range(plan.num_gen):
        rank = plan.num_train + gen_rank
        sent = sent_digests(trainers, rank)
        held = {tensor: by_rank[str(rank)] for tensor, by_rank in reports[rank]["digests"].items()}
        found += compare(gen_rank, sent, held)
        found += compare(gen_rank, trainers[0]["misc_digests"], reports[rank]["misc_digests"])
    found.sort(key=lambda mismatch: (mismatch.tensor, mismatch.gen_rank))
    places = _places(plan, {(mismatch.tensor, mismatch.gen_rank) for mismatch in found[:SHOWN]})
    return tuple(
        replace(mismatch, place=places.get((mismatch.tensor, mismatch.gen_rank), "")) for mismatch in found
    )


def _places(plan: Plan, wanted: Collection[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """The boxes of a bulk tensor that a generator rank gets, and the trainers that send them, in words."""
    boxes: dict[tuple[str, int], list[Region]] = {}
    senders: dict[tuple[str, int], set[int]] = {}
    for flow in plan.flows:
        for gen_rank in {
            rank for tensor, rank in wanted if tensor in flow.tensors and rank in flow.receivers
        }:
            for stripe in flow.received_by(flow.receivers.index(gen_rank)):
                key = stripe.tensor, gen_rank
                if key in wanted:
                    boxes.setdefault(key, []).append(flow.part(stripe.first_row, stripe.stop_row))
                    senders.setdefault(key, set()).add(stripe.holder)
    found = {}
    for key, regions in boxes.items():
        merged = merge_adjacent(regions)
        shown = " ".join(map(str, merged[:SHOWN])) + (" ..." if len(merged) > SHOWN else "")
        found[key] = f"{shown} from train ranks {', '.join(map(str, sorted(senders[key])))}"
    return found


def judge_audit(
    plan: Plan, trained: Sequence[Mapping[str, Mapping[str, str]]], audited: Mapping[int, Any]
) -> VerifyReport:
    """What engines hold now against what each trainer's export says.

    `trained`: per trainer, digests by tensor and joint rank, as hex. `audited`: what each generator rank answered.
    Tensors that an engine keeps in no layout with a digest are judged by the hashes of the last commit alone.
    """
    trainers = [{"digests": digests} for digests in trained]
    mismatches: list[Mismatch] = []
    silent: list[int] = []
    num_compared = 0
    for gen_rank, found in audited.items():
        sent, live = sent_digests(trainers, plan.num_train + gen_rank), found["digests"]
        shared = {name: sent[name] for name in sent if name in live}
        mismatches += compare(gen_rank, shared, live)
        num_compared += len(shared)
        silent += [gen_rank] if sent and not live else []
    changed = tuple((rank, name) for rank, found in audited.items() for name in found["changed"])
    hashes = tuple(found["params_sha256"] for found in audited.values())
    found_wrong = tuple(sorted(mismatches, key=str))
    return VerifyReport(found_wrong, changed, hashes, tuple(sorted(silent)), num_compared)


def sent_digests(trainers: Sequence[Any], rank: int) -> dict[str, str]:
    """What all trainers together sent to one joint rank: the sum of their digests, per tensor, as hex."""
    sums: dict[str, int] = {}
    for report in trainers:
        for tensor, by_rank in report["digests"].items():
            if str(rank) in by_rank:
                part = int(by_rank[str(rank)], 16)
                sums[tensor] = (sums.get(tensor, 0) + part) % DIGEST_MODULUS
    return {tensor: f"{total:016x}" for tensor, total in sums.items()}


def compare(gen_rank: int, trained: Mapping[str, str], generated: Mapping[str, str]) -> Iterator[Mismatch]:
    """The tensors on one generator rank whose digests differ or are on one side only."""
    for tensor in sorted(trained.keys() | generated.keys()):
        if trained.get(tensor) != generated.get(tensor):
            yield Mismatch(tensor, gen_rank, trained.get(tensor), generated.get(tensor))


def describe_mismatches(mismatches: Sequence[Mismatch]) -> str:
    """The first few in words, and how many more there are."""
    shown = "; ".join(str(mismatch) for mismatch in mismatches[:SHOWN])
    more = len(mismatches) - SHOWN
    return shown + (f"; and {more} more" if more > 0 else "")


class Deadline:
    """One time limit over several waits."""

    def __init__(self, timeout_s: float) -> None:
        self._end_s = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        """Seconds left, never below zero."""
        return max(0.0, self._end_s - time.monotonic())


def _collect_manifest(control: ControlStore, side: str, num_ranks: int, deadline: Deadline) -> Manifest:
    texts = [control.get(describe_key(side, rank), deadline.left_s) for rank in range(num_ranks)]
    return Manifest(side, tuple(decode_rank_manifest(str(text)) for text in texts))

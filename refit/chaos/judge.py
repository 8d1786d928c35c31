"""What each fault must lead to, and what each has led to. No process here: outcomes are plain values."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from refit.chaos.faults import GENERATOR, KILL, STOP, TRAINER, Fault, broken_words
from refit.service.fleet import SERVING, ReplicaState

COMMITTED, REPEATED, WITHOUT, ENDED = (
    "committed",
    "committed after a repeat",
    "committed without it",
    "ended",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one fault led to. `served` is (version, whether its bytes are that version) of all who answered after it.

    `states` is what the coordinator says of every replica, `before` and `tried` the versions before and of this round,
    `failures` whose samples failed meanwhile, and why.
    """

    fault: Fault
    struck: bool
    ending: str
    seconds: float
    detail: str
    before: int
    tried: int
    states: Mapping[str, str]
    served: Mapping[str, tuple[int, bool]]
    failures: tuple[tuple[str, str], ...]


def ending_of(incidents: Sequence[str]) -> str:
    """How a refit that committed came to it."""
    if any(incident.startswith("left out") for incident in incidents):
        return WITHOUT
    return REPEATED if incidents else COMMITTED


def due(fault: Fault) -> str:
    """The one ending that a fault must have."""
    match fault.kind:
        case "kill" | "stop":
            return ENDED if fault.role == TRAINER else WITHOUT
        case "raise" if fault.role == GENERATOR and fault.phase == "generate":
            return COMMITTED  # it costs an answer, not the replica
        case "raise" if fault.phase == "commit":
            return WITHOUT  # half of the new weights are in place of the old ones
        case "raise" | "corrupt":
            return REPEATED
        case "slow" | "disk":
            return COMMITTED
        case other:
            raise AssertionError(f"unknown kind {other!r}")


def broken_by(outcome: Outcome, limit_s: float) -> Iterator[str]:
    """Every promise that this outcome breaks, in words."""
    fault = outcome.fault
    if not outcome.struck:
        yield "it never struck, so nothing was tested"
    if outcome.ending != due(fault):
        yield f"{outcome.ending!r}, must be {due(fault)!r}: {outcome.detail}"
    if outcome.seconds > limit_s:
        yield f"took {outcome.seconds:.1f} s of {limit_s:.1f} s"
    if fault.kind in (KILL, STOP) and fault.victim not in outcome.detail:
        yield f"{fault.victim} is not named: {outcome.detail}"
    yield from _torn_by(outcome)
    for who, why in outcome.failures:
        if who != fault.victim:
            yield f"{who}, which nothing happened to, did not answer: {why}"
        elif (
            fault.kind not in (KILL, STOP) and broken_words(fault) not in why and "must not serve" not in why
        ):
            yield f"{who} did not answer, for another reason than the fault: {why}"


def _torn_by(outcome: Outcome) -> Iterator[str]:
    """All replicas but one that was lost serve one version, whole: the new one after a commit, else the old one."""
    due_version = outcome.before if outcome.ending == ENDED else outcome.tried
    lost = {outcome.fault.victim} if outcome.ending == WITHOUT else set()
    missing = outcome.states.keys() - lost - outcome.served.keys()
    if missing:
        yield f"{sorted(missing)} do not serve: {outcome.states}"
    for who, (version, whole) in outcome.served.items():
        if version != due_version or not whole:
            words = "" if whole else ", torn"
            yield f"{who} serves version {version}{words}; it must be {due_version}"
        if who in lost:
            yield f"{who} was left out and still serves"
    if outcome.ending != ENDED:
        must = str(ReplicaState(SERVING, due_version))
        for who in outcome.states.keys() - lost:
            if outcome.states[who] != must:
                yield f"the coordinator takes {who} for {outcome.states[who]}, must be {must}"


def table_of(outcomes: Sequence[Outcome]) -> list[tuple[str, str, int, str, str]]:
    """Rows of (role, kind, faults, endings, longest seconds)."""
    groups: dict[tuple[str, str], list[Outcome]] = collections.defaultdict(list)
    for outcome in outcomes:
        groups[outcome.fault.role, outcome.fault.kind].append(outcome)
    return [
        (
            role,
            kind,
            len(found),
            ", ".join(f"{number} {ending}" for ending, number in _count(found)),
            f"{max(outcome.seconds for outcome in found):.1f}",
        )
        for (role, kind), found in sorted(groups.items())
    ]


def _count(outcomes: Sequence[Outcome]) -> list[tuple[str, int]]:
    return collections.Counter(outcome.ending for outcome in outcomes).most_common()

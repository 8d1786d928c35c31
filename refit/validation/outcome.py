"""What came of a case, and what it is judged by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

from refit.plan import BULK, MISC, Plan
from refit.validation.matrix import Case
from refit.validation.parity import LOGPROB_LIMIT, Scores, largest_delta

SAME_LAYOUT_LIMIT = 1e-6
KL_LIMIT = 1.2e-2


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a case. `failures` is empty when every byte and every check was right.

    Bytes count each element once, of the tensors that generators want. `misc` gives a reason for every tensor that is
    not bulk; `logprob_delta` is the largest difference to an engine started from the last version (of one rank; where
    engines are quantized, of their layout), None where no engine ran. `kl` is how far a quantized engine is from one
    rank in the trainers' precision (`kl_per_token`).
    """

    case: Case
    failures: tuple[str, ...] = ()
    bulk_bytes: int = 0
    misc_bytes: int = 0
    misc: tuple[tuple[str, str], ...] = ()
    logprob_delta: float | None = None
    kl: float | None = None
    seconds: float = 0.0

    @property
    def bulk_share(self) -> float:
        return self.bulk_bytes / max(1, self.bulk_bytes + self.misc_bytes)

    @property
    def status(self) -> str:
        return "unrunnable" if self.case.unrunnable else "failed" if self.failures else "passed"


def outcome_of(case: Case, planned: tuple[Plan, tuple[str, ...]], found: Mapping[str, Any]) -> Outcome:
    """From the coordinator's plan and digest mismatches, and what each rank returned."""
    plan, mismatches = planned
    wanted = [tensor for tensor in plan.tensors.values() if tensor.name in plan.gen.specs]
    total = {kind: sum(tensor.num_bytes for tensor in wanted if tensor.kind == kind) for kind in (BULK, MISC)}
    misc = tuple((tensor.name, tensor.reason) for tensor in plan.tensors.values() if tensor.kind == MISC)
    outcome = Outcome(case, (*mismatches, *_failures(found)), total[BULK], total[MISC], misc)
    return replace(outcome, failures=(*outcome.failures, *_unproven(outcome, set(plan.gen.specs))))


def _unproven(outcome: Outcome, wanted: set[str]) -> Iterator[str]:
    """What is misc and should be bulk, of the tensors that generators want."""
    case = outcome.case
    for name, reason in outcome.misc:
        if name in wanted and not any(fnmatch(name, pattern) for pattern in case.misc):
            yield f"{name} is not bulk, {reason}"
            break
    if outcome.bulk_share < case.min_bulk_share:
        yield f"bulk share {outcome.bulk_share:.4f} is below {case.min_bulk_share}"


def _failures(found: Mapping[str, Any]) -> Iterator[str]:
    """Each thing that some rank found wrong, the earliest version first."""
    rows = [(check, who, text) for who, value in found.items() for check, text in value["wrong"].items()]
    for check, who, text in sorted(rows, key=lambda row: (row[0].rpartition(" ")[2], row[1], row[0])):
        name, _, version = check.rpartition(" ")
        yield f"{who}, version {version}, {name}: {text}"


def too_far(outcome: Outcome) -> Iterator[str]:
    """What of the engines' log-probabilities is beyond its limit."""
    limit, other = LOGPROB_LIMIT[outcome.case.precision], "of one rank"
    if outcome.case.quantized:
        limit, other = SAME_LAYOUT_LIMIT, "that was started from the quantized checkpoint"
    if outcome.logprob_delta is not None and outcome.logprob_delta > limit:
        yield f"logprobs differ by {outcome.logprob_delta:.2e} from an engine {other}, limit {limit}"
    if outcome.kl is not None and outcome.kl > KL_LIMIT:
        yield f"a KL of {outcome.kl:.2e} per token from an engine that is not quantized, limit {KL_LIMIT}"


def kl_per_token(wanted: Scores, found: Scores) -> float:
    """Mean of exp(d) - d - 1 over tokens (the k3 estimator), d the difference of log-probabilities; maybe inf."""
    if math.isinf(largest_delta(wanted, found)):
        return math.inf
    deltas = [
        a - b for mine, theirs in zip(wanted, found, strict=True) for a, b in zip(mine, theirs, strict=True)
    ]
    return sum(math.exp(min(delta, 700.0)) - delta - 1 for delta in deltas) / len(deltas)

"""In which part of a tensor a discarded refit went wrong, and from whom that part came.

After a discard both ends say what they hold of the tensors that differ, in small parts: generators before they drop
what they staged, trainers when asked. Digests add up, so the parts also tell whether an end still holds what its
report was of; where it does not, nothing is said. Refits whose digests agree have no part in this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from refit.plan import BULK, Plan, Region
from refit.plan.region import disjoint, merge_adjacent
from refit.service.agreement import DIGEST_MODULUS, SHOWN, Mismatch
from refit.service.waiting import gather
from refit.transfer.errors import RefitFailed, TransportError
from refit.transfer.protocol import slices_key
from refit.transfer.rendezvous import ControlStore
from refit.transfer.slices import Slice

SHOWN_PARTS = 3


def suspects_of(plan: Plan, mismatches: Sequence[Mismatch]) -> dict[str, list[str]]:
    """The bulk tensors among the mismatches that a message spells out, by joint rank: `slices.Suspects`."""
    found: dict[str, list[str]] = {}
    for wrong in mismatches[:SHOWN]:
        tensor = plan.tensors.get(wrong.tensor)  # misc goes by the names of the checkpoint
        if tensor is not None and tensor.kind == BULK:
            found.setdefault(str(plan.num_train + wrong.gen_rank), []).append(wrong.tensor)
    return found


def locate(
    control: ControlStore,
    attempt: int,
    plan: Plan,
    mismatches: Sequence[Mismatch],
    trainers: Mapping[str, Any],
    timeout_s: float,
) -> tuple[Mismatch, ...]:
    """The mismatches with the parts that differ. Call when the generators have discarded the attempt.

    Raises RefitFailed or TransportError when a trainer, which is asked now, fails or does not answer in `timeout_s`.
    """
    suspects = suspects_of(plan, mismatches)
    told = {rank: control.peek(slices_key(attempt, int(rank))) for rank in suspects}
    suspects = {rank: tensors for rank, tensors in suspects.items() if told[rank] is not None}
    if not suspects:
        return tuple(mismatches)
    calls = {who: actor.slices.remote(suspects, timeout_s) for who, actor in trainers.items()}
    answers = gather(calls, "locate", timeout_s)
    if answers.cause is not None:
        raise RefitFailed(answers.cause)
    if answers.silent:
        raise TransportError(f"no answer from {', '.join(answers.silent)}")
    sent = [Slice.of_message(each) for found in answers.results.values() for each in found]
    held = [Slice.of_message(each) for rank in suspects for each in told[rank]]  # type: ignore[attr-defined]
    return located(plan.num_train, mismatches, sent, held)


def located(
    num_train: int, mismatches: Sequence[Mismatch], sent: Sequence[Slice], held: Sequence[Slice]
) -> tuple[Mismatch, ...]:
    """The mismatches, with words on the parts that differ where both ends hold what they reported."""
    found = []
    for wrong in mismatches:
        place = wrong.tensor, num_train + wrong.gen_rank
        left = [part for part in sent if (part.tensor, part.target) == place]
        right = [part for part in held if (part.tensor, part.target) == place]
        is_known = _adds_up(left, wrong.trained) and _adds_up(right, wrong.generated)
        found.append(replace(wrong, parts=_words(_differing(left, right))) if is_known else wrong)
    return tuple(found)


def _adds_up(parts: Sequence[Slice], reported: str | None) -> bool:
    if not parts or reported is None:
        return False
    return sum(part.digest for part in parts) % DIGEST_MODULUS == int(reported, 16)


def _differing(sent: Sequence[Slice], held: Sequence[Slice]) -> list[tuple[int, Region]]:
    """(train rank, box) of what differs, in as few boxes as may be. A part that one end has alone differs."""
    left, right = _by_part(sent), _by_part(held)
    wrong: dict[int, list[Region]] = {}
    for source, region in left.keys() | right.keys():
        if left.get((source, region)) != right.get((source, region)):
            wrong.setdefault(source, []).append(region)
    merged = {source: merge_adjacent(disjoint(sorted(regions))) for source, regions in wrong.items()}
    return [(source, region) for source in sorted(merged) for region in merged[source]]


def _by_part(parts: Iterable[Slice]) -> dict[tuple[int, Region], list[int]]:
    """Digests by (source, region): several where a generator keeps a tensor more than once."""
    found: dict[tuple[int, Region], list[int]] = {}
    for part in parts:
        found.setdefault((part.source, part.region), []).append(part.digest)
    return {key: sorted(digests) for key, digests in found.items()}


def _words(wrong: Sequence[tuple[int, Region]]) -> str:
    shown = ", ".join(f"{region} from train rank {source}" for source, region in wrong[:SHOWN_PARTS])
    more = len(wrong) - SHOWN_PARTS
    return shown + (f" and {more} more boxes" if more > 0 else "")

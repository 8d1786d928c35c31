"""Digests of small parts of what moved: where the digests of a tensor disagree, these say in which part of it.

Both ends of a pair have the same segments from the plan, so both cut them alike and nobody says how. They are taken
only after a discard was decided, of what the params hold then, through the wire dtype as packing does.
"""

import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from refit.plan import Plan, Region
from refit.plan.region import split_rows
from refit.transfer.compiled import CompiledStage, Move
from refit.transfer.digest import digest
from refit.transfer.errors import TransportError
from refit.transfer.memory import strided_box
from refit.transfer.protocol import slices_key, suspects_key
from refit.transfer.rendezvous import ControlStore

PARTS = 256  # of a tensor between two ranks, about: a digest of one costs some 60 us, however small
LONGEST_S = 10.0  # a server answers nothing meanwhile

type Suspects = Mapping[str, Collection[str]]
"""The tensors to be cut into slices, by the joint rank, as text, that they go to."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Slice:
    """The digest of one part of what `source` sends to `target`; both are joint ranks."""

    tensor: str
    source: int
    target: int
    region: Region
    digest: int

    def message(self) -> list[object]:
        """As JSON and Ray carry it."""
        starts, stops = list(self.region.starts), list(self.region.stops)
        return [self.tensor, self.source, self.target, starts, stops, f"{self.digest:016x}"]

    @classmethod
    def of_message(cls, message: Sequence[object]) -> "Slice":
        tensor, source, target, starts, stops, found = message
        region = Region(tuple(starts), tuple(stops))  # type: ignore[arg-type]
        return cls(str(tensor), int(source), int(target), region, int(str(found), 16))  # type: ignore[call-overload]


def slices_of(
    plan: Plan,
    rank: int,
    stages: Iterable[CompiledStage],
    params: Mapping[str, Tensor],
    suspects: Suspects,
    deadline: float,
) -> Iterator[Slice]:
    """What `params` of joint rank `rank` hold of the suspects that it sends or receives, a slice per part.

    Raises TransportError when `deadline`, a time.monotonic(), has passed.
    """
    for (source, target, tensor), moves in _suspected(rank, stages, suspects).items():
        most = -(-sum(move.region.num_elements for move in moves) // PARTS)
        for move in moves:
            segment = move.segment
            box = strided_box(params[segment.param], segment.shape, segment.strides, segment.offset)
            for part in split_rows(move.region, most):
                if time.monotonic() >= deadline:
                    raise TransportError(f"rank {rank} was not done with the slices of {tensor} in time")
                held = box[part.slices(move.region)]
                value = digest(held.to(move.wire), part, plan.tensors[tensor].shape)
                yield Slice(tensor, source, target, part, value)


def put_slices(
    control: ControlStore,
    attempt: int,
    plan: Plan,
    rank: int,
    stages: Iterable[CompiledStage],
    params: Mapping[str, Tensor],
    deadline: float,
) -> None:
    """Put the slices of what this rank received, if the coordinator suspects any of it.

    Waits for nobody and raises nothing: a message may say less for it, and no outcome is another.
    """
    deadline = min(deadline, time.monotonic() + LONGEST_S)
    if time.monotonic() >= deadline:
        return
    try:
        suspects = control.peek(suspects_key(attempt))
        if isinstance(suspects, dict) and str(rank) in suspects:
            found = slices_of(plan, rank, stages, params, suspects, deadline)
            control.put(slices_key(attempt, rank), [each.message() for each in found])
    except Exception:
        _log.exception("rank %d cannot say where attempt %d differs", rank, attempt)


def _suspected(
    rank: int, stages: Iterable[CompiledStage], suspects: Suspects
) -> dict[tuple[int, int, str], list[Move]]:
    """The moves of the suspects by (source, target, tensor), in the order of the plan."""
    found: dict[tuple[int, int, str], list[Move]] = {}
    for stage in stages:
        for round_ in stage.rounds:
            pairs = [(rank, parcel.peer, parcel) for parcel in round_.sends]
            pairs += [(parcel.peer, rank, parcel) for parcel in round_.receives]
            for source, target, parcel in pairs:
                for move in parcel.moves:
                    if move.segment.tensor in suspects.get(str(target), ()):
                        found.setdefault((source, target, move.segment.tensor), []).append(move)
    return found

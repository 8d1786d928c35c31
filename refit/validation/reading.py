"""Read-back in a validation run: what live ranks give back, by HF name, against what the trainers exported.

The ranks of a case answer reads through its control store (`serve`); the runner reads (`read_faults`): every tensor
whole, and random slices of all of them with the vocabulary's last real row, its first padded row, and, where ranks
share the rows, a row of each rank.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refit.plan import PlanError, canonical
from refit.plan.read import plan_read, stored_rows, wanted
from refit.service.reader import Reader
from refit.transfer.inverse import RESOLUTION
from refit.transfer.memory import torch_dtype
from refit.transfer.reading import INVERTED
from refit.transfer.rendezvous import ControlStore
from refit.validation.weights import first_difference

NUM_SLICES = 200
MAX_ROW_BYTES = 64 << 10
VOCABULARY = ("model.embed_tokens.weight", "backbone.embeddings.weight")


@dataclass(slots=True)
class PoolEngine:
    """The ranks of one engine of a case, as `serve` reads the asks."""

    control: ControlStore
    replica: int
    num_workers: int
    num_asks: int = 0

    @property
    def name(self) -> str:
        return f"replica {self.replica}"

    def ask(self, info: Mapping[str, Any], timeout_s: float) -> None:
        self.num_asks += 1
        self.control.put(f"reads/{self.replica}/{self.num_asks}", dict(info))
        for rank in range(self.num_workers):
            self.control.get(f"read/{self.replica}/{self.num_asks}/{rank}", timeout_s)

    def end(self) -> None:
        """Let `serve` return on every rank."""
        self.num_asks += 1
        self.control.put(f"reads/{self.replica}/{self.num_asks}", {"end": True})


def serve(
    control: ControlStore,
    replica: int,
    rank: int,
    timeout_s: float,
    answer: Callable[[Mapping[str, Any]], None],
) -> None:
    """Let this rank answer asks until the reader has ended. Raises what ends the case, TransportError in time."""
    number = 1
    while True:
        info: Any = control.get(f"reads/{replica}/{number}", timeout_s)
        if info.get("end"):
            return
        answer(info)
        control.put(f"read/{replica}/{number}/{rank}", {"ok": True})
        number += 1


def read_faults(reader: Reader, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What read-back gets wrong; `tensors` are what the engine holds, each of them."""
    held = [name for name in tensors if _is_held(reader, name)]
    yield from (f"{name}: the engine does not hold it" for name in sorted(set(tensors) - set(held)))
    if not held:
        return
    for name in held:
        yield from _wrong(reader, tensors, name, None)
    chosen = random.Random(0)  # noqa: S311 - which slices are tried, nothing secret
    for number in range(NUM_SLICES):
        name = held[number % len(held)] if number < NUM_SLICES // 2 else chosen.choice(held)
        size = tensors[name].shape[0] if tensors[name].ndim else 1
        start = chosen.randrange(size)
        yield from _wrong(reader, tensors, name, slice(start, chosen.randint(start + 1, size)))
    for name in set(VOCABULARY) & set(held):
        yield from _vocabulary_faults(reader, tensors, name)


def _vocabulary_faults(reader: Reader, tensors: Mapping[str, Tensor], name: str) -> Iterator[str]:
    size = tensors[name].shape[0]
    cells = plan_read(reader.side, name, wanted(name, (None, None), reader.side).region).cells
    rows = {0, size - 1, *(cell.region.starts[0] for cell in cells)}
    givers = set()
    for row in sorted(rows):
        yield from _wrong(reader, tensors, name, slice(row, row + 1))
        answer = reader.read(name, row)
        givers |= set(answer.ranks)
        if answer.moved_bytes > MAX_ROW_BYTES:
            yield f"{name}: {answer.moved_bytes} bytes were moved for one row, limit {MAX_ROW_BYTES}"
    if len(givers) < len({cell.ranks for cell in cells}):
        yield f"{name}: rows of {len(cells)} cells all came from ranks {sorted(givers)}"
    try:
        reader.read(name, size)
        yield f"{name}: row {size} was given, which is not there"
    except PlanError as refusal:
        stored = stored_rows(reader.side.manifest, name)
        padded = f"pads them to {stored}" if stored > size else "is not there"
        if padded not in str(refusal):
            yield f"{name}: row {size} was refused without {padded!r}: {refusal}"


def _wrong(reader: Reader, tensors: Mapping[str, Tensor], name: str, rows: slice | None) -> Iterator[str]:
    spec = reader.side.specs[canonical(name)[0]]
    goal = tensors[name].to(torch_dtype(spec.dtype))
    answer = reader.read(name, rows)
    goal = goal if rows is None else goal[rows]
    if INVERTED in answer.kinds.values():  # no more can be known of it
        goal = torch.where((goal - answer.tensor).abs() <= RESOLUTION, answer.tensor, goal)
    difference = first_difference({name: answer.tensor}, {name: goal}, {name: tensors[name].to(goal.dtype)})
    if difference:
        shown = "" if rows is None else f"[{rows.start}:{rows.stop}]"
        yield f"read {name}{shown} of version {answer.version}: {difference}"


def _is_held(reader: Reader, name: str) -> bool:
    return canonical(name)[0] in reader.side.specs

"""A job's trainers as a holder of weights, and the desk where the job takes diffs against them between two steps.

What the trainers hold is what Megatron-Bridge exports: collective over them, so only the job's own loop may ask.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from refit.gen_side.live.desk import LATE_S
from refit.gen_side.live.desk import RUN_ID as DESK
from refit.plan import Plan, Region, TensorSpec
from refit.plan.read import HeldCell
from refit.service.diff import EXACT, Box, DiffReport, diff, plain_report
from refit.service.holders import EngineWeights
from refit.service.reader import JobEngine, Reader
from refit.service.waiting import collect
from refit.transfer.errors import TransportError
from refit.transfer.memory import torch_dtype
from refit.transfer.rendezvous import ControlStore

TRAINERS = "trainers"


class TrainerWeights:
    """Full tensors of the trainers. `trainers` are all of them by name, rank 0 first."""

    def __init__(
        self, trainers: Mapping[str, Any], plan: Plan, control: ControlStore, timeout_s: float
    ) -> None:
        self._trainers = dict(trainers)
        self._plan = plan
        self._control = control
        self._timeout_s = timeout_s

    @property
    def name(self) -> str:
        return TRAINERS

    @property
    def version(self) -> int | None:
        return None

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._plan.train.specs

    @property
    def unreadable(self) -> Mapping[str, str]:
        return {}

    def cells(self, tensor: str) -> tuple[HeldCell, ...]:
        return (HeldCell(Region.whole(self.specs[tensor].shape), (0,)),)

    def digests(self, boxes: Sequence[Box]) -> list[int | str]:
        asked = [(box.tensor, box.dtype, box.region) for box in boxes]
        specs = {box.tensor: self.specs[box.tensor] for box in boxes}
        found = self._on_all("weight_digests", asked, specs)
        return [int(value, 16) for value in found]

    def values(self, box: Box) -> tuple[Tensor, float]:
        control = self._control.under(f"read-{secrets.token_hex(6)}")
        num_bytes = self._on_all("put_weights", self.specs[box.tensor], box.dtype, box.region, control.run_id)
        payload = control.take_bytes("bytes", num_bytes)
        return torch.frombuffer(payload, dtype=torch_dtype(box.dtype)).view(box.region.shape), EXACT

    def who(self, rank: int) -> str:  # noqa: ARG002 - the export is of all of them
        return TRAINERS

    def _on_all(self, method: str, *arguments: Any) -> Any:
        calls = {who: getattr(actor, method).remote(*arguments) for who, actor in self._trainers.items()}
        return collect(calls, "diff", self._timeout_s)[next(iter(self._trainers))]


class TrainerDesk:
    """Takes diffs of the trainers against an engine: `serve` is to be called when no trainer is at work."""

    def __init__(self, control: ControlStore, trainers: Mapping[str, Any], timeout_s: float) -> None:
        self._control = control
        self._trainers = trainers
        self._timeout_s = timeout_s
        self._num_done = 0

    def serve(self, plan: Plan, workers_per_engine: int) -> None:
        """Make the diffs that have been asked for since the last call. One that fails is told to who asked for it."""
        with contextlib.suppress(
            TransportError
        ):  # a store that is gone ends the job elsewhere, with its cause
            asked = self._control.under(DESK).count("asks/trainer", 0)
            for number in range(self._num_done + 1, asked + 1):
                self._num_done = number
                self._answer(number, plan, workers_per_engine)

    def _answer(self, number: int, plan: Plan, workers_per_engine: int) -> None:
        desk = self._control.under(DESK)
        try:
            ask: Any = desk.get(f"ask/trainer/{number}", LATE_S)
            report = self._diff(plan, workers_per_engine, int(ask["place"]), str(ask["pattern"]))
            answer: dict[str, Any] = {"report": plain_report(report)}
        except Exception as error:  # a diff never ends the job; a trainer that is lost shows in the next step
            answer = {"error": f"{type(error).__name__}: {error}"}
        desk.put(f"done/trainer/{number}", answer)

    def _diff(self, plan: Plan, workers_per_engine: int, place: int, pattern: str) -> DiffReport:
        trainers = TrainerWeights(self._trainers, plan, self._control, self._timeout_s)
        engine = JobEngine(self._control, place, workers_per_engine)
        return diff(trainers, EngineWeights(Reader(engine, self._control, self._timeout_s)), pattern)

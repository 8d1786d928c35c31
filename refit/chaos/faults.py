"""What a campaign does to a process, and where in a refit it strikes."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor
from torch._C._distributed_c10d import Work

from refit.transfer.groups import Group
from refit.transfer.memory import as_bytes
from refit.transfer.transports.seam import Parcel, Ticket, Transport

TRAINER, GENERATOR, DRIVER = "trainer", "generator", "driver"
KILL, STOP, CORRUPT, SLOW, DISK, RAISE = "kill", "stop", "corrupt", "slow", "disk", "raise"
KINDS = (KILL, STOP, CORRUPT, SLOW, DISK, RAISE)
SLOW_S = 1.5
ROUND, BROADCAST, RECORD = "round", "broadcast", "record"
PHASES = {
    TRAINER: ("prepare", "begin", ROUND, "misc", "report"),
    GENERATOR: ("generate", "prepare", "begin", ROUND, "misc", "report", "decision", "commit", "served"),
}
FULL_DISK = "/dev/full"
FRAME_BYTES = 64  # broadcasts up to this size are headers, which no digest covers


@dataclass(frozen=True, slots=True)
class Fault:
    """`kind` strikes once, when process `number` of `role` gets to `phase`; `count` picks the round of a move.

    The driver has one fault: from its "record" on, every file of the run folder is on a full disk.
    """

    role: str
    number: int
    phase: str
    kind: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.kind} {self.role} {self.number} at {self.phase}"

    @property
    def victim(self) -> str:
        """The process as messages of the service call it."""
        return f"train rank {self.number}" if self.role == TRAINER else f"{self.role} {self.number}"


def draw(rng: random.Random, num_trainers: int, replicas: Sequence[int]) -> Fault:
    """Any fault on any process, generators three times as often: a lost trainer ends its job."""
    role = rng.choice((TRAINER, GENERATOR, GENERATOR, GENERATOR))
    kind = rng.choice(KINDS)
    if kind == DISK and rng.random() < 0.5:
        return Fault(DRIVER, 0, RECORD, DISK)
    number = rng.randrange(num_trainers) if role == TRAINER else rng.choice(list(replicas))
    phase, count = rng.choice(PHASES[role]), rng.randint(1, 3)
    if kind == CORRUPT:
        by_broadcast = role == TRAINER and number == 0 and rng.random() < 0.5
        phase = BROADCAST if by_broadcast else ROUND
    return Fault(role, number, phase, kind, 1 if phase == BROADCAST else count)


class Striker:
    """The armed fault of one process. `reach` is called at each phase and strikes at the right one, once.

    A strike first leaves a file at `mark`: a fault that never came to its phase is then told from a harmless one.
    """

    def __init__(self) -> None:
        self._fault: Fault | None = None
        self._mark = ""
        self._left = 0

    def arm(self, fault: Fault | None, mark: str) -> None:
        self._fault, self._mark = fault, mark
        self._left = fault.count if fault is not None and fault.phase == ROUND else 1

    def reach(self, phase: str, payload: Tensor | None = None) -> None:
        """`payload` is what goes over the wire, or came; without one a corruption waits for the next round."""
        fault = self._fault
        if fault is None or fault.phase != phase or (fault.kind == CORRUPT and payload is None):
            return
        self._left -= 1
        if self._left > 0:
            return
        self._fault = None
        Path(self._mark).touch()
        _strike(fault, payload)


def _strike(fault: Fault, payload: Tensor | None) -> None:
    match fault.kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread first
        case "slow":
            time.sleep(SLOW_S)
        case "disk":
            fill_disk()
        case "raise":
            raise ValueError(broken_words(fault))
        case "corrupt":
            assert payload is not None, "a corruption needs bytes"
            payload[payload.numel() // 2] ^= 1
        case other:
            raise AssertionError(f"unknown kind {other!r}")


def broken_words(fault: Fault) -> str:
    """What a process that is told to raise says."""
    return f"a campaign breaks this process: {fault}"


def fill_disk() -> None:
    """From now on every write of this process to its log file fails with ENOSPC, as on a full disk."""
    full = os.open(FULL_DISK, os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)
    os.close(full)


class FaultyTransport:
    """A transport that tells the striker of every round; what it corrupts has really arrived over the wire."""

    def __init__(self, inner: Transport, striker: Striker) -> None:
        self._inner = inner
        self._striker = striker

    @property
    def gathers(self) -> bool:
        """Packed or not, the bytes on the wire are the same."""
        return self._inner.gathers

    def post(self, sends: Sequence[Parcel], receives: Sequence[Parcel], tag: int) -> Ticket:
        # Copies: a parcel may be the params themselves, and it is the wire that breaks here, not the weights.
        sends = [parcel.packed() for parcel in sends]
        payloads = [parcel.payload for parcel in sends if parcel.payload.numel()]
        self._striker.reach(ROUND, payloads[0] if payloads else None)
        return self._inner.post(sends, receives, tag)

    def wait(self, ticket: Ticket, deadline: float) -> None:
        self._inner.wait(ticket, deadline)
        for operation in ticket:
            parts = operation.parcel.parts if operation.direction == "receive" else []
            if parts:
                self._striker.reach(ROUND, parts[len(parts) // 2])

    def abort(self) -> None:
        self._inner.abort()

    def close(self) -> None:
        self._inner.close()

    def __getattr__(self, name: str) -> Any:
        """Whatever else a backend's transport offers."""
        return getattr(self._inner, name)


@dataclass(frozen=True)
class FaultyGroup(Group):
    """The group of the broadcasts; the sender tells the striker of every payload."""

    striker: Striker = field(default_factory=Striker)

    @classmethod
    def around(cls, group: Group, striker: Striker) -> FaultyGroup:
        parts = {part.name: getattr(group, part.name) for part in fields(group)}
        return cls(**parts, striker=striker)

    def broadcast(self, tensor: Tensor, source: int) -> Work:
        if source == self.rank and tensor.numel() * tensor.element_size() > FRAME_BYTES:
            tensor = tensor.clone()
            self.striker.reach(BROADCAST, as_bytes(tensor))
        return super().broadcast(tensor, source)

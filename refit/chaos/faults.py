"""What a campaign does to a process, and where in a refit it strikes."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from refit.transfer.transport import Parcel, Ticket, Transport

KILL, STOP, CORRUPT, SLOW, DISK, RAISE = "kill", "stop", "corrupt", "slow", "disk", "raise"
KINDS = (KILL, STOP, CORRUPT, SLOW, DISK, RAISE)
SLOW_S = 1.5
PHASES = {
    "trainer": ("prepare", "begin", "round", "misc", "report"),
    "generator": ("generate", "prepare", "begin", "round", "misc", "report", "decision", "commit", "served"),
}
FULL_DISK = "/dev/full"


@dataclass(frozen=True, slots=True)
class Fault:
    """`kind` strikes once, when process `number` of `role` gets to `phase`; `count` picks the round of a move."""

    role: str
    number: int
    phase: str
    kind: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.kind} {self.role} {self.number} at {self.phase}"


def draw(rng: random.Random, num_trainers: int, replicas: Sequence[int]) -> Fault:
    """Any fault on any process, generators three times as often: a lost trainer ends its job."""
    role = rng.choice(("trainer", "generator", "generator", "generator"))
    number = rng.randrange(num_trainers) if role == "trainer" else rng.choice(list(replicas))
    kind = rng.choice(KINDS)
    phase = "round" if kind == CORRUPT else rng.choice(PHASES[role])
    return Fault(role, number, phase, kind, rng.randint(1, 3))


class Striker:
    """The armed fault of one process. `reach` is called at each phase and strikes at the right one, once."""

    def __init__(self) -> None:
        self._fault: Fault | None = None
        self._left = 0

    def arm(self, fault: Fault | None) -> None:
        self._fault, self._left = fault, fault.count if fault is not None and fault.phase == "round" else 1

    def reach(self, phase: str, payload: Tensor | None = None) -> None:
        """`payload` is what goes over the wire, or came; without one a corruption waits for the next round."""
        fault = self._fault
        if fault is None or fault.phase != phase or (fault.kind == CORRUPT and payload is None):
            return
        self._left -= 1
        if self._left > 0:
            return
        self._fault = None
        _strike(fault, payload)


def _strike(fault: Fault, payload: Tensor | None) -> None:
    match fault.kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "slow":
            time.sleep(SLOW_S)
        case "disk":
            fill_disk()
        case "raise":
            raise ValueError(f"a campaign breaks this process: {fault}")
        case "corrupt":
            assert payload is not None, "a corruption needs bytes"
            payload[payload.numel() // 2] ^= 1
        case other:
            raise AssertionError(f"unknown kind {other!r}")


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

    def post(self, sends: Sequence[Parcel], receives: Sequence[Parcel], tag: int) -> Ticket:
        # Copies: a payload may be the param itself, and it is the wire that breaks here, not the weights.
        sends = [Parcel(parcel.peer, parcel.payload.clone()) for parcel in sends]
        payloads = [parcel.payload for parcel in sends if parcel.payload.numel()]
        self._striker.reach("round", payloads[0] if payloads else None)
        return self._inner.post(sends, receives, tag)

    def wait(self, ticket: Ticket, deadline: float) -> None:
        self._inner.wait(ticket, deadline)
        for operation in ticket:
            if operation.direction == "receive" and operation.parcel.payload.numel():
                self._striker.reach("round", operation.parcel.payload)

    def abort(self) -> None:
        self._inner.abort()

    def close(self) -> None:
        self._inner.close()

    def __getattr__(self, name: str) -> Any:
        """Whatever else a backend's transport offers."""
        return getattr(self._inner, name)

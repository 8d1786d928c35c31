"""The replicas of a job and the state of each, as the coordinator knows it. No Ray here: actors are opaque.

    joining --stage--> staging(v) --commit--> serving(v) --stage--> staging(v') --discard--> serving(v)
    any state --leave out--> failed(reason) --restart--> joining

A replica serves only what it has committed; a joining one, whose engine holds what it read from disk, serves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refit.transfer.errors import Failure, RefitFailed

JOINING, SERVING, STAGING, FAILED = "joining", "serving", "staging", "failed"


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """`version` is what serves (None: nothing), `next_version` what is being staged, `reason` why it failed."""

    kind: str
    version: int | None = None
    next_version: int | None = None
    reason: str = ""

    def __str__(self) -> str:
        match self.kind:
            case "failed":
                return f"failed({self.reason})"
            case "staging":
                return f"staging({self.next_version})"
            case "serving":
                return f"serving({self.version})"
            case _:
                return self.kind


class Fleet:
    """All replicas by number. `members` are those that take part in refits, `serving` those that may generate."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = dict(enumerate(actors))
        self._states = dict.fromkeys(self._actors, ReplicaState(SERVING, 0))
        self.version = 0

    def found(self, replica: int, version: int) -> None:
        """`replica` says that it serves `version` already, from an earlier job."""
        self._states[replica] = ReplicaState(SERVING, version)
        self.version = max(self.version, version)

    @property
    def members(self) -> dict[int, Any]:
        """{replica: actor} of all that have not failed, in replica order."""
        return {k: self._actors[k] for k in sorted(self._actors) if self._states[k].kind != FAILED}

    @property
    def serving(self) -> dict[int, Any]:
        """{replica: actor} of all that serve the fleet's version, the newest that was ever committed."""
        return {k: actor for k, actor in self.members.items() if self._states[k].version == self.version}

    @property
    def failed(self) -> tuple[int, ...]:
        return tuple(k for k in sorted(self._states) if self._states[k].kind == FAILED)

    def state(self, replica: int) -> ReplicaState:
        return self._states[replica]

    def states(self) -> dict[str, str]:
        """{"generator 0": "serving(3)", ...} for records and messages."""
        return {name_of(k): str(self._states[k]) for k in sorted(self._states)}

    def begin(self, version: int) -> None:
        """All members stage `version`. Raises RefitFailed if that is not a newer version, or nobody is left."""
        if not self.members:
            raise RefitFailed(
                Failure("refit", "coordinator", f"no generator is left: {_words(self.states())}")
            )
        for k in self.members:
            serves = self._states[k].version
            if serves is not None and serves > version:
                reason = f"versions only grow: {name_of(k)} serves {serves}, so it cannot go to {version}"
                raise RefitFailed(Failure("refit", "coordinator", reason))
        for k in self.members:
            self._states[k] = ReplicaState(STAGING, self._states[k].version, version)

    def commit(self, replica: int, version: int) -> None:
        """`replica` says that it serves `version` now, which it was staging."""
        state = self._states[replica]
        assert state.next_version == version, f"{name_of(replica)} commits {version} while it is {state}"
        self._states[replica] = ReplicaState(SERVING, version)
        self.version = max(self.version, version)

    def discard(self, replica: int) -> None:
        """`replica` serves what it served before `begin`; one that has never served is joining again."""
        serves = self._states[replica].version
        self._states[replica] = ReplicaState(JOINING if serves is None else SERVING, serves)

    def leave_out(self, replica: int, reason: str) -> None:
        """`replica` takes part in nothing any more. The first reason stays."""
        if self._states[replica].kind != FAILED:
            self._states[replica] = ReplicaState(FAILED, reason=reason)

    def join(self, replica: int, actor: Any) -> None:
        """A new actor in the place of a failed one, or in a new place."""
        state = self._states.get(replica)
        assert state is None or state.kind == FAILED, (
            f"{name_of(replica)} is {state}; only a failed one is replaced"
        )
        self._actors[replica], self._states[replica] = actor, ReplicaState(JOINING)


def name_of(replica: int) -> str:
    """How messages call a replica."""
    return f"generator {replica}"


def replica_of(who: str, members: Sequence[int], workers_per_replica: int) -> int | None:
    """The replica behind a name in a failure: "generator 3", or "gen 5" for a worker of it; None for anybody else."""
    side, _, number = who.rpartition(" ")
    if not number.isdigit():
        return None
    if side == "generator":
        return int(number)
    position = int(number) // workers_per_replica
    return members[position] if side == "gen" and position < len(members) else None


def _words(states: Mapping[str, str]) -> str:
    return "; ".join(f"{who} {state}" for who, state in states.items())

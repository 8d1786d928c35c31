"""The generators of a job over time: who is left out and why, who replaces whom, and what each serves."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from refit.service.fleet import FAILED, STAGING, Fleet, name_of
from refit.service.waiting import Answers, gather
from refit.transfer.errors import Failure, RefitFailed, TransportError

TRAINER = "train rank "


class Supply(Protocol):
    """Ends lost generators and makes new ones; `refit.service.cluster.Cluster` is one."""

    def end_generator(self, replica: int) -> None:
        """End all processes of a replica, also those that are stopped."""

    def restart_generator(self, replica: int) -> Replacement | None:
        """Begin to build a new one in its place; None when no more may be made."""


class TrainerLost(RefitFailed):
    """A trainer is gone with its share of the weights: nothing can be repeated without it."""


class NotCommitted(TransportError):  # noqa: N818 - named like TrainerLost
    """A version was decided on, and `replicas` serve an older one still."""

    def __init__(self, replicas: tuple[int, ...], message: str) -> None:
        super().__init__(message)
        self.replicas = replicas


@dataclass(frozen=True, slots=True)
class Replacement:
    """A new actor, and the reference of its `build` call, which is under way."""

    actor: Any
    built: Any


class Roster:
    """The fleet, with what it takes to leave one out and to let another join."""

    def __init__(self, generators: Sequence[Any], supply: Supply | None) -> None:
        self.fleet = Fleet(generators)
        self._incidents: list[str] = []
        self._supply = supply
        self._coming: dict[int, Replacement] = {}

    @staticmethod
    def named(actors: Mapping[int, Any]) -> dict[str, Any]:
        return {name_of(replica): actor for replica, actor in actors.items()}

    def note(self, words: str) -> None:
        self._incidents.append(words)

    def take_incidents(self) -> tuple[str, ...]:
        """What went wrong since this was last asked, in words."""
        taken, self._incidents = tuple(self._incidents), []
        return taken

    def drop(self, replica: int, reason: str) -> None:
        """Leave one generator out: end it, and order a replacement if there may be one."""
        actor = self.fleet.members[replica]
        self.fleet.leave_out(replica, reason)
        self.note(f"left out {name_of(replica)}: {reason}")
        if self._supply is None:
            with contextlib.suppress(Exception):  # it may be dead already, which is what is wanted
                ray.kill(actor)
            return
        self._supply.end_generator(replica)
        self._order(replica)

    def ask_versions(self, timeout_s: float) -> None:
        """Take in what each generator serves: one that another job has refitted is not at version 0.

        Those that died or fell silent are left out. Raises RefitFailed when a living one cannot say it.
        """
        calls = {who: actor.weight_version.remote() for who, actor in self.named(self.fleet.members).items()}
        answers = gather(calls, "prepare", timeout_s, settle_s=timeout_s)
        lost = self.leave_out(answers, "prepare", timeout_s)
        for who, failure in answers.failures.items():
            if who not in lost:
                raise RefitFailed(failure[1])
        for replica in self.fleet.members:
            self.fleet.found(replica, answers.results[name_of(replica)])

    def leave_out(self, answers: Answers, phase: str, probe_s: float) -> tuple[str, ...]:
        """Drop the generators that died, fell silent, or say that they can serve no more. Returns their names.

        Raises TrainerLost if a trainer was lost, after that.
        """
        members = self.named(self.fleet.members)
        reasons = {who: str(failure.message) for who, (died, failure) in answers.failures.items() if died}
        reasons |= dict.fromkeys(answers.silent, f"no answer in phase {phase!r}")
        doubtful = {who: members[who] for who in answers.failures if who in members and who not in reasons}
        reasons |= _unfit(doubtful, phase, probe_s)
        lost = [replica for replica in self.fleet.members if name_of(replica) in reasons]
        for replica in lost:
            self.drop(replica, reasons[name_of(replica)])
        for who, reason in reasons.items():
            if who.startswith(TRAINER):
                raise TrainerLost(Failure(phase, who, f"lost, and nothing goes on without it: {reason}"))
        return tuple(name_of(replica) for replica in lost)

    def settle(self, version: int, serving: Mapping[str, int], commit: bool) -> None:
        """Take in what each staging generator says it serves after a commit or a discard; silence changes nothing."""
        for replica in self.fleet.members:
            state, says = self.fleet.state(replica), serving.get(name_of(replica))
            if state.kind != STAGING:
                continue
            if commit and says == version:
                self.fleet.commit(replica, version)
                continue
            self.fleet.discard(replica)
            if not commit and says == version != state.version:
                self.drop(replica, f"it serves version {version}, which was discarded")

    def require_committed(self, version: int, cause: Failure | None) -> None:
        """Raises NotCommitted if a generator that is left does not serve `version`, which all were to commit."""
        behind = tuple(k for k in self.fleet.members if self.fleet.state(k).version != version)
        if behind:
            names = ", ".join(name_of(replica) for replica in behind)
            words = (
                f"version {version} was to be committed, but {names} did not, and serves as before: {cause}"
            )
            raise NotCommitted(behind, words)

    def admit(self, timeout_s: float) -> bool:
        """Let replacements that are built join; True if there was one. With no member left, waits for the first."""
        joined = False
        while self._coming:
            patience_s = 0.0 if self.fleet.members else timeout_s
            references = [coming.built for coming in self._coming.values()]
            done, _ = ray.wait(references, num_returns=1, timeout=patience_s)
            if not done:
                break
            replica = next(k for k, coming in self._coming.items() if coming.built == done[0])
            coming = self._coming.pop(replica)
            answers = gather({name_of(replica): coming.built}, "build", timeout_s)
            if answers.cause is None:
                self.fleet.join(replica, coming.actor)
                joined = True
                continue
            self.note(f"the replacement of {name_of(replica)} failed: {answers.cause}")
            if self._supply is not None:
                self._supply.end_generator(replica)
            self._order(replica)
        return joined

    def _order(self, replica: int) -> None:
        assert self.fleet.state(replica).kind == FAILED, f"{name_of(replica)} has not failed"
        coming = self._supply.restart_generator(replica) if self._supply is not None else None
        if coming is not None:
            self._coming[replica] = coming


def _unfit(doubtful: Mapping[str, Any], phase: str, probe_s: float) -> dict[str, str]:
    """Those of `doubtful`, whose calls failed, that cannot serve: {name: reason}."""
    if not doubtful:
        return {}
    answers = gather({who: actor.condition.remote() for who, actor in doubtful.items()}, phase, probe_s)
    reasons = {who: failure.message for who, (_, failure) in answers.failures.items()}
    reasons |= dict.fromkeys(answers.silent, f"no answer in phase {phase!r}")
    return reasons | {who: reason for who, reason in answers.results.items() if reason}

"""Waiting for several actors at once, with a deadline, and reporting the cause rather than the last symptom."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from refit.transfer.errors import Failure, RefitFailed, TransportError

TICK_S = 0.25
GRACE_S = 3.0
REFIT_BOUND = "refit.timeout_s bounds this wait"
FIXED_BOUND = "a fixed limit"

type Waiting = Callable[[tuple[str, ...]], None]


@dataclass(frozen=True, slots=True)
class Answers:
    """How each of several calls ended, by name: a result, a failure, or silence until the end of the wait.

    `failures` holds (its process died, failure), the earliest first.
    """

    results: Mapping[str, Any]
    failures: Mapping[str, tuple[bool, Failure]]
    silent: tuple[str, ...]

    @property
    def cause(self) -> Failure | None:
        """The first death if there is one, else the first failure."""
        return root_cause(list(self.failures.values())) if self.failures else None


def gather(
    pending: Mapping[str, Any],
    phase: str,
    timeout_s: float,
    *,
    settle_s: float = GRACE_S,
    on_failure: Callable[[Failure], object] | None = None,
    on_tick: Waiting | None = None,
) -> Answers:
    """Wait for {who: object reference} until all have ended, or until `settle_s` after the first failure.

    Running out of time counts as a failure of phase `phase` if `on_failure` is given: it is called once, at the first
    one, so that those who still run can be told; they too have `settle_s` then. `on_tick` is told who is still
    awaited, several times a second. Raises nothing of its own.
    """
    who_of = {reference: who for who, reference in pending.items()}
    waiting, results = list(who_of), dict[str, Any]()
    failures: dict[str, tuple[bool, Failure]] = {}
    deadline_s, told = time.monotonic() + timeout_s, False
    while waiting:
        if on_tick is not None:
            on_tick(tuple(who_of[reference] for reference in waiting))
        late = time.monotonic() >= deadline_s
        if late and (told or on_failure is None):
            break
        if (failures or late) and not told:
            told, deadline_s = True, min(deadline_s, time.monotonic()) + settle_s
            if on_failure is not None:
                on_failure(_first(failures, phase, timeout_s, [who_of[one] for one in waiting]))
        done, waiting = ray.wait(waiting, num_returns=1, timeout=min(TICK_S, timeout_s))
        for reference in done:
            try:
                results[who_of[reference]] = ray.get(reference)
            except RayError as error:
                failures[who_of[reference]] = _failure(error, who_of[reference], phase)
    if failures and not told and on_failure is not None:
        on_failure(_first(failures, phase, timeout_s, []))
    ordered = {who: results[who] for who in pending if who in results}
    return Answers(ordered, failures, tuple(who_of[reference] for reference in waiting))


def collect(
    pending: Mapping[str, Any],
    phase: str,
    timeout_s: float,
    on_tick: Waiting | None = None,
    bound: str = REFIT_BOUND,
) -> dict[str, Any]:
    """The results of {who: object reference}, in the order given.

    The first failure ends the wait. Others then get GRACE_S to fail too, because the survivors of a death often
    report first: a dead process beats an error as the cause, an earlier error beats a later one. Raises RefitFailed
    with that cause, or TransportError naming who has not answered within `timeout_s`. `on_tick` as in `gather`;
    `bound` says where the limit comes from.
    """
    started_s = time.monotonic()
    answers = gather(pending, phase, timeout_s, on_tick=on_tick)
    if answers.cause is not None:
        raise RefitFailed(answers.cause)
    if answers.silent:
        raise TransportError(no_answer(phase, answers.silent, time.monotonic() - started_s, bound))
    return dict(answers.results)


def no_answer(phase: str, who: tuple[str, ...], waited_s: float, bound: str = REFIT_BOUND) -> str:
    """The words for a missed deadline, with the key that a person may change."""
    return (
        f"{phase}: no answer from {', '.join(who)} after {waited_s:.0f} s "
        f"({bound}); look into the logs folder of the run"
    )


def root_cause(failures: list[tuple[bool, Failure]]) -> Failure:
    """The first death if there is one, else the first failure. `failures` holds (is a death, failure) in order."""
    return next((failure for died, failure in failures if died), failures[0][1])


def _first(
    failures: Mapping[str, tuple[bool, Failure]], phase: str, timeout_s: float, waiting: list[str]
) -> Failure:
    if failures:
        return root_cause(list(failures.values()))
    return Failure(phase, "coordinator", no_answer(phase, tuple(waiting), timeout_s))


def _failure(error: RayError, who: str, phase: str) -> tuple[bool, Failure]:
    if isinstance(error, RayActorError):
        return True, Failure(phase, who, "its process died; look into its file in the logs folder of the run")
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RefitFailed):
        return False, cause.failure
    return False, Failure(phase, who, f"{type(cause).__name__}: {cause}")

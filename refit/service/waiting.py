"""Waiting for several actors at once, with a deadline, and reporting the cause rather than the last symptom."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from refit.transfer.errors import Failure, RefitFailed, TransportError

TICK_S = 0.25
GRACE_S = 3.0


def collect(
    pending: Mapping[str, Any],
    phase: str,
    timeout_s: float,
    on_tick: Callable[[tuple[str, ...]], None] | None = None,
) -> dict[str, Any]:
    """The results of {who: object reference}, in the order given.

    The first failure ends the wait. Others then get GRACE_S to fail too, because the survivors of a death often
    report first: a dead process beats an error as the cause, an earlier error beats a later one. Raises RefitFailed
    with that cause, or TransportError naming who has not answered within `timeout_s`. `on_tick` is told who is
    still awaited, several times a second.
    """
    who_of = {reference: who for who, reference in pending.items()}
    waiting, results = list(who_of), dict[str, Any]()
    failures: list[tuple[bool, Failure]] = []
    deadline_s, started_s = time.monotonic() + timeout_s, time.monotonic()
    while waiting and time.monotonic() < deadline_s:
        if on_tick is not None:
            on_tick(tuple(who_of[reference] for reference in waiting))
        done, waiting = ray.wait(waiting, num_returns=1, timeout=min(TICK_S, timeout_s))
        for reference in done:
            try:
                results[who_of[reference]] = ray.get(reference)
            except RayError as error:
                if not failures:
                    deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
                failures.append(_failure(error, who_of[reference], phase))
    if failures:
        raise RefitFailed(root_cause(failures))
    if waiting:
        missing = ", ".join(who_of[reference] for reference in waiting)
        raise TransportError(
            f"{phase}: no answer from {missing} after {time.monotonic() - started_s:.0f} s "
            f"(refit.timeout_s bounds this wait); look into the logs folder of the run"
        )
    return {who: results[who] for who in pending}


def root_cause(failures: list[tuple[bool, Failure]]) -> Failure:
    """The first death if there is one, else the first failure. `failures` holds (is a death, failure) in order."""
    return next((failure for died, failure in failures if died), failures[0][1])


def _failure(error: RayError, who: str, phase: str) -> tuple[bool, Failure]:
    if isinstance(error, RayActorError):
        return True, Failure(phase, who, "its process died; look into its file in the logs folder of the run")
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RefitFailed):
        return False, cause.failure
    return False, Failure(phase, who, f"{type(cause).__name__}: {cause}")

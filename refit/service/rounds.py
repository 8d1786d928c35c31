"""What prepare and refit say to the actors, and how the driver waits for both sides of a protocol at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from refit.plan import DEFAULT_WHITELIST, PlanOptions
from refit.service.agreement import Terms
from refit.service.config import JobConfig
from refit.service.fleet import name_of
from refit.service.roster import TRAINER
from refit.service.waiting import GRACE_S, Answers, gather
from refit.transfer.errors import RefitFailed, TransportError
from refit.transfer.protocol import FinishReport
from refit.transfer.rendezvous import ControlStore

SETTLE_S = (
    20.0  # longest wait for the others to end their calls after a failure; who has not by then is stuck
)


@dataclass(frozen=True, slots=True)
class Joint[T]:
    """Both halves of one protocol: how the actors' calls ended, and the coordinator's own result or error."""

    answers: Answers
    result: T | None
    error: Exception | None

    @property
    def cause(self) -> Exception | None:
        """What ended it, if anything did: an error of the coordinator's own, or the root cause among all failures."""
        if self.error is not None and not isinstance(self.error, RefitFailed):
            return self.error
        if self.answers.cause is not None:
            return RefitFailed(self.answers.cause)
        if self.error is None and self.answers.silent:
            return TransportError(f"no answer from {', '.join(self.answers.silent)}")
        return self.error


@dataclass(frozen=True, slots=True)
class Finish:
    """A generator's answer to `finish`: what it serves now, how long it sampled no token, and its workers' reports."""

    version: int
    halt_s: float
    reports: tuple[FinishReport, ...]

    @classmethod
    def of_answer(cls, answer: Sequence[Any]) -> Finish:
        version, halt_s, *messages = answer
        return cls(version, halt_s, tuple(FinishReport.of_message(message) for message in messages))


def reports_by_rank(
    finishes: Mapping[str, Finish], ranks: Mapping[int, Sequence[int]]
) -> dict[int, FinishReport]:
    """By generator rank; `ranks` says which are a replica's. Who has not answered, or reports nothing, is missing."""
    found: dict[int, FinishReport] = {}
    for replica, mine in ranks.items():
        finish = finishes.get(name_of(replica))
        found |= dict(zip(mine, () if finish is None else finish.reports, strict=False))
    return found


def together[T](
    control: ControlStore, calls: Mapping[str, Any], phase: str, protocol: Callable[[], T], timeout_s: float
) -> Joint[T]:
    """Run the coordinator's share of a protocol beside the actors' calls, waiting on both sides at once.

    Whoever fails first ends it for all: an actor's failure is told to the control store, which frees this side and the
    other ranks; a failure of the protocol itself is told to the ranks, whose calls then end. Raises nothing.
    """
    with ThreadPoolExecutor(1, thread_name_prefix=f"refit-{phase}") as pool:
        own = pool.submit(_telling, control, phase, protocol)
        answers = gather(
            calls,
            phase,
            timeout_s + GRACE_S,
            settle_s=settle_s(timeout_s),
            on_failure=lambda failure: control.fail(failure.phase, failure.who, failure.message),
        )
        answers = _with_late_trainers(answers, calls, phase, timeout_s)
        try:
            return Joint(answers, own.result(), None)
        except Exception as error:
            return Joint(answers, None, error)


def _with_late_trainers(answers: Answers, calls: Mapping[str, Any], phase: str, timeout_s: float) -> Answers:
    """A trainer is given longer to end its call: its export goes on after a failure, and without it nothing does."""
    late = {who: calls[who] for who in answers.silent if who.startswith(TRAINER)}
    if not late:
        return answers
    more = gather(late, phase, timeout_s)
    silent = tuple(who for who in answers.silent if who not in late) + more.silent
    return Answers({**answers.results, **more.results}, {**answers.failures, **more.failures}, silent)


def settle_s(timeout_s: float) -> float:
    """How long those who have not failed may take to end after the first failure."""
    return max(GRACE_S, min(SETTLE_S, timeout_s / 4))


def terms_of(config: JobConfig, num_replicas: int) -> Terms:
    return Terms(
        num_train=config.policy.world_size,
        num_gen=config.generation.workers_per_replica * num_replicas,
        options=PlanOptions(bucket_bytes=config.refit.buffer_bytes, whitelist=whitelist_of(config)),
        backend=config.refit.backend,
        transport=config.refit.transport,
        bulk=config.refit.bulk,
        delta=config.refit.delta,
        num_streams=config.num_streams,
        timeout_s=config.refit.timeout_s,
    )


def whitelist_of(config: JobConfig) -> tuple[str, ...]:
    """Patterns of tensors that may be bulk. The conventional refit is the same path with none: all tensors are misc."""
    if not config.policy.nccl_xfer_refit:
        return ()
    if not config.refit.force_misc:
        return DEFAULT_WHITELIST
    excluded = "|".join(f"(?:{pattern})" for pattern in config.refit.force_misc)
    return tuple(rf"(?!(?:{excluded})\Z)(?:{pattern})" for pattern in DEFAULT_WHITELIST)


def prepare_calls(
    config: JobConfig, control: ControlStore, trainers: Mapping[str, Any], members: Mapping[str, Any]
) -> dict[str, Any]:
    """Start prepare on every actor. A replica's place among `members` decides its ranks in this plan."""
    store, timeout_s = f"{control.address}:{control.port}", config.refit.timeout_s
    calls = {
        who: actor.prepare_refit.remote(store, control.run_id, timeout_s) for who, actor in trainers.items()
    }
    for position, (who, actor) in enumerate(members.items()):
        init_info = {
            "action": "prepare",
            "store": store,
            "run_id": control.run_id,
            "first_gen_rank": position * config.generation.workers_per_replica,
            "replica": position,
            "timeout_s": timeout_s,
        }
        calls[who] = actor.prepare_refit.remote(init_info)
    return calls


def _telling[T](control: ControlStore, phase: str, protocol: Callable[[], T]) -> T:
    try:
        return protocol()
    except RefitFailed:
        raise
    except Exception as error:
        control.fail(phase, "coordinator", str(error))
        raise

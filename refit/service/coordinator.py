"""The refit round, seen from the driver: prepare, stage, compare digests, commit on all engines or on none."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray

from refit.plan import DEFAULT_WHITELIST, Plan, PlanOptions
from refit.service.agreement import (
    Mismatch,
    Terms,
    agree_on_plan,
    collect_reports,
    compare,
    describe_mismatches,
    mismatches_of,
    sent_digests,
)
from refit.service.config import JobConfig
from refit.service.waiting import collect
from refit.transfer.errors import Failure, RefitFailed, TransportError
from refit.transfer.protocol import decision_key
from refit.transfer.rendezvous import ControlStore


@dataclass(frozen=True, slots=True)
class RefitRecord:
    """One attempt to bring a version to all replicas.

    `seconds` holds, by phase, the slowest rank's time, and the driver's own `stage` and `commit` that contain them;
    `bulk_bytes` and `misc_bytes` count each element of the model once, `wire_bytes` what all trainers sent point to
    point. `reason` is empty when `committed`.
    """

    version: int
    attempt: int
    seconds: Mapping[str, float]
    total_s: float
    bulk_bytes: int
    misc_bytes: int
    bulk_share: float
    wire_bytes: int
    peak_extra_bytes: int
    committed: bool
    reason: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What the engines hold now against what the trainers hold now.

    `mismatches` are tensors whose live elements differ; `changed_params` names, per generator rank, live parameters
    whose bytes are no longer those of the commit (found also where vLLM packs a layout that cannot be digested).
    """

    mismatches: tuple[Mismatch, ...]
    changed_params: tuple[tuple[int, str], ...]
    params_sha256: tuple[Mapping[str, str], ...]

    @property
    def ok(self) -> bool:
        return not self.mismatches and not self.changed_params


class Coordinator:
    """Knows the plan and all actors; owns the control store. Made by `prepare`."""

    def __init__(
        self,
        control: ControlStore,
        plan: Plan,
        trainers: Sequence[Any],
        generators: Sequence[Any],
        timeout_s: float,
    ) -> None:
        self.plan = plan
        self._control = control
        self._trainers = tuple(trainers)
        self._generators = tuple(generators)
        self._timeout_s = timeout_s
        self._attempt = 0
        self._num_audits = 0

    @classmethod
    def prepare(cls, config: JobConfig, trainers: Sequence[Any], generators: Sequence[Any]) -> Coordinator:
        """Both sides describe, one plan is agreed, groups open.

        Raises PlanError for contradicting descriptions, RefitFailed or TransportError with the cause when a rank fails
        or does not answer within `refit.timeout_s`. Nothing is left open then.
        """
        address = _control_address(config)
        control = ControlStore.host(address, config.cluster.port, run_id=secrets.token_hex(8))
        try:
            calls = _prepare_calls(config, control, trainers, generators)
            terms = _terms(config)
            plan, _ = _together(
                control, calls, "prepare", lambda: agree_on_plan(control, terms), terms.timeout_s
            )
        except BaseException:
            control.close()
            raise
        return cls(control, plan, trainers, generators, terms.timeout_s)

    def refit(self, version: int) -> RefitRecord:
        """Bring `version` to all engines. Returns a record; `committed` is False when digests disagreed, and then the
        old version keeps serving. Raises RefitFailed or TransportError when a rank failed or hung.
        """
        self._attempt += 1
        attempt, started_s = self._attempt, time.monotonic()
        calls = {
            f"train rank {k}": actor.refit.remote(version, attempt) for k, actor in self._each(self._trainers)
        }
        calls |= {
            f"generator {k}": actor.stage.remote(version, attempt)
            for k, actor in self._each(self._generators)
        }
        (reports, reason), _ = _together(
            self._control, calls, "refit", lambda: self._decide(attempt), self._timeout_s
        )
        staged_s = time.monotonic()
        finishing = {
            f"generator {k}": actor.finish.remote(version, attempt)
            for k, actor in self._each(self._generators)
        }
        versions = collect(finishing, "commit", self._timeout_s)
        _require_version(versions, version, committed=not reason)
        done_s = time.monotonic()
        driver = {"stage": staged_s - started_s, "commit": done_s - staged_s}
        return self._record(version, reports, reason, driver)

    def verify(self) -> VerifyReport:
        """Audit every engine's live memory against the trainers' weights as they are now. Moves no weights."""
        self._num_audits += 1
        audit = str(self._num_audits)
        calls = {f"train rank {k}": actor.verify_digests.remote() for k, actor in self._each(self._trainers)}
        calls |= {f"generator {k}": actor.audit.remote(audit) for k, actor in self._each(self._generators)}
        answers = collect(calls, "verify", self._timeout_s)
        trainers = [{"digests": answers[f"train rank {k}"]} for k, _ in self._each(self._trainers)]
        audits: list[Any] = [
            self._control.get(f"audit/{audit}/{gen_rank}", self._timeout_s)
            for gen_rank in range(self.plan.num_gen)
        ]
        mismatches: list[Mismatch] = []
        for gen_rank, audited in enumerate(audits):
            sent = sent_digests(trainers, self.plan.num_train + gen_rank)
            live = audited["digests"]
            mismatches += compare(gen_rank, {name: sent[name] for name in sent if name in live}, live)
        changed = tuple((rank, name) for rank, audited in enumerate(audits) for name in audited["changed"])
        return VerifyReport(
            tuple(sorted(mismatches, key=str)), changed, tuple(a["params_sha256"] for a in audits)
        )

    def close(self) -> None:
        """Give the control store up. The actors are the cluster's."""
        self._control.close()

    def _decide(self, attempt: int) -> tuple[dict[int, Any], str]:
        reports = collect_reports(self._control, self.plan, attempt, self._timeout_s)
        mismatches = mismatches_of(self.plan, reports)
        reason = describe_mismatches(mismatches)
        self._control.put(decision_key(attempt), {"commit": not mismatches, "reason": reason})
        return reports, reason

    def _record(
        self, version: int, reports: Mapping[int, Any], reason: str, driver: Mapping[str, float]
    ) -> RefitRecord:
        phases = sorted({phase for report in reports.values() for phase in report["seconds"]})
        slowest = {
            phase: max(report["seconds"].get(phase, 0.0) for report in reports.values()) for phase in phases
        }
        bulk_bytes, misc_bytes = self.plan.bulk_bytes, self.plan.misc_bytes
        return RefitRecord(
            version=version,
            attempt=self._attempt,
            seconds={**slowest, **driver},
            total_s=sum(driver.values()),
            bulk_bytes=bulk_bytes,
            misc_bytes=misc_bytes,
            bulk_share=bulk_bytes / (bulk_bytes + misc_bytes),
            wire_bytes=sum(report["bytes_sent"] for report in reports.values()),
            peak_extra_bytes=max(report["peak_extra_bytes"] for report in reports.values()),
            committed=not reason,
            reason=reason,
        )

    @staticmethod
    def _each(actors: Sequence[Any]) -> list[tuple[int, Any]]:
        return list(enumerate(actors))


def _control_address(config: JobConfig) -> str:
    """Loopback for a Ray of our own; on an existing cluster this node's address, which its other nodes reach."""
    return "127.0.0.1" if config.cluster.address is None else str(ray.util.get_node_ip_address())


def whitelist_of(config: JobConfig) -> tuple[str, ...]:
    """Patterns of tensors that may be bulk. The conventional refit is the same path with none: all tensors are misc."""
    if not config.policy.nccl_xfer_refit:
        return ()
    if not config.refit.force_misc:
        return DEFAULT_WHITELIST
    excluded = "|".join(f"(?:{pattern})" for pattern in config.refit.force_misc)
    return tuple(rf"(?!(?:{excluded})\Z)(?:{pattern})" for pattern in DEFAULT_WHITELIST)


def _terms(config: JobConfig) -> Terms:
    return Terms(
        num_train=config.policy.world_size,
        num_gen=config.generation.world_size,
        options=PlanOptions(bucket_bytes=config.refit.buffer_bytes, whitelist=whitelist_of(config)),
        backend=config.refit.backend,
        bulk=config.refit.bulk,
        num_streams=config.refit.num_streams,
        timeout_s=config.refit.timeout_s,
    )


def _prepare_calls(
    config: JobConfig, control: ControlStore, trainers: Sequence[Any], generators: Sequence[Any]
) -> dict[str, Any]:
    store, timeout_s = f"{control.address}:{control.port}", config.refit.timeout_s
    calls = {
        f"train rank {rank}": actor.prepare_refit.remote(store, control.run_id, timeout_s)
        for rank, actor in enumerate(trainers)
    }
    for replica, actor in enumerate(generators):
        init_info = {
            "action": "prepare",
            "store": store,
            "run_id": control.run_id,
            "first_gen_rank": replica * config.generation.workers_per_replica,
            "replica": replica,
            "timeout_s": timeout_s,
        }
        calls[f"generator {replica}"] = actor.prepare_refit.remote(init_info)
    return calls


def _together[T](
    control: ControlStore, calls: Mapping[str, Any], phase: str, protocol: Callable[[], T], timeout_s: float
) -> tuple[T, dict[str, Any]]:
    """Run the coordinator's share of a protocol beside the actors' calls, waiting on both sides at once.

    Whoever fails first ends it for all: an actor's failure is told to the control store, which frees this side and the
    other ranks; a failure of the protocol itself is told to the ranks, whose calls then end.
    """
    with ThreadPoolExecutor(1, thread_name_prefix=f"refit-{phase}") as pool:
        answer = pool.submit(_telling, control, phase, protocol)
        try:
            results = collect(calls, phase, timeout_s)
        except RefitFailed as error:
            failure = error.failure
            control.fail(failure.phase, failure.who, failure.message)
            own = answer.exception()
            if own is not None and not isinstance(own, RefitFailed):
                raise own from None
            raise
        except TransportError as error:
            raise RefitFailed(control.fail(phase, "coordinator", str(error))) from error
        return answer.result(), results


def _telling[T](control: ControlStore, phase: str, protocol: Callable[[], T]) -> T:
    try:
        return protocol()
    except RefitFailed:
        raise
    except Exception as error:
        control.fail(phase, "coordinator", str(error))
        raise


def _require_version(versions: Mapping[str, int], version: int, committed: bool) -> None:
    """Every engine must serve `version` after a commit, and must not after a discard."""
    for who, serving in versions.items():
        if (serving == version) != committed:
            word = "committed" if committed else "discarded"
            message = f"version {version} was {word}, but this engine says that it serves version {serving}"
            raise RefitFailed(Failure("commit", who, message))

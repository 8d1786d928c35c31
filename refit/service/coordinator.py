"""The refit round, seen from the driver: prepare, stage, compare digests, commit on all engines or on none.

A generator that is lost in whatever phase is left out at once, and the round goes on for the rest: under new keys of
the control store and in new groups, since both hold all ranks. Trainers and living engines keep everything else.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import ray

from refit.plan import Plan
from refit.service.agreement import (
    Mismatch,
    VerifyReport,
    agree_on_plan,
    collect_reports,
    describe_mismatches,
    judge_audit,
    mismatches_of,
)
from refit.service.config import JobConfig
from refit.service.fleet import replica_of
from refit.service.locate import locate, suspects_of
from refit.service.reader import Reader, reader_in_job
from refit.service.refit_record import PlanRecord, RefitRecord, Round, record_plan, record_round
from refit.service.roster import NotCommitted, Roster, Supply, TrainerLost
from refit.service.rounds import (
    Finish,
    Joint,
    prepare_calls,
    reports_by_rank,
    settle_s,
    terms_of,
    together,
)
from refit.service.session import Session
from refit.service.waiting import Answers, gather
from refit.transfer.errors import Failure, RefitFailed, TransportError
from refit.transfer.protocol import attempt_keys, audit_keys, decision_key, suspects_key
from refit.transfer.rendezvous import ControlStore


@dataclass(frozen=True, slots=True)
class _Decided:
    """All ranks' reports and what came of comparing their digests, which took `seconds`."""

    reports: Mapping[int, Any]
    mismatches: tuple[Mismatch, ...]
    seconds: float

    @property
    def reason(self) -> str:
        """Why it is discarded; "" if it is committed."""
        return describe_mismatches(self.mismatches)


class Coordinator:
    """Knows the plan, all actors and what each replica serves; owns the control store. Made by `prepare`."""

    def __init__(
        self,
        config: JobConfig,
        host: ControlStore,
        trainers: Sequence[Any],
        generators: Sequence[Any],
        supply: Supply | None,
    ) -> None:
        self._config = config
        self._host = host
        self._trainers = {f"train rank {rank}": actor for rank, actor in enumerate(trainers)}
        self._roster = Roster(generators, supply)
        self._session: Session | None = None
        self._seated: tuple[
            int, ...
        ] = ()  # the replicas of the newest prepare by place, also of one that failed
        self._stale = True
        self._num_sessions = 0
        self._forgettable: list[ControlStore] = []
        self._attempt = 0
        self._num_audits = 0
        self._blamed: tuple[int, ...] = ()

    @classmethod
    def prepare(
        cls,
        config: JobConfig,
        trainers: Sequence[Any],
        generators: Sequence[Any],
        supply: Supply | None = None,
    ) -> Coordinator:
        """Both sides describe, one plan is agreed, groups open. `supply` ends and replaces lost generators.

        Generators that die on the way are left out; those that an earlier job has refitted keep their version, and
        refits go on above the largest. Raises PlanError for contradicting descriptions, RefitFailed or
        TransportError with the cause when a rank fails or does not answer within `refit.timeout_s`, and then nothing
        is left open.
        """
        host = ControlStore.host(
            _control_address(config), config.cluster.port, secrets.token_hex(8), config.refit.timeout_s
        )
        coordinator = cls(config, host, trainers, generators, supply)
        try:
            coordinator._roster.ask_versions(config.refit.timeout_s)
            coordinator._repeat(coordinator._prepared)
        except BaseException:
            host.close()
            raise
        return coordinator

    @property
    def plan(self) -> Plan:
        """The plan of the replicas that took part in the last prepare."""
        return self._require_session().plan

    @property
    def plan_record(self) -> PlanRecord:
        """The same plan, summed up by link."""
        return self._require_session().plan_record

    @property
    def version(self) -> int:
        """The newest version that any replica has served; the next refit must be to a larger one."""
        return self._roster.fleet.version

    def serving(self) -> dict[str, Any]:
        """{name: actor} of every replica that serves the newest version; the only ones to be asked to generate."""
        return self._roster.named(self._roster.fleet.serving)

    def states(self) -> dict[str, str]:
        """{name: state} of every replica."""
        return self._roster.fleet.states()

    def leave_out(self, answers: Answers, phase: str) -> tuple[str, ...]:
        """Leave out the generators that died, fell silent or can serve no more, by how their calls ended; names them.

        Raises TrainerLost if a trainer was lost: nothing can go on without it.
        """
        lost = self._roster.leave_out(answers, phase, self._probe_s)
        self._stale = self._stale or bool(lost)
        return lost

    def reopen(self) -> None:
        """Let the next refit begin with a new prepare, for example after parameters were made anew."""
        self._stale = True

    def refit(self, version: int) -> RefitRecord:
        """Bring `version` to all engines. Returns a record; `committed` is False when digests disagreed, and then the
        old version keeps serving.

        A generator that dies, hangs or breaks is left out and the rest are refitted; a round that failed without a
        loss is repeated `refit.retries` times. Replaced generators that are ready join here. Raises RefitFailed or
        TransportError when a trainer is lost, no generator is left, or the rounds are used up.
        """
        if version <= self.version:
            reason = f"versions only grow: {self.version} was served, so a refit to {version} is refused"
            raise RefitFailed(Failure("refit", "coordinator", reason))
        record = self._refit(version)
        return replace(record, replicas=self.states(), incidents=self._roster.take_incidents())

    def _refit(self, version: int) -> RefitRecord:
        self._stale = self._roster.admit(self._config.cluster.build_timeout_s) or self._stale
        for _ in range(self._config.refit.retries + 1):
            record = self._repeat(lambda: self._round(version))
            if record.committed:
                return record
            self._roster.note(f"discarded: {record.reason}")
        if not self._left_out_for(self._blamed, record.reason):
            return record
        return self._repeat(lambda: self._round(version))

    def verify(self) -> VerifyReport:
        """Audit every engine's live memory against the trainers' weights as they are now. Moves no weights."""
        session = self._require_session()
        self._num_audits += 1
        audit = str(self._num_audits)
        calls = {who: actor.verify_digests.remote() for who, actor in self._trainers.items()}
        calls |= {who: actor.audit.remote(audit) for who, actor in self.serving().items()}
        answers = gather(calls, "verify", self._timeout_s, settle_s=self._timeout_s)
        if answers.cause is not None or answers.silent:
            lost = self.leave_out(answers, "verify")
            if not lost or not self.serving() or not self._trainers.keys() <= answers.results.keys():
                raise RefitFailed(answers.cause or Failure("verify", "coordinator", "no answer"))
        audited = {
            gen_rank: self._audit_of(session, audit, gen_rank)
            for gen_rank in session.gen_ranks(self._roster.fleet.serving)
        }
        session.control.forget(audit_keys(audit))
        return judge_audit(session.plan, [answers.results[who] for who in self._trainers], audited)

    def reader(self, place: int = 0) -> Reader:
        """Reads of what the `place`-th engine of the last prepare serves."""
        return reader_in_job(self._host, place, self._require_session().workers_per_replica, self._timeout_s)

    def close(self) -> None:
        """Give the control store up. The actors are the cluster's."""
        self._host.close()

    @property
    def _timeout_s(self) -> float:
        return self._config.refit.timeout_s

    @property
    def _probe_s(self) -> float:
        return settle_s(self._timeout_s)

    def _require_session(self) -> Session:
        assert self._session is not None, "a coordinator is made by prepare()"
        return self._session

    def _audit_of(self, session: Session, audit: str, gen_rank: int) -> Any:
        """What a worker has put: its engine has answered since. A failure that the session saw before is no matter."""
        found = session.control.peek(f"{audit_keys(audit)}{gen_rank}")
        if found is None:
            raise TransportError(f"gen rank {gen_rank} answered audit {audit} without its digests")
        return found

    def _repeat[T](self, attempt: Callable[[], T]) -> T:
        """Until it succeeds: each failure must have cost a generator, which is then left out, or uses up a retry."""
        retries = self._config.refit.retries
        while True:
            try:
                return attempt()
            except _Lost:
                continue
            except TrainerLost:
                raise
            except (RefitFailed, TransportError) as error:
                self._stale = True
                if retries > 0:
                    retries -= 1
                    self._roster.note(f"repeated after: {error}")
                elif not self._left_out_for(self._replicas_behind(error), str(error)):
                    raise

    def _left_out_for(self, blamed: Collection[int], reason: str) -> bool:
        """Leave out those whose fault it is again and again. False if that is nobody, or would leave nobody."""
        members = self._roster.fleet.members
        if not blamed or set(blamed) >= set(members):
            return False
        for replica in blamed:
            self._roster.drop(replica, reason)
        self._stale = True
        return True

    def _replicas_behind(self, error: Exception) -> tuple[int, ...]:
        """The members that did not commit, or the one that a failure names as the one it happened to."""
        if isinstance(error, NotCommitted):
            return error.replicas
        if not isinstance(error, RefitFailed) or self._session is None:
            return ()
        size = self._config.generation.workers_per_replica
        replica = replica_of(error.failure.who, self._seated, size)
        return (replica,) if replica in self._roster.fleet.members else ()

    def _prepared(self) -> Session:
        """The open session, or a new one for the replicas that are members now."""
        if self._session is not None and not self._stale:
            return self._session
        self._num_sessions += 1
        members = self._roster.fleet.members
        if not members:
            raise RefitFailed(Failure("prepare", "coordinator", f"no generator is left: {self.states()}"))
        self._seated = tuple(members)
        control = self._host.under(f"{self._host.run_id}-{self._num_sessions}")
        self._forgettable.append(control)
        calls = prepare_calls(self._config, control, self._trainers, self._roster.named(members))
        terms = terms_of(self._config, len(members))
        before = None if self._session is None else self._session.plan
        joint = together(
            control, calls, "prepare", lambda: agree_on_plan(control, terms, before), self._timeout_s
        )
        if joint.cause is not None:
            self._give_up(joint, "prepare")
        assert joint.result is not None, "without a cause there is a plan"
        size = self._config.generation.workers_per_replica
        self._session = Session(control, joint.result, record_plan(joint.result), self._seated, size)
        self._stale = False
        while self._forgettable[1:]:
            self._forgettable.pop(0).forget()  # all who are left have left it
        return self._session

    def _give_up(self, joint: Joint[Any], phase: str) -> NoReturn:
        """Leave out who was lost and raise: _Lost if somebody was, else what ended the protocol."""
        cause = joint.cause
        assert cause is not None, "nothing failed"
        lost = self.leave_out(joint.answers, phase)
        raise _Lost if lost else cause

    def _round(self, version: int) -> RefitRecord:
        """One attempt: stage, decide, commit or discard on every member."""
        session = self._prepared()
        self._attempt += 1
        attempt, started_s = self._attempt, time.monotonic()
        fleet = self._roster.fleet
        fleet.begin(version)
        calls = {who: actor.refit.remote(version, attempt) for who, actor in self._trainers.items()}
        staging = self._roster.named(fleet.members)
        calls |= {who: actor.stage.remote(version, attempt) for who, actor in staging.items()}
        joint = together(
            session.control, calls, "refit", lambda: self._decide(session, attempt, version), self._timeout_s
        )
        staged_s = time.monotonic()
        staged = {who: actor for who, actor in staging.items() if who in joint.answers.results}
        finishes = self._finish(version, attempt, staged, joint)
        if joint.result is None:
            self._give_up(joint, "refit")
        decided = self._located(session, attempt, joint.result)
        driver = {
            "pause": 0.0,
            "stage": staged_s - started_s - decided.seconds,
            "verify": decided.seconds,
            "commit": time.monotonic() - staged_s,
            "halt": max((finish.halt_s for finish in finishes.values()), default=0.0),
        }
        places = {replica: session.gen_ranks((replica,)) for replica in session.replicas}
        finished = reports_by_rank(finishes, places)
        session.control.forget(attempt_keys(attempt))
        seen = Round(
            version,
            attempt,
            decided.reports,
            finished,
            len(decided.mismatches),
            decided.reason,
            driver,
            self._config.cluster.line_bytes_per_s,
            self._config.refit.delta,
        )
        return record_round(session.plan_record, seen)

    def _finish(
        self, version: int, attempt: int, staged: Mapping[str, Any], joint: Joint[_Decided]
    ) -> dict[str, Finish]:
        """Let those that have staged carry the decision out; without one they discard. Updates every state.

        Returns what came of it by name. Raises _Lost when nobody committed what was decided, NotCommitted when some
        serve the old version still.
        """
        commit = joint.result is not None and not joint.result.reason
        calls = {who: actor.finish.remote(version, attempt) for who, actor in staged.items()}
        # A decision stands, so nobody waits for another: each may take the time that its own finish is given.
        limit_s = 2 * self._timeout_s
        answers = gather(calls, "commit", limit_s, settle_s=limit_s)
        finishes = {who: Finish.of_answer(answer) for who, answer in answers.results.items()}
        self._roster.settle(version, {who: finish.version for who, finish in finishes.items()}, commit)
        self.leave_out(answers, "commit")
        if joint.result is not None and joint.cause is not None:
            self._roster.note(f"after the decision, which stands: {joint.cause}")
            self.leave_out(joint.answers, "refit")
        if commit:
            self._roster.require_committed(version, answers.cause)
            if not self._roster.fleet.members:
                raise _Lost
        return finishes

    def _decide(self, session: Session, attempt: int, version: int) -> _Decided:
        reports = collect_reports(session.control, session.plan, attempt, version, self._timeout_s)
        collected_s = time.monotonic()
        mismatches = mismatches_of(session.plan, reports)
        decided = _Decided(reports, mismatches, time.monotonic() - collected_s)
        size = session.workers_per_replica
        self._blamed = tuple(sorted({session.replicas[wrong.gen_rank // size] for wrong in mismatches}))
        if suspects := suspects_of(session.plan, mismatches):
            session.control.put(suspects_key(attempt), suspects)
        session.control.put(decision_key(attempt), {"commit": not mismatches, "reason": decided.reason})
        return decided

    def _located(self, session: Session, attempt: int, decided: _Decided) -> _Decided:
        """The same with the parts that differ, as far as both ends can tell: it was decided, whatever happens here."""
        if not decided.mismatches:
            return decided
        plan, timeout_s = session.plan, self._timeout_s
        try:
            found = locate(session.control, attempt, plan, decided.mismatches, self._trainers, timeout_s)
        except Exception as error:
            self._roster.note(f"nobody can say which part differs: {error}")
            return decided
        return replace(decided, mismatches=found)


class _Lost(Exception):  # noqa: N818 - not an error: the round goes on without them
    """Generators were left out; the round is to be repeated for the rest."""


def _control_address(config: JobConfig) -> str:
    """Loopback for a Ray of our own; on an existing cluster this node's address, which its other nodes reach."""
    return "127.0.0.1" if config.cluster.address is None else str(ray.util.get_node_ip_address())

"""Refits of stock vLLM servers over HTTP by any WeightSource; no Ray on either side.

One process, usually trainer 0, has the `HttpRefit`; every trainer rank has a `JoinedSource`. `prepare` runs beside the
ranks' `join_source`, and `refit(version)` beside their `send(version)`: on trainer 0 one of the two is on a thread.
examples/ has a script for one process and one for FSDP2.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from refit.plan import Plan, PlanOptions
from refit.service.agreement import (
    Terms,
    agree_on_plan,
    collect_reports,
    describe_mismatches,
    finished_reports,
    mismatches_of,
)
from refit.service.http_engine import HttpEngine
from refit.service.refit_record import RefitRecord, Round, record_plan, record_round
from refit.transfer.endpoint import Endpoint
from refit.transfer.errors import RefitFailed, TransportError
from refit.transfer.protocol import P2P, attempt_keys, decision_key
from refit.transfer.rendezvous import ControlStore
from refit.transfer.source import WeightSource, send_version

SESSION = "session"
POLL_S = 0.05

type Drain = Literal["wait", "abort"]


@dataclass(frozen=True, slots=True)
class Session:
    """One prepare and its refits, up to a failure: keys of their own, under the number that the run's store names."""

    number: int
    control: ControlStore

    @classmethod
    def after(cls, run: ControlStore, number: int) -> Session:
        return cls(number + 1, run.under(f"{run.run_id}-{number + 1}"))

    @classmethod
    def awaited(cls, run: ControlStore, number: int, timeout_s: float) -> Session:
        """The one that is open, once it is newer than `number` and has not failed. Raises TransportError in the end."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            announced = run.peek(SESSION)
            if isinstance(announced, int) and announced > number:
                session = cls.after(run, announced - 1)
                if session.control.failure() is None:
                    return session
            if time.monotonic() >= deadline_s:
                raise TransportError(
                    f"no session after {number} of run {run.run_id!r} within {timeout_s:.0f} s (the last one announced "
                    f"is {announced}); the coordinator opens one by prepare()"
                )
            time.sleep(POLL_S)

    def announce(self, run: ControlStore) -> None:
        run.put(SESSION, self.number)


class HttpRefit:
    """The coordinator of refits whose generators are HTTP servers. One process has it; close it at the end."""

    def __init__(
        self,
        control: ControlStore,
        engines: Sequence[HttpEngine],
        terms: Terms,
        workers: Sequence[int],
        pause: Drain,
    ) -> None:
        self._control = control
        self._engines = tuple(engines)
        self._terms = terms
        self._workers = tuple(workers)
        self._pause: Drain = pause
        self._pool = ThreadPoolExecutor(len(engines) + 1, thread_name_prefix="refit-http")
        self._plan: Plan | None = None
        self._attempt = 0
        self._session = Session(0, control)

    @classmethod
    def open(
        cls,
        engines: Sequence[HttpEngine],
        num_train: int,
        address: str = "127.0.0.1",
        port: int = 0,
        timeout_s: float = 120.0,
        options: PlanOptions | None = None,
        backend: str = "gloo",
        run_id: str = "",
        pause: Drain = "wait",
    ) -> HttpRefit:
        """Host the control store at `address`, which servers and trainers must reach, and ask the servers' sizes.

        Servers sample on while a version is staged, unless the plan has misc: only vLLM's loader, between two steps,
        can load that, and a stock server cannot be asked whether the bulk has come. `pause` says what the commit does
        to requests under way: "wait" for them or "abort" them; either way no answer mixes two versions.

        With `port` and `run_id` chosen by the caller, the trainer ranks know both without being told.
        """
        workers = [engine.num_workers() for engine in engines]
        terms = Terms(num_train, sum(workers), options or PlanOptions(), backend, P2P, 2, timeout_s)
        control = ControlStore.host(address, port, run_id or secrets.token_hex(8), timeout_s)
        return cls(control, engines, terms, workers, pause)

    @property
    def store(self) -> str:
        """The control store as "host:port"."""
        return f"{self._control.address}:{self._control.port}"

    @property
    def run_id(self) -> str:
        return self._control.run_id

    @property
    def plan(self) -> Plan:
        assert self._plan is not None, "call prepare() first"
        return self._plan

    def prepare(self) -> Plan:
        """Both sides describe, one plan is agreed, groups open. Beside it every trainer rank is in `join_source`.

        Again after a failure, which ends a session: then beside the ranks' `rejoin`. Raises PlanError, RefitFailed or
        TransportError with the cause.
        """
        old, self._session = self._session, Session.after(self._control, self._session.number)
        self._session.announce(self._control)
        self._attempt = 0
        calls = []
        for replica, engine in enumerate(self._engines):
            info = {
                "action": "prepare",
                "store": self.store,
                "run_id": self._session.control.run_id,
                "first_gen_rank": sum(self._workers[:replica]),
                "replica": replica,
                "timeout_s": self._terms.timeout_s,
            }
            calls.append(self._start("prepare", replica, partial(engine.prepare, info)))
        control, before = self._session.control, self._plan
        try:
            self._plan = self._led("prepare", lambda: agree_on_plan(control, self._terms, before))
        except Exception:
            self._settle(calls)  # one that is open would meet the next session on its server
            raise
        _ended(calls)
        if old.number:
            old.control.forget()  # everybody has left it
        return self._plan

    def refit(self, version: int) -> RefitRecord:
        """Bring `version` to all servers. Beside it every trainer rank is in `send`, with the same version.

        Digests that differ discard the version on all servers; the record then says so. Raises RefitFailed with the
        cause when a rank or server failed, or a server has this version or a newer one already; the old version serves
        then, and `prepare` opens the next session. TransportError when a server did not pause or finish: the ranks,
        whose `send` has returned by then, hear of it in their next one.
        """
        self._attempt += 1
        self._led("refit", lambda: self._require_newer(version))
        attempt, started_s = self._attempt, time.monotonic()
        reports = self._staged(version, attempt)
        staged_s = time.monotonic()
        mismatches = mismatches_of(self.plan, reports)
        reason = describe_mismatches(mismatches)
        decided_s = time.monotonic()
        wanted = None if mismatches else version
        paused_s = self._led("commit", lambda: self._carry_out(wanted, attempt, reason))
        driver = {
            "pause": paused_s,
            "stage": staged_s - started_s,
            "verify": decided_s - staged_s,
            "commit": time.monotonic() - decided_s - paused_s,
        }
        finished = finished_reports(self._session.control, self.plan, attempt)
        self._session.control.forget(attempt_keys(attempt))
        if not mismatches and len(finished) != self._terms.num_gen:
            missing = sorted(set(range(self._terms.num_gen)) - set(finished))
            words = f"version {version} was to be committed, but gen ranks {missing} did not; restart their servers"
            raise RefitFailed(self._session.control.fail("commit", "coordinator", words))
        seen = Round(version, attempt, reports, finished, len(mismatches), reason, driver)
        return record_round(record_plan(self.plan), seen)

    def close(self) -> None:
        """End the control store. The servers go on with the version that they have."""
        self._pool.shutdown(wait=True)
        self._control.close()

    def _staged(self, version: int, attempt: int) -> dict[int, Any]:
        """Let every server stage, and collect all reports. A failure ends the updates of all and is raised."""
        control, timeout_s = self._session.control, self._terms.timeout_s
        background = not self.plan.misc_names
        staging = [
            self._start("stage", replica, partial(engine.stage, version, attempt, background))
            for replica, engine in enumerate(self._engines)
        ]
        try:
            reports = self._led(
                "refit", lambda: collect_reports(control, self.plan, attempt, version, timeout_s)
            )
            _ended(staging)
        except Exception:
            self._settle(staging)  # an update that is open would refuse the next one
            with contextlib.suppress(
                RuntimeError
            ):  # the cause is what ended the round, not what ending it costs
                self._finish(None)
            raise
        return reports

    def _require_newer(self, version: int) -> None:
        """Versions only grow."""
        for replica, engine in enumerate(self._engines):
            served = next_version([engine]) - 1
            if served >= version:
                words = f"versions only grow: server {replica} serves {served}, so it cannot go to {version}"
                raise RefitFailed(self._session.control.fail("refit", "coordinator", words))

    def _start(self, phase: str, replica: int, call: Callable[[], None]) -> Future[None]:
        """Make a call to a server on a thread; its failure is told to everybody, which ends all waits.

        It ends the session that is open now, also if another has been opened until it fails.
        """
        control = self._session.control

        def told() -> None:
            try:
                call()
            except Exception as error:
                raise RefitFailed(control.fail(phase, f"server {replica}", str(error))) from error

        return self._pool.submit(told)

    def _settle(self, calls: Sequence[Future[None]]) -> None:
        """Wait for calls that a failure frees; a server that hangs all the same is not waited for any longer."""
        wait(calls, self._terms.timeout_s)

    def _led[T](self, phase: str, protocol: Callable[[], T]) -> T:
        try:
            return protocol()
        except RefitFailed:
            raise
        except Exception as error:
            self._session.control.fail(phase, "coordinator", str(error))
            raise

    def _carry_out(self, version: int | None, attempt: int, reason: str) -> float:
        """Publish the decision and let every server follow it; seconds until none sampled any more.

        A discard touches nothing that serves, so it pauses nobody.
        """
        decision = {"commit": version is not None, "reason": reason}
        if version is None:
            self._session.control.put(decision_key(attempt), decision)
            self._finish(None)
            return 0.0
        started_s = time.monotonic()
        try:
            _ended([self._pool.submit(engine.pause, self._pause) for engine in self._engines])
        except Exception as error:
            self._session.control.put(
                decision_key(attempt), {"commit": False, "reason": f"no pause: {error}"}
            )
            with contextlib.suppress(RuntimeError):  # the pause is the cause, not what undoing it costs
                self._finish(None)
            with contextlib.suppress(RuntimeError):
                _ended([self._pool.submit(engine.resume) for engine in self._engines])
            raise
        paused_s = time.monotonic() - started_s
        self._session.control.put(decision_key(attempt), decision)
        finishing = [self._pool.submit(engine.finish, version) for engine in self._engines]
        wait(finishing)
        _ended(finishing + [self._pool.submit(_serve_on, engine) for engine in self._whole(attempt)])
        return paused_s

    def _whole(self, attempt: int) -> list[HttpEngine]:
        """The servers all of whose workers have committed; any other stays paused, so that it serves nothing torn."""
        finished = finished_reports(self._session.control, self.plan, attempt).keys()
        starts = [sum(self._workers[:replica]) for replica in range(len(self._engines))]
        ranks = [range(start, start + size) for start, size in zip(starts, self._workers, strict=True)]
        return [engine for engine, mine in zip(self._engines, ranks, strict=True) if finished >= set(mine)]

    def _finish(self, version: int | None) -> None:
        """Every server ends its update; the first failure is raised when all have been asked."""
        _ended([self._pool.submit(engine.finish, version) for engine in self._engines])


class JoinedSource:
    """One trainer rank of a prepared refit."""

    def __init__(
        self,
        control: ControlStore,
        session: Session,
        endpoint: Endpoint,
        source: WeightSource,
        timeout_s: float,
    ) -> None:
        self._control = control
        self._session = session
        self._endpoint = endpoint
        self._source = source
        self._timeout_s = timeout_s
        self._attempt = 0

    def send(self, version: int) -> None:
        """This rank's share of a refit. All trainer ranks call it, beside the coordinator's `refit`.

        Raises RefitFailed with the root cause, whoever failed; `rejoin` then.
        """
        self._attempt += 1
        send_version(self._endpoint, self._source, version, self._attempt)

    def rejoin(self) -> None:
        """Go on after a failure: in the next session, which the coordinator's `prepare` opens. Collective as before."""
        self._endpoint.close()
        self._session = Session.awaited(self._control, self._session.number, self._timeout_s)
        self._endpoint = Endpoint.prepare(self._session.control, self._source.describe(), self._timeout_s)
        self._attempt = 0

    def close(self) -> None:
        self._endpoint.close()
        self._control.close()


def join_source(source: WeightSource, store: str, run_id: str, timeout_s: float = 120.0) -> JoinedSource:
    """Describe this trainer rank, agree on the plan, open the groups. Collective over trainers and servers."""
    host, _, port = store.rpartition(":")
    control = ControlStore.join(host, int(port), run_id, timeout_s)
    try:
        session = Session.awaited(control, 0, timeout_s)
        endpoint = Endpoint.prepare(session.control, source.describe(), timeout_s)
    except BaseException:
        control.close()  # no JoinedSource will
        raise
    return JoinedSource(control, session, endpoint, source, timeout_s)


def _serve_on(engine: HttpEngine) -> None:
    """A server that keeps its prefixes stays paused: it would answer with keys and values of the old weights."""
    engine.forget_prefixes()
    engine.resume()


def _ended(calls: Sequence[Future[None]]) -> None:
    """Wait for all calls, each of which ends by itself in time; then raise the first failure."""
    failures = [call.exception() for call in calls]
    for failure in failures:
        if failure is not None:
            raise failure


def next_version(engines: Sequence[HttpEngine]) -> int:
    """The first version that all of these servers would take: 1 where none has been refitted since it was started.

    A stamp that is no number is none of ours. Raises TransportError if a server does not answer.
    """
    stamps = [engine.weight_version() for engine in engines]
    return 1 + max((int(stamp) for stamp in stamps if stamp.isdigit()), default=0)

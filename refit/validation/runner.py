"""Runs cases on two pools of processes and says what came of them. The coordinator's part runs here, in a thread."""

from __future__ import annotations

import random
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from refit.gen_side.bare import forget_ranks
from refit.gen_side.generator import GenParallel
from refit.plan import Plan, PlanOptions
from refit.service.agreement import Terms, agree_on_plan, collect_reports, describe_mismatches, mismatches_of
from refit.service.reader import Reader
from refit.transfer.errors import TransportError
from refit.transfer.protocol import GOLDEN, P2P, decision_key
from refit.transfer.rendezvous import ControlStore
from refit.validation import ranks
from refit.validation.matrix import Case
from refit.validation.outcome import Outcome, kl_per_token, outcome_of, too_far
from refit.validation.parity import largest_delta
from refit.validation.pool import Job, Pool, Result
from refit.validation.ranks import VERSIONS, Setting, exported_key, run_id_of
from refit.validation.reading import PoolEngine, read_faults
from refit.validation.weights import make_checkpoint, make_initial, read_tensors

START_S = 600.0
"""Longest wait for the imports of both parents, on a busy machine."""
CASE_S = 150.0
SETTLE_S = 1.0
MEETING_PORTS = (15_000, 32_000)
BUCKET_BYTES = 1 << 16  # small, so that tiny models take several rounds
PRELOADS = {"train": "refit.train_side.bare:preload", "gen": "refit.gen_side.bare:preload"}


class Runner:
    """Open for many cases; a context manager that leaves no process and no file behind."""

    def __init__(self, case_s: float = CASE_S, train_body: Callable[..., Any] = ranks.run_train_rank) -> None:
        self.train_body = train_body
        self._case_s = case_s
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="refit-validate-")))
        self._pools: dict[str, Pool] = {}
        self._warm: set[str] = set()
        self._checkpoints: dict[str, str] = {}
        self._addresses = meeting_addresses()
        self._meetings: list[str] = []

    def __enter__(self) -> Runner:
        for side in PRELOADS:
            self._pool(side)
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.close()
        self._stack.close()

    def run(self, case: Case) -> Outcome:
        """One case, in bounded time. Never raises for what goes wrong in it."""
        if case.unrunnable:
            return Outcome(case)
        started_s = time.monotonic()
        try:
            folder = self._checkpoint(case)
            started_s = time.monotonic()
            outcome = self._run(case, folder)
        except Exception as error:
            for pool in self._pools.values():
                pool.stop()
            outcome = Outcome(case, failures=(str(error),))
        return replace(outcome, seconds=time.monotonic() - started_s)

    def log_tail(self, side: str, num_bytes: int = 3000) -> str:
        """The end of what the processes of one side wrote."""
        log = self._log(side)
        return log.read_text(errors="replace")[-num_bytes:] if log.exists() else ""

    def _run(self, case: Case, folder: str) -> Outcome:
        control = ControlStore.host(run_id=secrets.token_hex(4))
        try:
            setting = Setting(
                case, folder, f"127.0.0.1:{control.port}", control.run_id, self._meeting(), self._case_s
            )
            with ThreadPoolExecutor(1, thread_name_prefix="refit-coordinator") as thread:
                plan = thread.submit(_coordinate, control, setting)
                try:
                    found = self._collect(self._jobs(setting), self._case_s, plan)
                except BaseException:
                    _release(control, setting)  # the coordinator waits in the store
                    raise
                outcome = outcome_of(case, plan.result(), found)
            if case.logprobs:
                outcome = self._compare_logprobs(outcome, setting, found)
            return outcome
        finally:
            control.close()
            self._clear()

    def _meeting(self) -> str:
        """An address for the ranks of one framework group of the case."""
        self._meetings.append(next(self._addresses))
        return self._meetings[-1]

    def _clear(self) -> None:
        for address in self._meetings:
            forget_ranks(address)
        self._meetings.clear()

    def _jobs(self, setting: Setting) -> dict[str, list[Job]]:
        case = setting.case
        meetings = [self._meeting() for _ in range(case.replicas)]
        return {
            "train": [
                Job(f"train {rank}", self.train_body, (setting, rank)) for rank in range(case.num_train)
            ],
            "gen": [
                Job(
                    f"gen {rank}",
                    ranks.run_gen_rank,
                    (replace(setting, meeting=meetings[rank // case.gen.num_ranks]), rank),
                )
                for rank in range(case.num_gen)
            ],
        }

    def _compare_logprobs(self, outcome: Outcome, setting: Setting, found: Mapping[str, Any]) -> Outcome:
        """With an engine that was started from the last version.

        That has one rank, and the same layout where engines are quantized: their bf16 sums of other shares of a row are
        farther apart than two versions should be. Those are compared with one rank on what was trained, too.
        """
        case = setting.case
        exported = setting.exported(VERSIONS[-1])
        engines = [found[who]["logprobs"] for who in found if who.startswith("gen ")]
        engines = [mine for mine in engines if mine is not None]
        layout = case.gen if case.quantized else GenParallel()
        stored = self._reference(setting, setting.engine_folder(exported), layout)
        outcome = replace(outcome, logprob_delta=max(largest_delta(stored, mine) for mine in engines))
        if case.quantized:
            trained = self._reference(setting, exported, GenParallel())
            outcome = replace(outcome, kl=max(kl_per_token(trained, mine) for mine in engines))
        return replace(outcome, failures=(*outcome.failures, *too_far(outcome)))

    def _reference(self, setting: Setting, folder: str, layout: GenParallel) -> list[list[float]]:
        setting = replace(setting, meeting=self._meeting())
        jobs = [
            Job(f"reference {rank}", ranks.run_reference_rank, (setting, folder, layout, rank))
            for rank in range(layout.num_ranks)
        ]
        logprobs: list[list[float]] = self._collect({"gen": jobs}, self._case_s)[jobs[0].who]
        return logprobs

    def _checkpoint(self, case: Case) -> str:
        """The folder of version 1, made once per model, in a process that has transformers loaded."""
        key = repr((case.model, sorted(case.overrides.items()), case.precision, case.quantized))
        if key not in self._checkpoints:
            folder = str(self._folder / f"model{len(self._checkpoints)}")
            job = Job("the checkpoint", _make_checkpoint, (case, folder))
            self._collect({"train": [job]}, self._case_s)
            self._checkpoints[key] = folder
        return self._checkpoints[key]

    def _collect(
        self, jobs: Mapping[str, Sequence[Job]], limit_s: float, plan: Future[Any] | None = None
    ) -> dict[str, Any]:
        """Run jobs on the pools of their sides: values by name. Raises with the cause at the first failure."""
        cold = [side for side in jobs if side not in self._warm]
        deadline = time.monotonic() + limit_s + (START_S if cold else 0.0)
        for side, each in jobs.items():
            self._pool(side).start(each)
        values: dict[str, Any] = {}
        expected = {job.who for each in jobs.values() for job in each}
        while expected - values.keys():
            if plan is not None and plan.done() and plan.exception() is not None:
                self._raise_cause([], list(jobs), str(plan.exception()))
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                self._raise_late(list(jobs), sorted(expected - values.keys()), limit_s)
            wait([self._pools[side].pipe for side in jobs], min(left_s, 0.25))
            results = [result for side in jobs for result in self._pools[side].poll()]
            failed = [result for result in results if result.error]
            if failed:
                self._raise_cause(failed, list(jobs), "")
            values |= {result.who: result.value for result in results}
        self._warm |= set(jobs)
        return values

    def _raise_cause(self, failed: list[Result], sides: Sequence[str], other: str) -> None:
        """End the case. A dead process beats an error as its cause; survivors often report first."""
        time.sleep(SETTLE_S)
        failed = failed + [r for side in sides for r in self._pools[side].poll() if r.error]
        for side in sides:
            self._pools[side].stop()
        deaths = [result.error for result in failed if result.died]
        raise TransportError((deaths or [result.error for result in failed] or [other])[0])

    def _raise_late(self, sides: Sequence[str], missing: Sequence[str], limit_s: float) -> None:
        steps: dict[str, str] = {}
        for side in sides:
            steps |= self._pools[side].stop()
        where = "; ".join(f"{who} is in {steps.get(who, 'an unknown step')!r}" for who in missing)
        raise TransportError(f"no result within {limit_s:.0f} s: {where}")

    def _pool(self, side: str) -> Pool:
        """The pool of a side, opened anew if its parent died."""
        if side not in self._pools or not self._pools[side].is_alive:
            self._warm.discard(side)
            self._pools[side] = Pool(side, PRELOADS[side], self._log(side))
        return self._pools[side]

    def _log(self, side: str) -> Path:
        return self._folder / f"{side}.log"


def run_all(
    cases: Sequence[Case], runner: Runner, on_outcome: Callable[[Outcome], None]
) -> tuple[Outcome, ...]:
    """Run cases one after another; `on_outcome` hears of each at once."""
    outcomes = []
    for case in cases:
        outcomes.append(runner.run(case))
        on_outcome(outcomes[-1])
    return tuple(outcomes)


def _make_checkpoint(_: Callable[[str], None], case: Case, folder: str) -> None:
    make_checkpoint(case.model, case.overrides, case.precision, folder)
    if case.quantized:
        ranks.as_engines_store_it(case, folder)
        ranks.as_engines_store_it(case, make_initial(folder, ranks.initial_folder(folder), case.precision))


def _coordinate(control: ControlStore, setting: Setting) -> tuple[Plan, tuple[str, ...]]:
    """The coordinator's part: agree on a plan per path, compare digests, decide. Returns the plan and mismatches."""
    case = setting.case
    options = PlanOptions(bucket_bytes=BUCKET_BYTES)
    controls = {path: control.under(run_id_of(setting, path)) for path in (P2P, GOLDEN)}
    plans = {
        path: agree_on_plan(
            each, Terms(case.num_train, case.num_gen, options, "gloo", path, 2, setting.timeout_s)
        )
        for path, each in controls.items()
    }
    wrong = []
    for version in VERSIONS:
        reasons = []
        for path, each in controls.items():
            reports = collect_reports(each, plans[path], version, version, setting.timeout_s)
            reasons.append(describe_mismatches(mismatches_of(plans[path], reports)))
            if reasons[-1]:
                wrong.append(f"digests {version}, {path}: {reasons[-1]}")
        commit = not any(reasons)
        controls[P2P].put(
            decision_key(version), {"commit": commit, "reason": "; ".join(filter(None, reasons))}
        )
    if case.read:
        wrong += [f"version {VERSIONS[-1]}, read: {fault}" for fault in _read(control, setting)]
    return plans[P2P], tuple(wrong)


def _read(control: ControlStore, setting: Setting) -> list[str]:
    """What reading the first engine back gets wrong."""
    case = setting.case
    engine = PoolEngine(control, 0, case.gen.num_ranks)
    control.get(exported_key(VERSIONS[-1]), setting.timeout_s)
    try:
        tensors = read_tensors(setting.engine_folder(setting.exported(VERSIONS[-1])))
        return list(read_faults(Reader(engine, control, setting.timeout_s), tensors))
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    finally:
        engine.end()


def _release(control: ControlStore, setting: Setting) -> None:
    for path in (P2P, GOLDEN):
        control.under(run_id_of(setting, path)).fail("validate", "the runner", "the case was ended")
    control.fail("validate", "the runner", "the case was ended")  # reads wait under the case's own run id


def meeting_addresses() -> Iterator[str]:
    """Free ports of the loopback interface, none twice, below those that the kernel gives to outgoing connections."""
    for port in random.sample(range(*MEETING_PORTS), MEETING_PORTS[1] - MEETING_PORTS[0]):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                yield f"127.0.0.1:{port}"

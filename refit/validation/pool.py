"""Processes that have a framework imported already: forks of one parent per side, so that a case starts in no time.

Importing vLLM or Megatron costs 10 to 30 s; a fork of a process that did it costs 0.1 s and ends with its own state.
A parent ends with the process that opened its pool, and its forks end with it, whatever kills whom.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_SPAWN, _FORK = multiprocessing.get_context("spawn"), multiprocessing.get_context("fork")
_PR_SET_PDEATHSIG = 1
GRACE_S = 5.0

Tell = Callable[[str], None]
"""What a body calls with the name of the step that it is in."""


@dataclass(frozen=True, slots=True)
class Job:
    """A call of `body(tell, *args)` in a process of its own. `who` names it in messages."""

    who: str
    body: Callable[..., Any]
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """How a job ended: with a value, or with an error that names the process and its step."""

    who: str
    value: Any
    error: str
    died: bool = False
    """True when the process ended without a word."""


class Pool:
    """The parent of one side's processes. `start` jobs, `poll` their results, `stop` what still runs."""

    def __init__(self, name: str, preload: str, log: Path) -> None:
        """Start the parent; it runs `preload` ("module:function") and is then ready. Returns at once."""
        self.name = name
        self._pipe, theirs = _SPAWN.Pipe()
        self._process: BaseProcess = _SPAWN.Process(
            target=_serve, args=(theirs, preload, str(log), os.getpid()), name=f"refit-{name}"
        )
        self._process.start()
        theirs.close()

    @property
    def pipe(self) -> Connection:
        """Readable when `poll` has something to return."""
        return self._pipe

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def start(self, jobs: Sequence[Job]) -> None:
        """Fork one process per job. Their names must not be those of jobs that still run."""
        with contextlib.suppress(OSError):  # a dead parent is reported by `poll`
            self._pipe.send(("start", tuple(jobs)))

    def poll(self) -> tuple[Result, ...]:
        """Results that have come since, without waiting. One with an error also when the parent itself is gone."""
        found = []
        try:
            while self._pipe.poll():
                found.append(self._pipe.recv())
        except (EOFError, OSError):
            self._process.join(GRACE_S)
            code = self._process.exitcode
            found.append(
                Result(self.name, None, f"the parent of the {self.name} ranks died ({how_ended(code)})", True)
            )
        return tuple(found)

    def stop(self) -> Mapping[str, str]:
        """Kill the jobs that still run. Returns the step that each was in, by name."""
        try:
            self._pipe.send(("stop", ()))
            deadline = time.monotonic() + 2 * GRACE_S
            while self._pipe.poll(max(0.0, deadline - time.monotonic())):
                answer = self._pipe.recv()
                if not isinstance(answer, Result):
                    return dict(answer)
            self._process.kill()  # its late answer would be taken for a result of the next case
            self._process.join(GRACE_S)
        except (EOFError, OSError):
            pass
        return {}

    def close(self) -> None:
        """End the parent and everything below it, in bounded time."""
        self._pipe.close()
        self._process.join(GRACE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(GRACE_S)


def how_ended(exit_code: int | None) -> str:
    """An exit code in words."""
    if exit_code is None:
        return "it still runs"
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


@dataclass(slots=True)
class _Running:
    job: Job
    process: BaseProcess
    pipe: Connection
    steps: list[str] = field(default_factory=lambda: ["its start"])


def _serve(pipe: Connection, preload: str, log: str, parent: int) -> None:
    _die_with(parent)
    _write_to(log)
    module, _, function = preload.partition(":")
    running: list[_Running] = []
    try:
        getattr(importlib.import_module(module), function)()
        while True:
            ready = wait([pipe, *(each.pipe for each in running)])
            for each in [each for each in running if each.pipe in ready]:
                result = _step(each)
                if result is not None:
                    running.remove(each)
                    pipe.send(result)
            if pipe in ready:
                _obey(pipe, running)
    except (EOFError, OSError):
        pass  # whoever opened this pool is done with it
    finally:
        _kill(running)


def _obey(pipe: Connection, running: list[_Running]) -> None:
    order, jobs = pipe.recv()
    if order == "start":
        running.extend(_fork(job) for job in jobs)
    else:
        steps = {each.job.who: each.steps[-1] for each in running}
        _kill(running)
        pipe.send(steps)


def _fork(job: Job) -> _Running:
    mine, theirs = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_run, args=(theirs, job, os.getpid()), daemon=True)
    process.start()
    theirs.close()
    return _Running(job, process, mine)


def _step(each: _Running) -> Result | None:
    """Take one message of a process: None while it runs, else how it ended."""
    try:
        kind, value = each.pipe.recv()
    except (EOFError, OSError):
        each.process.join(GRACE_S)
        kind, value = "died", f"{how_ended(each.process.exitcode)} during {each.steps[-1]!r}"
    if kind == "step":
        each.steps.append(value)
        return None
    each.process.join(GRACE_S)
    if each.process.is_alive():
        each.process.kill()
        each.process.join(GRACE_S)
    if kind == "value":
        return Result(each.job.who, value, "")
    return Result(each.job.who, None, f"{each.job.who}: {value}", kind == "died")


def _kill(running: list[_Running]) -> None:
    for each in running:
        each.process.kill()
    for each in running:
        each.process.join(GRACE_S)
    running.clear()


def _run(pipe: Connection, job: Job, parent: int) -> None:
    _die_with(parent)
    steps: list[str] = ["its start"]

    def tell(step: str) -> None:
        steps.append(step)
        pipe.send(("step", step))

    try:
        pipe.send(("value", job.body(tell, *job.args)))
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        pipe.send(("error", f"{type(error).__name__} during {steps[-1]!r}: {error}\n{text}"))
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.close()
    os._exit(0)  # frameworks' exit handlers may wait for peers that are gone


def _die_with(parent: int) -> None:
    """Let the kernel end this process when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _write_to(log: str) -> None:
    """Send output to a file: frameworks write pages that say nothing about a case."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)

"""Live progress on standard error: what is being waited for and how long, then one line per step.

On a terminal rich draws a bar that moves; anywhere else plain lines are written, and a long wait says so every
HEARTBEAT_S seconds. Standard output stays free for the summary.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from refit.service.record import StepRecord

HEARTBEAT_S = 10.0

type Tick = Callable[[tuple[str, ...]], None]


class JobProgress:
    """Where a job reports to a person. Opened with `JobProgress.open(stream)`, a context manager."""

    def __init__(self, console: Console, bars: Progress | None) -> None:
        self._console = console
        self._bars = bars

    @classmethod
    @contextlib.contextmanager
    def open(cls, stream: TextIO) -> Iterator[JobProgress]:
        """Bars if `stream` is a terminal, else plain lines."""
        console = Console(file=stream, highlight=False, soft_wrap=True, markup=False)
        if not console.is_terminal:
            yield cls(console, None)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            yield cls(console, bars)

    def say(self, line: str) -> None:
        """One line that stays."""
        self._console.print(line)

    @contextlib.contextmanager
    def waiting(self, what: str, total: int) -> Iterator[Tick]:
        """A wait for `total` parties. Gives the function to call, often, with the names still awaited."""
        started_s = time.monotonic()
        spoken_s = started_s
        task = self._bars.add_task(what, total=total) if self._bars is not None else None
        if task is None:
            self.say(f"{what} ...")

        def tick(awaited: tuple[str, ...]) -> None:
            nonlocal spoken_s
            now_s = time.monotonic()
            if self._bars is not None and task is not None:
                self._bars.update(
                    task, completed=total - len(awaited), description=f"{what}: {', '.join(awaited)}"
                )
            elif now_s - spoken_s >= HEARTBEAT_S:
                spoken_s = now_s
                self.say(f"{what}: waiting for {', '.join(awaited)} ({now_s - started_s:.0f} s)")

        try:
            yield tick
        finally:
            if self._bars is not None and task is not None:
                self._bars.remove_task(task)
        self.say(f"{what}: done in {time.monotonic() - started_s:.1f} s")

    @contextlib.contextmanager
    def stepping(self, num_steps: int) -> Iterator[Callable[[StepRecord], None]]:
        """The training loop. Gives the function to call with each finished step."""
        task = self._bars.add_task("training", total=num_steps) if self._bars is not None else None
        started_s = time.monotonic()

        def stepped(record: StepRecord) -> None:
            left_s = remaining_s(record.step, num_steps, time.monotonic() - started_s)
            self.say(step_line(record) + (f"  left {clock_time(left_s)}" if left_s else ""))
            if self._bars is not None and task is not None:
                self._bars.update(task, completed=min(record.step, num_steps))

        try:
            yield stepped
        finally:
            if self._bars is not None and task is not None:
                self._bars.remove_task(task)


def remaining_s(num_done: int, num_steps: int, elapsed_s: float) -> float:
    """Seconds that the steps left will take if they are like those done."""
    return elapsed_s / num_done * max(0, num_steps - num_done)


def clock_time(seconds: float) -> str:
    """For example "2:05" or "1:00:07"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def step_line(record: StepRecord) -> str:
    """One step for people: reward, loss, generation KL, refit seconds by phase, bytes by class, version."""
    head = f"step {record.step:>3}  reward {record.reward:.3f}  solved {record.solved_share:.3f}"
    judged = f"gen KL {record.gen_kl:.1e} (v{record.weight_version})"
    if record.train is None or record.refit is None:
        return f"{head}  {judged}  after the last refit"
    refit = record.refit
    phases = " ".join(f"{phase} {seconds:.2f}" for phase, seconds in refit.seconds.items())
    audit = {None: "", True: "  audit ok", False: "  audit FAILED"}[refit.verified]
    return (
        f"{head}  loss {record.train.loss:+.4f}  {judged}  refit v{refit.version} {refit.total_s:.2f} s ({phases})"
        f"  bulk {refit.bulk_bytes / 1e6:.2f} MB misc {refit.misc_bytes / 1e6:.2f} MB{audit}"
        f"  step {sum(record.seconds.values()):.1f} s"
    )

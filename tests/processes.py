"""Real processes for tests: each runs `target(rank, *args)`, every wait has a deadline, none is left behind.

Processes are forked from one server that has torch loaded already, so starting four costs 0.1 s and not 20 s.
`target` must be a function at the top of an importable module; it may return any picklable value.
"""

import faulthandler
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["pytest", "torch.distributed", "refit.transfer.endpoint", "refit.transfer.xferdtensor"]
)
os.environ.setdefault(
    "TORCH_CPP_LOG_LEVEL", "FATAL"
)  # lost connections are expected here; torch prints each at length


PRINTED_S = 0.5


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one process ended. `value` if it returned; `error` (a traceback) if it raised; neither if it was killed."""

    rank: int
    value: object
    error: str | None
    exit_code: int | None
    seconds: float

    @property
    def returned(self) -> bool:
        return self.error is None and self.exit_code == 0


class Processes:
    """`num_processes` running processes; use as a context manager, which kills whatever still runs at its end."""

    def __init__(
        self, target: Callable[..., object], num_processes: int, args: Sequence[object] = ()
    ) -> None:
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(num_processes)]
        self._readers = [reader for reader, _ in pipes]
        self._start_s = time.monotonic()
        self._processes = [
            CONTEXT.Process(target=_child, args=(writer, target, rank, tuple(args)), daemon=True)
            for rank, (_, writer) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()
        for _, writer in pipes:
            writer.close()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill_all()

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal, such as SIGKILL or SIGSTOP, to one process."""
        os.kill(self.pid(rank), number)

    def pid(self, rank: int) -> int:
        pid = self._processes[rank].pid
        assert pid is not None, f"process {rank} was not started"
        return pid

    def outcomes(self, timeout_s: float, ranks: Sequence[int] | None = None) -> tuple[Outcome, ...]:
        """Wait for `ranks` (default all) to end. Raises TimeoutError that lists those which still run."""
        chosen = list(range(len(self._processes))) if ranks is None else list(ranks)
        deadline = time.monotonic() + timeout_s
        outcomes: dict[int, Outcome] = {}
        while open_ranks := [rank for rank in chosen if rank not in outcomes]:
            ready = wait([self._readers[rank] for rank in open_ranks], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._print_stacks(open_ranks)
                raise TimeoutError(
                    f"processes {open_ranks} of {len(self._processes)} still run after {timeout_s} s; "
                    f"ended: {[str(outcome) for outcome in outcomes.values()]}"
                )
            for rank in open_ranks:
                if self._readers[rank] in ready:
                    outcomes[rank] = self._outcome(rank)
        return tuple(outcomes[rank] for rank in chosen)

    def _print_stacks(self, ranks: Sequence[int]) -> None:
        """Let processes print to stderr where each of their threads is."""
        for rank in ranks:
            self.signal(rank, signal.SIGUSR1)
        time.sleep(PRINTED_S)

    def kill_all(self) -> None:
        """Kill what still runs (also what is stopped) and wait for it."""
        for process in self._processes:
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join(10)
            assert not process.is_alive(), f"process {process.pid} survived SIGKILL for 10 s"

    def _outcome(self, rank: int) -> Outcome:
        seconds = time.monotonic() - self._start_s
        try:
            value, error = self._readers[rank].recv()
        except EOFError:
            value, error = None, None
        self._processes[rank].join(10)
        return Outcome(rank, value, error, self._processes[rank].exitcode, seconds)


def run_processes(
    target: Callable[..., object], num_processes: int, *args: object, timeout_s: float = 60.0
) -> tuple[object, ...]:
    """What `target(rank, *args)` returned in each of the processes. Raises with all tracebacks otherwise."""
    with Processes(target, num_processes, args) as processes:
        try:
            outcomes = processes.outcomes(timeout_s)
        except TimeoutError:
            processes.kill_all()
            raise
    failed = [outcome for outcome in outcomes if not outcome.returned]
    if failed:
        raise AssertionError(
            "\n".join(
                f"--- process {o.rank} (exit code {o.exit_code})\n{o.error or 'killed'}" for o in failed
            )
        )
    return tuple(outcome.value for outcome in outcomes)


def _child(writer: Connection, target: Callable[..., object], rank: int, args: tuple[object, ...]) -> None:
    faulthandler.register(signal.SIGUSR1, file=2)
    try:
        writer.send((target(rank, *args), None))
    except BaseException:
        writer.send((None, traceback.format_exc()))
    writer.close()

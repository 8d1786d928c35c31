"""A rank's pulse and its ear: every rank shows that it runs, and hears at once when anybody has failed.

A thread puts `pulse/<rank>` = [beat, doing] into the control store every PULSE_S and looks at the key `failed`. When
that is set it calls `on_failure`, which frees the threads that are blocked in a group.
"""

import logging
import time
from collections.abc import Callable, Sequence
from threading import Event, Thread

from refit.transfer.errors import TransportError
from refit.transfer.rendezvous import ControlStore

PULSE_S = 0.25
SILENT_S = 4 * PULSE_S  # a rank without a new pulse for so long is dead or stopped
CLOSED = "closed"

_log = logging.getLogger(__name__)


class Watch:
    """Runs from `start` to `close`. `on_failure` is called at most once, on the thread of the watch."""

    def __init__(self, control: ControlStore, rank: int, on_failure: Callable[[], None]) -> None:
        self._control = control
        self._rank = rank
        self._on_failure = on_failure
        self._stop = Event()
        self._doing = "starting"
        self._thread = Thread(target=self._run, name=f"refit-watch-{rank}", daemon=True)

    @classmethod
    def start(cls, control: ControlStore, rank: int, on_failure: Callable[[], None]) -> "Watch":
        watch = cls(control, rank, on_failure)
        watch._thread.start()
        return watch

    def doing(self, words: str) -> None:
        """What this rank says it is doing from now on."""
        self._doing = words

    def close(self) -> None:
        """Stop the pulse, and say that this is on purpose."""
        self._stop.set()
        self._thread.join(10.0)

    def _run(self) -> None:
        beat = 0
        try:
            while not self._stop.is_set():
                beat += 1
                self._control.put(pulse_key(self._rank), [beat, self._doing])
                if self._control.failure() is not None:
                    self._hear()
                    break
                self._stop.wait(PULSE_S)
            while not self._stop.wait(PULSE_S):
                beat += 1
                self._control.put(pulse_key(self._rank), [beat, self._doing])
            self._control.put(pulse_key(self._rank), [beat, CLOSED])
        except TransportError:
            self._hear()  # without a control store nobody can be told; every wait here must still end

    def _hear(self) -> None:
        try:
            self._on_failure()
        except (
            RuntimeError
        ):  # a group that cannot be aborted must not end the pulse: that would name this rank as dead
            _log.exception(
                "rank %d could not abort all of its groups; what waits there ends at its deadline", self._rank
            )


def pulse_key(rank: int) -> str:
    return f"pulse/{rank}"


def silent_ranks(control: ControlStore, ranks: Sequence[int]) -> tuple[int, ...]:
    """Those of `ranks` that show no new pulse within SILENT_S and did not close on purpose. Takes that long."""
    before = {rank: control.peek(pulse_key(rank)) for rank in ranks}
    time.sleep(SILENT_S)
    return tuple(
        rank for rank in ranks if before[rank] == control.peek(pulse_key(rank)) and not _closed(before[rank])
    )


def _closed(pulse: object) -> bool:
    return isinstance(pulse, list) and pulse[1] == CLOSED

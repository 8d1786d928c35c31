"""Where a running job takes reads: a thread beside each generator that watches the job's control store for asks.

A reader adds one to `asks/<replica>` and puts `ask/<replica>/<n>`; the desk lets the engine's workers answer it
between two steps and puts `done/<replica>/<n>`. Nothing here waits for a reader, and a reader that goes away costs one
unanswered ask. The keys stand in a run id of their own, so that a read can never fail a refit.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from refit.transfer.errors import TransportError
from refit.transfer.rendezvous import ControlStore

RUN_ID = "desk"
POLL_S = 0.1
BUSY_POLL_S = 0.002
BUSY_S = 0.5  # after an ask, its reader's next one comes soon
LATE_S = 5.0  # longest wait for an ask that was counted but not yet put


class Desk(threading.Thread):
    """Serves asks until `close`, or until the control store is gone."""

    def __init__(self, store: str, replica: int, serve: Callable[[Mapping[str, Any]], None]) -> None:
        super().__init__(name="refit-read-desk", daemon=True)
        self.store, self.replica = store, replica
        self._serve = serve
        self._closing = threading.Event()
        self.attending = threading.Event()
        """Set once asks are heard: those that were made before are nobody's."""
        self.start()

    def close(self) -> None:
        """Take no more asks; one that is being answered ends in its own time."""
        self._closing.set()

    def run(self) -> None:
        host, _, port = self.store.rpartition(":")
        with contextlib.suppress(
            TransportError
        ):  # the store, and so the job, is gone: nobody can ask any more
            control = ControlStore.join(host, int(port), RUN_ID)
            try:
                self._attend(control)
            finally:
                control.close()

    def _attend(self, control: ControlStore) -> None:
        done = control.count(f"asks/{self.replica}", 0)
        self.attending.set()
        busy_until_s = 0.0
        while not self._closing.wait(BUSY_POLL_S if time.monotonic() < busy_until_s else POLL_S):
            asked = control.count(f"asks/{self.replica}", 0)
            for number in range(done + 1, asked + 1):
                self._answer(control, number)
            if asked > done:
                done, busy_until_s = asked, time.monotonic() + BUSY_S

    def _answer(self, control: ControlStore, number: int) -> None:
        key = f"ask/{self.replica}/{number}"
        try:
            info: Any = control.get(key, LATE_S)
        except TransportError:
            return  # its reader died between counting and putting
        control.drop(key)
        error = ""
        try:
            self._serve(info)
        except Exception as fault:
            error = f"{type(fault).__name__}: {fault}"
        control.put(f"done/{self.replica}/{number}", {"error": error})

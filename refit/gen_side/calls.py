"""What the calls of a refit carry into a vLLM worker, and a step of one that runs beside the model's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from refit.plan import ConfigError
from refit.transfer.errors import TransportError


@dataclass
class RefitInitInfo(WeightTransferInitInfo):
    """`action` "prepare" needs every field but `audit` and `read`; "audit" needs only `audit`.

    "read" answers ask number `read` of the reader that has `run_id` in the control store at `store`.
    """

    action: str
    store: str = ""
    run_id: str = ""
    first_gen_rank: int = 0
    replica: int = 0
    timeout_s: float = 0.0
    audit: str = ""
    read: str = ""

    def __post_init__(self) -> None:
        match self.action:
            case "prepare" | "read":
                host, _, port = self.store.rpartition(":")
                if not host or not port.isdigit() or not self.run_id or self.timeout_s <= 0:
                    raise ConfigError(
                        f"{self.action} needs store 'host:port', run_id and timeout_s > 0; got store {self.store!r},"
                        f" run_id {self.run_id!r}, timeout_s {self.timeout_s}"
                    )
            case "audit":
                if not self.audit:
                    raise ConfigError("audit needs an audit id; got an empty one")
            case _:
                raise ConfigError(f"action {self.action!r} is not known; use 'prepare', 'audit' or 'read'")


@dataclass
class RefitUpdateInfo(WeightTransferUpdateInfo):
    """Which version is on its way, and under which attempt its messages stand.

    `background`: all but misc is done in a thread, so that the worker can go on serving; ask `receiving`, then
    `load_rest`, then `receiving` again. Without misc in the plan none of this need be asked: the finish waits for it.
    """

    version: int
    attempt: int
    background: bool = False


class Background[T](threading.Thread):
    """A step of a refit beside the model's own. `result` waits for it and raises what it raised, each time it is asked.

    Where there is a device, the step goes into the stream of who starts it, so that it sees what was written there.
    It begins `after_s` from now.
    """

    def __init__(self, what: str, step: Callable[[], T], after_s: float = 0.0) -> None:
        super().__init__(name="refit-background", daemon=True)
        self._what = what
        self._step = step
        self._after_s = after_s
        self._error: Exception | None = None
        self._value: T | None = None
        self._stream = torch.accelerator.current_stream() if torch.accelerator.is_available() else None
        self.start()

    def run(self) -> None:
        try:
            if self._stream is not None:
                torch.accelerator.set_stream(self._stream)
            time.sleep(self._after_s)
            self._value = self._step()
        except Exception as error:
            self._error = error

    def require_ended(self, timeout_s: float) -> None:
        """Wait for its end, however it ended. Raises TransportError after `timeout_s`."""
        self.join(timeout_s)
        if self.is_alive():
            raise TransportError(
                f"{self._what} has not ended within {timeout_s:.1f} s; its thread is stuck: restart this engine"
            )

    def result(self, timeout_s: float) -> T:
        self.require_ended(timeout_s)
        if self._error is not None:
            raise self._error
        assert self._value is not None, "a step that raised nothing has a value"
        return self._value

"""Calls into C++ that may block for ever, made on a thread of their own and given up after a deadline."""

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread

from refit.transfer.errors import TransportError

type _Task = tuple[Callable[[], object], Future[object]]


class BoundedCalls:
    """One daemon thread that runs calls in order. A call that never returns costs its caller `timeout_s`, not for ever.

    Needed because a TCPStore client has no read time-out: with its server stopped (SIGSTOP) every call hangs.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._thread = Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def run[T](self, call: Callable[[], T], timeout_s: float) -> T:
        """The value of `call()`. Raises what it raises, or TransportError after `timeout_s`."""
        future: Future[object] = Future()
        self._tasks.put((call, future))
        try:
            return future.result(timeout_s)  # type: ignore[return-value]
        except TimeoutError as error:
            raise TransportError(
                f"{self._name} did not answer for {timeout_s:.1f} s; is the process that hosts it stopped?"
            ) from error

    def close(self) -> None:
        """Let the thread end after the calls that are queued."""
        self._tasks.put(None)

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None:
            call, future = task
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

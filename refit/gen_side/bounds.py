"""An engine's processes: which they are, how they are ended, and a deadline that ends them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from refit.transfer.errors import TransportError


def children() -> set[Any]:
    """All processes below this one, as psutil knows them: a process id that is used again is another one."""
    import psutil

    return set(psutil.Process().children(recursive=True))


@contextlib.contextmanager
def deadline(what: str, timeout_s: float, processes: Callable[[], set[Any]]) -> Iterator[None]:
    """End the engine's processes after `timeout_s`, which frees a call that waits for one of them."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        end_processes(processes(), grace_s=0.0)

    timer = threading.Timer(timeout_s, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    except BaseException as error:
        if expired.is_set():
            raise TransportError(
                f"{what} took longer than {timeout_s:.0f} s; the engine was ended"
            ) from error
        raise
    finally:
        timer.cancel()


def end_processes(processes: set[Any], grace_s: float = 2.0) -> None:
    """End exactly these processes: politely, then at once after `grace_s`."""
    import psutil

    left = list(processes)
    if grace_s:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, left = psutil.wait_procs(left, timeout=grace_s)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5.0)

"""An engine's processes: which they are, how they are ended, and a deadline that ends them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from refit.transfer.errors import TransportError
from refit.transfer.segments import remove_unmapped, shared_memory_of

CLOSE_S = 20.0


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


def segments_of(processes: set[Any]) -> set[Path]:
    """The shared memory that these processes map now."""
    return {segment for process in processes for segment in shared_memory_of(process.pid)}


def end_processes(processes: set[Any], grace_s: float = 2.0, noted: Collection[Path] = frozenset()) -> None:
    """End exactly these processes: politely, then at once after `grace_s`.

    Removes the shared memory that they leave: what they map now, and what was `noted` of those that died before. What
    this process maps of it are its queues to them.
    """
    import psutil

    segments = segments_of(processes).union(noted)
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
    remove_unmapped(segments, besides=(os.getpid(),))


def message_queues(llm: Any) -> tuple[Any, ...]:
    """The queues between the driver and vLLM's workers; none where the only worker lives in this process."""
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    executor = llm.llm_engine.engine_core.engine_core.model_executor
    if not isinstance(executor, MultiprocExecutor):
        return ()
    return (executor.rpc_broadcast_mq, *executor.response_mqs)


def shut_down(llm: Any, queues: tuple[Any, ...]) -> None:
    """vLLM's own shutdown, given CLOSE_S, and the end of its sockets and of the queues' shared memory.

    vLLM drops its queues unclosed and then collects garbage. A ZeroMQ context that is found there before its sockets
    waits for them inside the collector, for ever, and no thread of the process collects anything again. So the queues
    are kept until vLLM is done, and closed here.
    """

    def end() -> None:
        with contextlib.suppress(Exception):  # a closing that fails must not hide why the engine is closed
            llm.llm_engine.engine_core.shutdown()
        for socket in _sockets(queues):
            socket.close(linger=0)
        for queue in queues:
            _remove_memory(queue)

    thread = threading.Thread(target=end, name="refit-close-engine", daemon=True)
    thread.start()
    thread.join(CLOSE_S)


def _sockets(queues: tuple[Any, ...]) -> list[Any]:
    import zmq

    owners = [*queues, *(queue._spin_condition for queue in queues if queue._spin_condition is not None)]
    return [value for owner in owners for value in vars(owner).values() if isinstance(value, zmq.Socket)]


def _remove_memory(queue: Any) -> None:
    """Remove the segment that the queue has made, before the process that would do it at the very end is gone."""
    buffer = queue.buffer
    if buffer is not None and buffer.is_creator:
        buffer.is_creator = False  # else it is removed once more when the queue is collected
        with contextlib.suppress(FileNotFoundError):
            buffer.shared_memory.unlink()

"""Real vLLM ranks as forks of one process that has vLLM imported: a layout costs seconds, not a minute of imports.

The process is this module's own, apart from multiprocessing's one fork server, which other tests preload otherwise.
It ends with the process that started it, and its ranks with it.
"""

import atexit
import multiprocessing
import socket
import time
import traceback
from multiprocessing.connection import wait

FIRST_S = 400.0
"""The first call waits for the imports too."""

_spawn, _fork = multiprocessing.get_context("spawn"), multiprocessing.get_context("fork")
_nursery = []


def run_ranks(num_ranks, body, *args, timeout_s=FIRST_S):
    """body(rank, address, *args) in `num_ranks` processes; their results in rank order. Raises on a failure."""
    if not _nursery:
        mine, theirs = _spawn.Pipe()
        process = _spawn.Process(target=_serve, args=(theirs,))
        process.start()
        theirs.close()
        _nursery.extend([mine, process])
        atexit.register(_close)
    pipe = _nursery[0]
    pipe.send((num_ranks, body, args, timeout_s))
    if not pipe.poll(timeout_s + 30.0):
        _close()
        raise TimeoutError(f"no answer from the ranks' parent process within {timeout_s + 30.0:.0f} s")
    ok, value = pipe.recv()
    if not ok:
        raise AssertionError(value)
    return value


def _close():
    if _nursery:
        pipe, process = _nursery
        _nursery.clear()
        pipe.close()
        process.join(10.0)
        if process.is_alive():
            process.kill()
            process.join(5.0)


def _serve(pipe):
    from refit.gen_side.bare import preload

    preload()

    while True:
        try:
            num_ranks, body, args, timeout_s = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, _run(num_ranks, body, args, timeout_s)))
        except Exception as error:
            pipe.send((False, str(error)))


def _run(num_ranks, body, args, timeout_s):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    pipes, processes = [], []
    for rank in range(num_ranks):
        mine, theirs = _fork.Pipe(duplex=False)
        process = _fork.Process(target=_rank, args=(theirs, body, rank, address, args), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        return _collect(pipes, timeout_s)
    finally:
        for process in processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join(5.0)


def _collect(pipes, timeout_s):
    results = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(pipes):
        missing = [rank for rank in range(len(pipes)) if rank not in results]
        ready = wait([pipes[rank] for rank in missing], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {missing} gave no result within {timeout_s:.0f} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                ok, value = pipe.recv()
            except EOFError:
                ok, value = False, "the process died"
            if not ok:
                raise RuntimeError(f"rank {rank}: {value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(pipe, body, rank, address, args):
    try:
        pipe.send((True, body(rank, address, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))

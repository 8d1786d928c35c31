"""Real vLLM ranks as forks of one server process that has vLLM imported: a layout costs a second, not a minute."""

import multiprocessing
import socket
import time
import traceback
from multiprocessing.connection import wait

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.gen_side.preload"])

FIRST_S = 240.0
"""The first call waits for the server's imports too."""


def run_ranks(num_ranks, body, *args, timeout_s=FIRST_S):
    """body(rank, address, *args) in `num_ranks` processes; their results in rank order. Raises on the first failure."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    pipes, processes = [], []
    for rank in range(num_ranks):
        mine, theirs = _context.Pipe(duplex=False)
        process = _context.Process(target=_child, args=(theirs, body, rank, address, args), daemon=True)
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
        left = deadline - time.monotonic()
        missing = [rank for rank in range(len(pipes)) if rank not in results]
        ready = wait([pipes[rank] for rank in missing], max(0.0, left))
        if not ready:
            raise TimeoutError(f"ranks {missing} gave no result within {timeout_s:.0f} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                ok, value = pipe.recv()
            except EOFError:
                ok, value = False, "the process died"
            if not ok:
                raise AssertionError(f"rank {rank}: {value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _child(pipe, body, rank, address, args):
    try:
        pipe.send((True, body(rank, address, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))

"""One process per rank, which measures and says what it found through a control store."""

import multiprocessing
from collections.abc import Callable

from refit.transfer.rendezvous import ControlStore

TIMEOUT_S = 300.0


def run_ranks(name: str, num_ranks: int, target: Callable[..., None], *arguments: object) -> list[object]:
    """What each rank puts under `row/RANK`; `target` is called with (rank, port of the store, *arguments)."""
    host = ControlStore.host(run_id=name)
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(target=target, args=(rank, host.port, *arguments), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        return [host.get(f"row/{rank}", TIMEOUT_S * 2) for rank in range(num_ranks)]
    finally:
        for process in processes:
            process.join(10)
            process.kill()
        host.close()

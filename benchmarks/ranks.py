"""One process per rank, which measures and says what it found through a control store."""

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from refit.plan import Plan
from refit.transfer.bulk import StageJob
from refit.transfer.compiled import CompiledStage
from refit.transfer.groups import Groups
from refit.transfer.lanes import run_lanes
from refit.transfer.rendezvous import ControlStore
from refit.transfer.report import BulkReport
from refit.transfer.workspace import Workspace

CPU = torch.device("cpu")
NUM_STREAMS = 2
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


class Mover:
    """Moves all stages of one rank, over NUM_STREAMS lanes that keep their memory from one move to the next."""

    def __init__(self, plan: Plan, rank: int, params: Mapping[str, Tensor], groups: Groups) -> None:
        self._plan, self._rank, self._params, self._groups = plan, rank, params, groups
        self._workspaces = [Workspace() for _ in range(NUM_STREAMS)]

    def move(
        self,
        stages: Sequence[CompiledStage],
        move_stage: Callable[[StageJob], BulkReport],
        *,
        with_digests: bool = False,
    ) -> BulkReport:
        """By `move_stage`: that of `bulk`, of `golden`, or of a delta."""
        jobs = [
            StageJob(
                self._plan,
                stage,
                self._rank,
                self._params,
                self._groups.stages[stage.stage],
                time.monotonic() + TIMEOUT_S,
                CPU,
                with_digests,
                self._workspaces[number % NUM_STREAMS],
            )
            for number, stage in enumerate(stages)
        ]
        return run_lanes(jobs, move_stage, NUM_STREAMS, lambda _: self._groups.abort())

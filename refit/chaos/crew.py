"""The processes of a campaign: plain trainers and replicas as actors of a Ray of its own, ended and replaced."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from refit.chaos.faults import Fault
from refit.chaos.parties import PlainReplica, PlainTrainer
from refit.service.roster import Replacement
from refit.service.waiting import collect, gather

START_S = 120.0
THREADS = 4  # a replica stages, samples and answers probes at the same time


class Crew:
    """Trainers and replicas by number. Replicas are replaced without limit: the campaign is to go on."""

    def __init__(self, num_trainers: int, num_replicas: int, logs: Path) -> None:
        self._logs = logs
        self._num_trainers = num_trainers
        self._pids: dict[Any, int] = {}
        self.num_replaced = 0
        self.trainers: list[Any] = []
        self.generators: list[Any] = [self._replica(number) for number in range(num_replicas)]
        self.hire_trainers()

    def hire_trainers(self) -> None:
        """New trainers in the place of the old ones, as a new job has them."""
        for actor in self.trainers:
            self._end(actor)
        self.trainers = [
            self._actor(PlainTrainer, 1, rank, self._num_trainers, str(self._logs / f"train-{rank}.log"))
            for rank in range(self._num_trainers)
        ]
        everybody = [*self.trainers, *self.generators]
        calls = {str(number): actor.process_id.remote() for number, actor in enumerate(everybody)}
        found = collect(calls, "start", START_S).values()
        self._pids |= dict(zip((actor._actor_id for actor in everybody), found, strict=True))

    def arm(self, fault: Fault) -> None:
        """Set a fault in the process that it is for."""
        actors = self.trainers if fault.role == "trainer" else self.generators
        call = actors[fault.number].arm.remote(fault.role, fault.number, fault.phase, fault.kind, fault.count)
        collect({str(fault): call}, "arm", START_S)

    def disarm(self, actors: Mapping[str, Any], timeout_s: float) -> None:
        """Take back whatever has not struck in these."""
        calls = {who: actor.arm.remote("", 0, "", "", 1) for who, actor in actors.items()}
        gather(calls, "disarm", timeout_s)

    def end_generator(self, replica: int) -> None:
        self._end(self.generators[replica])

    def restart_generator(self, replica: int) -> Replacement:
        actor = self._replica(replica)
        self.generators[replica] = actor
        self.num_replaced += 1
        return Replacement(actor, actor.build.remote())

    def _replica(self, number: int) -> Any:
        return self._actor(PlainReplica, THREADS, number, str(self._logs / f"gen-{number}.log"))

    def _actor(self, kind: type[Any], threads: int, *args: Any) -> Any:
        made = ray.remote(kind).options(num_cpus=0, max_restarts=0, max_concurrency=threads)
        return made.remote(*args)

    def _end(self, actor: Any) -> None:
        """By Ray, and by its id: a stopped process does not hear Ray."""
        with contextlib.suppress(Exception):  # it may be dead already, which is what is wanted
            ray.kill(actor)
        pid = self._pids.pop(actor._actor_id, None)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

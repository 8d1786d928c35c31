"""The processes of a campaign: plain trainers and replicas as actors of a Ray of its own, ended and replaced."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import astuple
from pathlib import Path
from typing import Any

import ray

from refit.chaos.faults import TRAINER, Fault
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
        collect(self.process_ids(), "start", START_S)

    def process_ids(self) -> dict[str, Any]:
        """{name: reference of the process id} of everybody, as asked at the birth of each."""
        named = {f"train rank {rank}": actor for rank, actor in enumerate(self.trainers)}
        named |= {f"generator {number}": actor for number, actor in enumerate(self.generators)}
        return {who: self._pids[actor._actor_id] for who, actor in named.items()}

    def arm(self, fault: Fault, mark: Path) -> None:
        """Set a fault in the process that it is for; it leaves a file at `mark` when it strikes."""
        actors = self.trainers if fault.role == TRAINER else self.generators
        call = actors[fault.number].arm.remote(*astuple(fault), str(mark))
        collect({str(fault): call}, "arm", START_S)

    def disarm(self, timeout_s: float) -> None:
        """Take back whatever has not struck. Those that are gone or stuck do not answer, which is no trouble here."""
        everybody = [*self.trainers, *self.generators]
        calls = {str(n): actor.arm.remote("", 0, "", "", 1, "") for n, actor in enumerate(everybody)}
        gather(calls, "disarm", timeout_s)

    def fill_disks(self) -> None:
        """The log of every process is on a full disk from now on."""
        everybody = [*self.trainers, *self.generators]
        calls = {str(number): actor.fill_disk.remote() for number, actor in enumerate(everybody)}
        collect(calls, "fill disk", START_S)

    def end_generator(self, replica: int) -> None:
        self._end(self.generators[replica])

    def restart_generator(self, replica: int) -> Replacement:
        actor = self._replica(replica)
        self.generators[replica] = actor
        return Replacement(actor, actor.build.remote())

    def _replica(self, number: int) -> Any:
        return self._actor(PlainReplica, THREADS, number, str(self._logs / f"gen-{number}.log"))

    def _actor(self, kind: type[Any], threads: int, *args: Any) -> Any:
        made = ray.remote(kind).options(num_cpus=0, max_restarts=0, max_concurrency=threads)
        actor = made.remote(*args)
        self._pids[actor._actor_id] = actor.process_id.remote()
        return actor

    def _end(self, actor: Any) -> None:
        """By Ray, and by its id: a stopped process does not hear Ray."""
        with contextlib.suppress(Exception):  # it may be dead already, which is what is wanted
            ray.kill(actor)
        answer = gather({"it": self._pids.pop(actor._actor_id)}, "end", 0.0).results
        for pid in answer.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

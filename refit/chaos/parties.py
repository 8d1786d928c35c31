"""A trainer and a replica without frameworks: the real endpoint on real parameters, in a process of its own.

They answer the same calls as `refit.service.actors`, so the service's own coordinator leads them. The replica serves
from live memory, stages beside it and commits by copying in place, tensor by tensor: a torn commit would show.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from refit.chaos import model
from refit.chaos.faults import Fault, FaultyGroup, FaultyTransport, Striker, fill_disk
from refit.service.actors import Actor
from refit.transfer.endpoint import Endpoint
from refit.transfer.errors import RefitFailed
from refit.transfer.groups import Groups
from refit.transfer.rendezvous import ControlStore


class Party(Actor):
    """What both have: a striker, and an endpoint whose transports tell it of every round."""

    def __init__(self, who: str, log_path: str) -> None:
        super().__init__(who, log_path)
        self._striker = Striker()
        self._endpoint: Endpoint | None = None

    def arm(self, role: str, number: int, phase: str, kind: str, count: int, mark: str) -> None:
        """Set the fault of this process, which leaves a file at `mark` when it strikes; kind "" disarms."""
        self._striker.arm(Fault(role, number, phase, kind, count) if kind else None, mark)

    def fill_disk(self) -> None:
        """The disk of this process's log is full from now on."""
        fill_disk()

    def _open(self, store: str, run_id: str, manifest: Any, timeout_s: float) -> Endpoint:
        self._leave()
        address, _, port = store.rpartition(":")
        self._control = ControlStore.join(address, int(port), run_id)
        self._striker.reach("prepare")
        endpoint = Endpoint.prepare(self._control, manifest, timeout_s)
        stages = {
            number: replace(group, transport=FaultyTransport(group.transport, self._striker))
            for number, group in endpoint._groups.stages.items()
        }
        misc = endpoint._groups.misc
        endpoint._groups = Groups(stages, None if misc is None else FaultyGroup.around(misc, self._striker))
        self._endpoint = endpoint
        return endpoint

    def _ready(self) -> Endpoint:
        assert self._endpoint is not None, f"{self._who} is not prepared"
        return self._endpoint

    def _leave(self) -> None:
        for part in (self._endpoint, self._control):
            if part is not None:
                part.close()
        self._endpoint = self._control = None


class PlainTrainer(Party):
    """One trainer stage."""

    def __init__(self, train_rank: int, num_ranks: int, log_path: str) -> None:
        super().__init__(f"train rank {train_rank}", log_path)
        self._manifest = model.train_manifest(train_rank, num_ranks)
        self._rank = train_rank
        self._params: dict[str, torch.Tensor] = {}

    def prepare_refit(self, store: str, run_id: str, timeout_s: float) -> None:
        with self._doing("prepare", told=True):
            self._open(store, run_id, self._manifest, timeout_s)

    def refit(self, version: int, attempt: int) -> None:
        with self._doing("refit", told=True):
            endpoint = self._ready()
            self._striker.reach("begin")
            params = {spec.name: model.weight(spec.name, version) for spec in self._manifest.params}
            endpoint.begin(version, attempt)
            endpoint.move_bulk(params)
            self._striker.reach("misc")
            if self._rank == 0:
                endpoint.send_misc((name, model.weight(name, version)) for name in endpoint.misc_names)
            self._striker.reach("report")
            endpoint.put_report()
            self._params = params

    def slices(self, suspects: Mapping[str, Sequence[str]], timeout_s: float) -> list[list[object]]:
        with self._doing("locate"):
            return self._ready().slices(self._params, suspects, timeout_s)


class PlainReplica(Party):
    """One replica. `sample` may be called at any time, also during a refit."""

    def __init__(self, replica: int, log_path: str) -> None:
        super().__init__(f"generator {replica}", log_path)
        self._live = {name: model.weight(name, 0) for name in model.shapes()}
        self._staging: dict[str, torch.Tensor] | None = None
        self._staged: tuple[int, int] | None = None
        self._version = 0
        self._broken = ""
        self._serving = threading.Lock()

    def build(self) -> None:
        """The weights are there since the constructor; this answers when that is done."""

    def prepare_refit(self, init_info: Mapping[str, Any]) -> None:
        with self._doing("prepare", told=True):
            manifest = model.gen_manifest(int(init_info["first_gen_rank"]), int(init_info["replica"]))
            self._open(init_info["store"], init_info["run_id"], manifest, float(init_info["timeout_s"]))

    def stage(self, version: int, attempt: int) -> None:
        with self._doing("stage", told=True):
            self._require_whole()
            endpoint = self._ready()
            self._staged = None
            self._striker.reach("begin")
            self._staging = {name: torch.zeros_like(tensor) for name, tensor in self._live.items()}
            endpoint.begin(version, attempt)
            endpoint.move_bulk(self._staging)
            self._striker.reach("misc")
            for name, tensor in endpoint.receive_misc():
                self._staging[name].copy_(tensor)
            self._striker.reach("report")
            endpoint.put_report()
            self._staged = (version, attempt)

    def finish(self, version: int, attempt: int) -> tuple[int, float]:
        with self._doing("finish", told=True):
            self._require_whole()
            self._striker.reach("decision")
            staging, self._staging = self._staging, None
            if self._staged == (version, attempt) and staging is not None:
                if self._committed():
                    with self._serving:
                        self._commit(version, staging)
                else:
                    self._ready().put_slices(staging)
            self._striker.reach("served")
            return self._version, 0.0

    def weight_version(self) -> int:
        return self._version

    def condition(self) -> str:
        return self._broken

    def sample(self) -> tuple[int, str, int]:
        """(version, digest of what serves, process id)."""
        with self._doing("generate"):
            self._striker.reach("generate")
            with self._serving:
                self._require_whole()
                return self._version, model.digest_of(self._live), os.getpid()

    def _committed(self) -> bool:
        try:
            return self._ready().decision()[0]
        except RefitFailed:
            return False

    def _commit(self, version: int, staging: Mapping[str, torch.Tensor]) -> None:
        self._broken = f"the commit of version {version} did not end"
        for number, (name, tensor) in enumerate(staging.items()):
            if number == len(staging) // 2:
                self._striker.reach("commit")
            self._live[name].copy_(tensor)
        self._version, self._broken = version, ""

    def _require_whole(self) -> None:
        if self._broken:
            raise RuntimeError(f"this replica must not serve: {self._broken}")

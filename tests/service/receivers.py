"""Receivers that are not vLLM, and rounds with them: the real endpoint and coordinator in threads of a test."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from refit.plan import Holding, ParamSpec, PlanOptions, RankManifest, Region, TensorSpec
from refit.service.http_refit import HttpRefit, join_source
from refit.transfer.endpoint import Endpoint
from refit.transfer.errors import RefitFailed, TransportError
from refit.transfer.protocol import FinishReport, finished_key
from refit.transfer.rendezvous import ControlStore
from refit.transfer.source import ModelSource

SHAPES = {"layer.up_proj.weight": (6, 4), "norm.weight": (4,)}


class Receiver:
    """One engine of one worker that keeps plain tensors: the real endpoint, and the calls of HttpEngine."""

    def __init__(self, spoil=False, fails="", commits=True):
        self.params = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        self.version, self.stamps, self.calls = None, [], []
        self._spoil, self._fails, self._commits = spoil, fails, commits
        self._endpoint = None

    def num_workers(self):
        return 1

    def weight_version(self):
        return "default" if self.version is None else str(self.version)

    def prepare(self, info):
        self.close()
        host, _, port = info["store"].rpartition(":")
        self._gen_rank = info["first_gen_rank"]
        self._control = ControlStore.join(host, int(port), info["run_id"])
        self._endpoint = Endpoint.prepare(self._control, self._manifest(), info["timeout_s"])

    def stage(self, version, attempt, background):
        assert not background, "this plan has misc"
        if self._fails:
            raise TransportError(self._fails)
        self._staged = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        self._version, self._attempt = version, attempt
        self._endpoint.begin(version, attempt)
        self._endpoint.move_bulk(self._staged)
        for name, tensor in self._endpoint.receive_misc():
            self._staged[name].copy_(tensor)
        if self._spoil:
            self._endpoint._attempt.misc_digests["norm.weight"] ^= 1
        self._endpoint.put_report()

    def pause(self, mode):
        self.calls.append(mode)

    def forget_prefixes(self):
        self.calls.append("forget")

    def resume(self):
        self.calls.append("resume")

    def finish(self, version):
        self.stamps.append(version)
        self.calls.append("finish")
        if self._fails or not self._commits:
            return
        commit, _ = self._endpoint.decision()
        if commit:
            self.params, self.version = self._staged, self._version
            finished = FinishReport(self._version, time.time(), 0.0, 0)
            self._control.put(finished_key(self._attempt, self._gen_rank), finished.message())

    def close(self):
        if self._endpoint is not None:
            self._endpoint.close()

    def _manifest(self):
        return RankManifest(
            "gen",
            self._gen_rank,
            0,
            self._gen_rank,
            tuple(TensorSpec(name, shape, "float32") for name, shape in SHAPES.items()),
            tuple(ParamSpec(name, shape, "float32") for name, shape in SHAPES.items()),
            tuple(
                Holding(name, Region.whole(shape), name, 0, self.params[name].stride())
                for name, shape in SHAPES.items()
            ),
            (),
        )


class Rounds:
    """A source of one rank and some receivers, all in threads of the test."""

    def __init__(self, *receivers):
        self.receivers = receivers
        self.tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
        options = PlanOptions(whitelist=(r".*proj\.weight",))
        self.refitter = HttpRefit.open(receivers, 1, timeout_s=20.0, options=options)
        self._beside = ThreadPoolExecutor(1)
        planned = self._beside.submit(self.refitter.prepare)
        self.source = join_source(
            ModelSource(self.tensors, 0), self.refitter.store, self.refitter.run_id, 20.0
        )
        planned.result(20.0)

    def refit(self, version):
        for tensor in self.tensors.values():
            tensor.add_(1.0)
        done = self._beside.submit(self.refitter.refit, version)
        with contextlib.suppress(RefitFailed):  # what the coordinator says is what counts
            self.source.send(version)
        return done.result(30.0)

    def rejoin(self):
        planned = self._beside.submit(self.refitter.prepare)
        self.source.rejoin()
        planned.result(20.0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.source.close()
        for receiver in self.receivers:
            receiver.close()
        self.refitter.close()
        self._beside.shutdown()

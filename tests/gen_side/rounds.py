"""A trainer rank and a coordinator in threads of the test, made of the real parts: Endpoint, plan, control store."""

import secrets
from concurrent.futures import ThreadPoolExecutor

import torch

from refit.plan import (
    DEFAULT_WHITELIST,
    Holding,
    ParamSpec,
    PlanOptions,
    RankManifest,
    Region,
    TensorSpec,
    canonical,
)
from refit.service.agreement import Terms, agree_on_plan, collect_reports, describe_mismatches, mismatches_of
from refit.transfer.digest import whole_digest
from refit.transfer.endpoint import Endpoint
from refit.transfer.errors import Failure
from refit.transfer.memory import dtype_name
from refit.transfer.protocol import INPUTS, Inputs, decision_key
from refit.transfer.rendezvous import ControlStore
from tests.gen_side.exact import stacked

TIMEOUT_S = 60.0


def manifest_of(params):
    """One trainer rank that holds every tensor whole, experts stacked."""
    tensors, specs, holdings = [], [], []
    for name, tensor in params.items():
        shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
        tensors.append(TensorSpec(name, shape, dtype))
        specs.append(ParamSpec(name, shape, dtype))
        holdings.append(Holding(name, Region.whole(shape), name, 0, tuple(tensor.stride())))
    return RankManifest("train", 0, 0, 0, tuple(tensors), tuple(specs), tuple(holdings), ())


class Rounds:
    """Refits of one generator from whole HF tensors. Use as a context manager.

    `device` is where the trainer's own tensors live: None for the CPU and gloo, else a CUDA device and NCCL."""

    def __init__(self, generator, tensors, num_gen, whitelist=DEFAULT_WHITELIST, bulk="p2p", device=None):
        self.generator = generator
        self.num_gen = num_gen
        self.params = {name: tensor.to(device or "cpu") for name, tensor in stacked(tensors).items()}
        self.attempt = 0
        self.reports = {}  # of the last attempt, by joint rank
        self.control = ControlStore.host(run_id=secrets.token_hex(4))
        self.mine = ControlStore.join("127.0.0.1", self.control.port, self.control.run_id)
        backend = "gloo" if device is None else "nccl"
        terms = Terms(
            1, num_gen, PlanOptions(bucket_bytes=1 << 20, whitelist=whitelist), backend, bulk, 2, TIMEOUT_S
        )
        info = {
            "action": "prepare",
            "store": f"127.0.0.1:{self.control.port}",
            "run_id": self.control.run_id,
            "first_gen_rank": 0,
            "replica": 0,
            "timeout_s": TIMEOUT_S,
        }
        self.pool = ThreadPoolExecutor(2)
        plan = self.pool.submit(agree_on_plan, self.control, terms)
        endpoint = self.pool.submit(Endpoint.prepare, self.mine, manifest_of(self.params), TIMEOUT_S, device)
        generator.prepare_refit(info)
        self.plan, self.endpoint = plan.result(TIMEOUT_S), endpoint.result(TIMEOUT_S)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.endpoint.close()
        self.pool.shutdown()
        self.mine.close()
        self.control.close()

    def refit(self, version, tensors, refuse="", fail="", between=None):
        """One refit; True if it was committed. `refuse`: decide against it. `fail`: report a failure after staging.
        `between` is called when the version is staged and not yet decided on."""
        self.attempt += 1
        for name, tensor in stacked(tensors).items():
            self.params[name].copy_(tensor)
        sent = self.pool.submit(self._send, version, tensors)
        decided = self.pool.submit(self._decide, version, refuse, fail)
        self.generator.stage(version, self.attempt)
        sent.result(TIMEOUT_S)
        decided.result(TIMEOUT_S)
        if between is not None:
            between()
        return self.generator.finish(version, self.attempt)

    def audit(self):
        self.attempt += 1
        self.generator.audit(str(self.attempt))
        return [self.control.get(f"audit/{self.attempt}/{rank}", TIMEOUT_S) for rank in range(self.num_gen)]

    def manifests(self):
        """What each generator rank said it holds, in rank order."""
        inputs = Inputs.of_message(self.control.get(INPUTS, TIMEOUT_S))
        return inputs.gen.ranks

    def trained_digests(self):
        return {name: f"{whole_digest(tensor):016x}" for name, tensor in self.params.items()}

    def _send(self, version, tensors):
        self.endpoint.begin(version, self.attempt)
        self.endpoint.move_bulk(self.params)
        if self.endpoint.misc_names:
            self.endpoint.send_misc((name, tensors[name]) for name in self.endpoint.misc_names)
        return self.endpoint.put_report()

    def _decide(self, version, refuse, fail):
        self.reports = collect_reports(self.control, self.plan, self.attempt, version, TIMEOUT_S)
        reports = self.reports
        reason = describe_mismatches(mismatches_of(self.plan, reports)) or refuse
        if fail:
            return self.control.fail("decide", "coordinator", fail)
        self.control.put(decision_key(self.attempt), {"commit": not reason, "reason": reason})
        return reason


__all__ = ["TIMEOUT_S", "Failure", "Rounds", "canonical", "manifest_of", "torch"]

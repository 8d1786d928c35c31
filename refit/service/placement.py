"""Where actors run: anywhere on a Ray of our own; on an existing cluster in one placement group, by node labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from refit.service.config import JobConfig
from refit.transfer.errors import TransportError


@dataclass(frozen=True, slots=True)
class Places:
    """One bundle per actor, trainers first; `group` is None on a Ray of our own. A replacement takes its old bundle."""

    bundles: tuple[dict[str, float], ...]
    num_trainers: int
    group: PlacementGroup | None

    @classmethod
    def open(cls, config: JobConfig, timeout_s: float) -> Places:
        """Reserve all places at once, so that two jobs never hold half of what each needs.

        Raises TransportError that lists what was asked for when the cluster cannot give it in time.
        """
        bundles = bundles_of(config)
        num_trainers = config.policy.world_size
        if config.cluster.address is None:
            return cls(bundles, num_trainers, None)
        labels = [config.cluster.policy_labels] * num_trainers
        labels += [config.cluster.generation_labels] * (len(bundles) - num_trainers)
        strategy = config.cluster.placement
        group = placement_group(
            list(bundles), strategy=strategy, bundle_label_selector=list(map(dict, labels))
        )
        try:
            ray.get(group.ready(), timeout=timeout_s)
        except GetTimeoutError as error:
            remove_placement_group(group)
            raise TransportError(
                f"the cluster has no place by {strategy} for {bundles} with labels {labels} within {timeout_s:.0f} s; "
                "see cluster.placement, cluster.policy_labels and cluster.generation_labels"
            ) from error
        return cls(bundles, num_trainers, group)

    def of_trainer(self, rank: int) -> dict[str, Any]:
        """Ray's options for a trainer."""
        return self._options(rank)

    def of_generator(self, replica: int) -> dict[str, Any]:
        """Ray's options for a generator, whatever number of actors held that place before."""
        return self._options(self.num_trainers + replica)

    def close(self) -> None:
        """Give the places back."""
        if self.group is not None:
            remove_placement_group(self.group)

    def _options(self, bundle: int) -> dict[str, Any]:
        options: dict[str, Any] = {
            "num_cpus": self.bundles[bundle]["CPU"] if self.group is not None else 0,
            "num_gpus": self.bundles[bundle].get("GPU", 0),
        }
        if self.group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group=self.group, placement_group_bundle_index=bundle
            )
        return options


def bundles_of(config: JobConfig) -> tuple[dict[str, float], ...]:
    """What each actor takes: a CPU per rank, and a GPU per rank where the weights travel by NCCL."""
    sizes = [1] * config.policy.world_size
    sizes += [config.generation.workers_per_replica] * config.generation.replicas
    on_gpu = config.refit.backend == "nccl"
    return tuple({"CPU": float(size), **({"GPU": float(size)} if on_gpu else {})} for size in sizes)

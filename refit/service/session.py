"""What one prepare agreed on. A lost or joining replica means a new session: its keys, plan and groups are its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from refit.plan import Plan
from refit.service.refit_record import PlanRecord
from refit.transfer.rendezvous import ControlStore


@dataclass(frozen=True, slots=True)
class Session:
    """Keys of the control store, the plan, and the replicas in it by place."""

    control: ControlStore
    plan: Plan
    plan_record: PlanRecord
    replicas: tuple[int, ...]
    workers_per_replica: int

    def gen_ranks(self, replicas: Iterable[int]) -> tuple[int, ...]:
        """The generator ranks of those of `replicas` that are in this session."""
        wanted, size = set(replicas), self.workers_per_replica
        places = [place for place, replica in enumerate(self.replicas) if replica in wanted]
        return tuple(rank for place in places for rank in range(place * size, (place + 1) * size))

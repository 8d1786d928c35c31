"""Random schedules of faults over refits in memory: whatever happens, no replica ever serves a torn version.

Ranks are real endpoints on in-memory transports, the control store is real code on a store of this process, and what
the coordinator concludes is `refit.service.agreement`. Trainers only send, so ranks can take turns without threads.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from torch.distributed import HashStore, PrefixStore

from refit.plan import build_plan
from refit.service.agreement import collect_reports, describe_mismatches, mismatches_of
from refit.transfer import watch as watching
from refit.transfer.bounded import BoundedCalls
from refit.transfer.delta.base import Base
from refit.transfer.endpoint import Endpoint
from refit.transfer.errors import RefitFailed, TransportError
from refit.transfer.groups import Group, Groups
from refit.transfer.protocol import P2P, Inputs, decision_key
from refit.transfer.rendezvous import ANSWER_S, ControlStore
from refit.transfer.transports.in_memory import FAULTS, Fault, InMemoryNetwork
from refit.transfer.watch import Watch
from tests.transfer.cases import empty_params, fill_params, make_case, same_bits

ROUND_S = 0.02  # what a stalled wire costs
MOMENTS = ("before it begins", "before it reports", "after it reports", "in its commit")
CALLS = BoundedCalls("the store of this process")


class LocalStore(ControlStore):
    """The control store without a socket."""

    def __init__(self, run_id: str) -> None:
        self._calls, self._answer_s = CALLS, ANSWER_S
        self.address, self.port, self.run_id = "127.0.0.1", 0, run_id
        self._store = PrefixStore(f"refit/{run_id}", HashStore())


@dataclass
class World:
    """One case with its plan, made once: planning is not what is tested here."""

    seed: int
    num_train: int = 2
    num_gen: int = 2

    def __post_init__(self) -> None:
        self.case = make_case(self.seed, self.num_train, self.num_gen, num_tensors=4, largest_dim=12)
        self.plan = build_plan(self.case.train, self.case.gen, self.case.options)
        self.ranks = range(self.case.num_ranks)
        self.links = [(src, dst) for src in range(self.num_train) for dst in self.ranks[self.num_train :]]

    def contents(self, rank: int, version: int) -> dict[str, torch.Tensor]:
        manifest = self.case.manifest(rank)
        params = empty_params(manifest)
        fill_params(params, self.case, manifest, self.seed, version)
        return params


WORLDS = [world for world in map(World, range(40)) if not world.plan.misc_names][:6]


@dataclass
class Replica:
    """What a generator rank serves: `version` None until it has committed one, or after it died."""

    live: dict[str, torch.Tensor] = field(default_factory=dict)
    version: int | None = None


class Schedules(RuleBasedStateMachine):
    @initialize(world=st.sampled_from(WORLDS))
    def begin(self, world: World) -> None:
        self.world = world
        self.replicas = {rank: Replica() for rank in world.ranks[world.num_train :]}
        self.version = self.tried = self.attempt = self.num_sessions = 0
        self.endpoints: dict[int, Endpoint] = {}
        self.committed: list[int] = []

    @rule()
    def refit(self) -> None:
        assert self.round() == "committed"
        assert {replica.version for replica in self.replicas.values()} == {self.tried}

    @rule(kind=st.sampled_from(FAULTS), link=st.integers(0, 63), number=st.integers(0, 2))
    def refit_over_a_wire_that_lies(self, kind: str, link: int, number: int) -> None:
        src, dst = self.world.links[link % len(self.world.links)]
        self.prepare(Fault(kind, src, dst, number))
        self.round()
        self.endpoints = {}  # the fault may be in the wire still

    @rule(rank=st.integers(0, 63), moment=st.sampled_from(MOMENTS))
    def refit_while_a_rank_dies(self, rank: int, moment: str) -> None:
        outcome = self.round(dies=rank % len(self.world.ranks), moment=moment)
        assert (outcome == "committed") == (moment in MOMENTS[2:]), (outcome, moment)
        self.endpoints = {}  # a new process takes its place, in a new session

    @rule()
    def refit_while_the_coordinator_decides_nothing(self) -> None:
        assert self.round(decides=False) == "failed"
        self.endpoints = {}

    @invariant()
    def no_replica_serves_a_torn_version(self) -> None:
        for rank, replica in getattr(self, "replicas", {}).items():
            if replica.version is None:
                continue
            expected = self.world.contents(rank, replica.version)
            for name, tensor in expected.items():
                assert same_bits(replica.live[name], tensor), (rank, replica.version, name)

    @invariant()
    def all_that_serve_serve_the_newest_committed_version_and_versions_only_grow(self) -> None:
        serving = {r.version for r in getattr(self, "replicas", {}).values()} - {None}
        committed = getattr(self, "committed", [])
        assert serving <= set(committed[-1:]), (serving, committed)
        assert committed == sorted(set(committed))

    def prepare(self, fault: Fault | None = None) -> None:
        """A session: fresh keys, fresh wires; the plan is known."""
        world = self.world
        self.num_sessions += 1
        self.control = LocalStore(f"run-{self.num_sessions}")
        networks = {stage: InMemoryNetwork(world.ranks, fault) for stage in world.plan.stages}
        case, plan = world.case, world.plan
        inputs = Inputs(case.train, case.gen, case.options, "gloo", P2P, 1, ROUND_S, plan.digest)
        for rank in world.ranks:
            stages = {
                stage.stage: Group(
                    f"stage{stage.stage}", stage.group_ranks, rank, networks[stage.stage].transport(rank)
                )
                for stage in plan.rank_plan(rank).stages
            }
            groups = Groups(stages, None)
            pulse = Watch(self.control, rank, groups.abort)
            self.endpoints[rank] = Endpoint(
                self.control, case.manifest(rank), inputs, plan, groups, pulse, torch.device("cpu"), Base()
            )

    def round(self, dies: int | None = None, moment: str = "", decides: bool = True) -> str:
        """One refit: "committed", "discarded" or "failed". Every rank gets its turn, whatever happened to others."""
        if not self.endpoints:
            self.prepare()
        self.tried += 1
        self.attempt += 1
        staged = {rank: self.take_turn(rank, moment if rank == dies else "") for rank in self.world.ranks}
        outcome = self.decide(decides)
        if outcome == "committed":
            self.committed.append(self.tried)
        for rank, replica in self.replicas.items():
            if rank == dies:
                replica.version, replica.live = None, {}
                continue
            with contextlib.suppress(RefitFailed):
                if self.endpoints[rank].decision()[0]:
                    replica.version, replica.live = self.tried, staged[rank]
        return outcome

    def take_turn(self, rank: int, dies: str) -> dict[str, torch.Tensor]:
        """A rank's share of staging; returns the memory that it sent from or received into."""
        endpoint = self.endpoints[rank]
        is_trainer = rank < self.world.num_train
        staged = (
            self.world.contents(rank, self.tried)
            if is_trainer
            else empty_params(self.world.case.manifest(rank))
        )
        if dies == MOMENTS[0]:
            return staged
        with contextlib.suppress(RefitFailed):
            endpoint.begin(self.tried, self.attempt)
            endpoint.move_bulk(staged)
            if dies != MOMENTS[1]:
                endpoint.put_report()
        return staged

    def decide(self, decides: bool) -> str:
        """What the coordinator does with the reports that are there."""
        try:
            reports = collect_reports(self.control, self.world.plan, self.attempt, self.tried, 0.0)
            if not decides:
                raise TransportError("the coordinator died")
            mismatches = mismatches_of(self.world.plan, reports)
            reason = describe_mismatches(mismatches)
            self.control.put(decision_key(self.attempt), {"commit": not mismatches, "reason": reason})
        except (RefitFailed, TransportError) as error:
            self.control.fail("refit", "coordinator", str(error))
            return "failed"
        return "discarded" if mismatches else "committed"


@pytest.fixture
def quick(monkeypatch):
    """Whether a rank shows a pulse is not asked here: nobody has one."""
    monkeypatch.setattr(watching, "SILENT_S", 0.0)


def run_schedules(num_schedules: int, num_steps: int) -> None:
    run_state_machine_as_test(
        Schedules,
        settings=settings(
            max_examples=num_schedules,
            stateful_step_count=num_steps,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_some_schedules_of_faults_keep_the_invariants(quick):
    run_schedules(60, 5)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_thousand_schedules_of_faults_keep_the_invariants(quick):
    run_schedules(10_000, 5)

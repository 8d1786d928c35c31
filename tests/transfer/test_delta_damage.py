"""A wire that lies about a delta is refused, or named by the digests; nothing wrong goes unseen, nothing hangs."""

import threading
import time

import pytest
import torch

from refit.plan import build_plan
from refit.transfer.bulk import StageJob
from refit.transfer.compiled import compile_stage
from refit.transfer.delta import notes
from refit.transfer.delta.base import NO_TOKEN, Base
from refit.transfer.delta.mover import DeltaMove
from refit.transfer.errors import TransportError
from refit.transfer.groups import Group
from refit.transfer.transports.in_memory import CORRUPT, DROP, FAIL, SWAP, TWICE, Fault, InMemoryNetwork
from tests.transfer.cases import empty_params, few_changes, fill_params, make_case, param_dtypes, same_bits
from tests.transfer.test_corruption import faults_found

SEED = 0
CPU = torch.device("cpu")
DEADLINE_S = 3.0


class World:
    """All ranks of a case as threads of one process, with what they keep from one refit to the next."""

    def __init__(self):
        self.case = make_case(SEED, num_tensors=6, largest_dim=64)
        self.plan = build_plan(self.case.train, self.case.gen, self.case.options)
        self.manifests = {rank: self.case.manifest(rank) for rank in range(self.case.num_ranks)}
        self.params = {rank: empty_params(manifest) for rank, manifest in self.manifests.items()}
        self.bases = {rank: Base() for rank in self.manifests}
        for rank, base in self.bases.items():
            base.fit(self.manifests[rank], self.plan)

    def refit(self, version, fault=None):
        """One refit of every rank; a commit where nothing failed. Returns reports by rank, and errors."""
        for rank in range(self.plan.num_train):
            fill_params(self.params[rank], self.case, self.manifests[rank], SEED, version, few_changes)
        networks = {stage: InMemoryNetwork(range(self.case.num_ranks), fault) for stage in self.plan.stages}
        reports, errors = {}, []
        threads = [
            threading.Thread(target=self.run, args=(rank, version, networks, reports, errors), daemon=True)
            for rank in self.bases
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S + 10)
            assert not thread.is_alive()
        return reports, errors

    def run(self, rank, version, networks, reports, errors):
        base = self.bases[rank]
        move = DeltaMove(base, base.begin(self.params[rank]))
        dtypes = param_dtypes(self.manifests[rank])
        for stage in self.plan.rank_plan(rank).stages:
            group = Group("memory", stage.group_ranks, rank, networks[stage.stage].transport(rank))
            compiled = compile_stage(self.plan, stage, rank, dtypes, CPU)
            deadline = time.monotonic() + DEADLINE_S
            job = StageJob(self.plan, compiled, rank, self.params[rank], group, deadline, CPU)
            try:
                reports.setdefault(rank, []).append(move.move_stage(job))
            except TransportError as error:
                errors.append(str(error))
                for network in networks.values():  # the first failure ends the round everywhere
                    for other in self.bases:
                        network.transport(other).abort()
                return
        base.end(self.params[rank], bytes([version]) * 16)
        base.committed()

    def wrong_tensors(self, version):
        """(tensor, rank) whose memory is not as planned, by looking at every element."""
        wrong = set()
        for rank in range(self.plan.num_train, self.case.num_ranks):
            expected = empty_params(self.manifests[rank])
            fill_params(expected, self.case, self.manifests[rank], SEED, version, few_changes)
            wrong |= {
                (holding.tensor, rank)
                for holding in self.manifests[rank].holdings
                if not same_bits(self.params[rank][holding.param], expected[holding.param])
            }
        return wrong


def test_deltas_run_over_the_reference_transport():
    world = World()
    wire_bytes = []
    for version in (1, 2, 3):
        reports, errors = world.refit(version)
        assert errors == [] and not faults_found(world.plan, reports) and not world.wrong_tensors(version)
        wire_bytes.append(sum(report.wire_bytes_sent for rank in (0, 1) for report in reports[rank]))
    assert max(wire_bytes[1:]) < 0.5 * wire_bytes[0], wire_bytes


@pytest.mark.parametrize("number", [4, 9])
def test_after_a_failure_on_the_way_a_half_changed_base_is_never_used(number):
    world = World()
    world.refit(1)
    _, errors = world.refit(2, Fault(FAIL, 0, 2, number))
    assert any("failed on demand" in error for error in errors)
    assert world.bases[0].token == bytes([1]) * 16, "the trainer still has version 1"
    for version in (3, 4):
        reports, errors = world.refit(version)
        assert errors == [] and not faults_found(world.plan, reports) and not world.wrong_tensors(version)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [CORRUPT, DROP, TWICE, SWAP, FAIL])
def test_a_lying_wire_is_refused_or_named_and_never_goes_unseen(kind):
    outcomes = set()
    for source, target, number in [(2, 0, 0), *[(0, 2, number) for number in range(11)]]:
        world = World()
        world.refit(1)
        reports, errors = world.refit(2, Fault(kind, source, target, number))
        wrong = world.wrong_tensors(2)
        if errors:
            outcomes.add("refused")
        else:
            assert faults_found(world.plan, reports) == wrong
            outcomes.add("named" if wrong else "harmless")
    assert "refused" in outcomes
    if kind == CORRUPT:
        assert "named" in outcomes


def a_parcel():
    case = make_case(SEED)
    plan = build_plan(case.train, case.gen, case.options)
    (stage, *_) = plan.rank_plan(2).stages
    compiled = compile_stage(plan, stage, 2, param_dtypes(case.manifest(2)), CPU)
    return next(parcel for parcel in compiled.parcels if parcel.num_bytes > 8)


@pytest.mark.parametrize("more", [-1, 1, 1 << 40, -(1 << 62)])
def test_lengths_are_refused_before_memory_is_taken_for_them(more):
    parcel, token = a_parcel(), b"v" * 16
    told = notes.lengths_of(NO_TOKEN, [parcel.num_bytes + more])
    with pytest.raises(
        TransportError, match=f"rank 7 announces .* of a parcel of {parcel.num_bytes} that is"
    ):
        notes.lengths_in(told, [parcel], token, 7)
    if more != -1:
        with pytest.raises(TransportError, match="sent as changes"):
            notes.lengths_in(notes.lengths_of(token, [parcel.num_bytes + more]), [parcel], token, 7)


@pytest.mark.parametrize("held", [NO_TOKEN, b"w" * 16], ids=["nothing", "another"])
def test_changes_of_a_version_that_is_not_held_are_refused(held):
    parcel = a_parcel()
    with pytest.raises(TransportError, match=f"changes of version token {b'v'.hex() * 16}, this rank holds"):
        notes.lengths_in(notes.lengths_of(b"v" * 16, [3]), [parcel], held, 7)
    assert notes.lengths_in(notes.lengths_of(NO_TOKEN, [parcel.num_bytes]), [parcel], held, 7) == (
        parcel.num_bytes,
    )


def test_weights_that_are_not_in_host_memory_are_refused():
    world = World()
    rank, base = 0, world.bases[0]
    (stage, *_) = world.plan.rank_plan(rank).stages
    compiled = compile_stage(world.plan, stage, rank, param_dtypes(world.manifests[rank]), CPU)
    network = InMemoryNetwork(stage.group_ranks)
    group = Group("memory", stage.group_ranks, rank, network.transport(rank))
    job = StageJob(world.plan, compiled, rank, world.params[rank], group, 0.0, torch.device("meta"))
    with pytest.raises(TransportError, match="weights in host memory, these are on meta"):
        DeltaMove(base, base.begin(world.params[rank])).move_stage(job)

"""Every way in which a wire can lie is caught, by the digests or before, and named by tensor and rank."""

import threading
import time

import pytest
import torch

from refit.plan import build_plan
from refit.transfer.bulk import StageJob, move_stage
from refit.transfer.compiled import compile_stage
from refit.transfer.digest import MASK
from refit.transfer.errors import TransportError
from refit.transfer.groups import Group
from refit.transfer.runs import Runs
from refit.transfer.transports.in_memory import (
    CORRUPT,
    DROP,
    FAIL,
    STALL,
    SWAP,
    TWICE,
    Fault,
    InMemoryNetwork,
)
from tests.transfer.cases import empty_params, fill_params, make_case, param_dtypes, same_bits

SEED = 5


def run_in_threads(fault: Fault | None, deadline_s: float = 20.0):
    """One bulk refit, every rank a thread. Returns case, plan, params, and reports and errors by rank."""
    case = make_case(SEED, num_tensors=16, largest_dim=64)
    plan = build_plan(case.train, case.gen, case.options)
    params = {rank: empty_params(case.manifest(rank)) for rank in range(case.num_ranks)}
    for rank in range(len(case.train.ranks)):
        fill_params(params[rank], case, case.manifest(rank), SEED, 0)
    networks = {stage: InMemoryNetwork(range(case.num_ranks), fault) for stage in plan.stages}
    reports, errors = {}, {}

    def run(rank: int) -> None:
        for stage in plan.rank_plan(rank).stages:
            group = Group("memory", stage.group_ranks, rank, networks[stage.stage].transport(rank))
            compiled = compile_stage(
                plan, stage, rank, param_dtypes(case.manifest(rank)), torch.device("cpu")
            )
            deadline = time.monotonic() + deadline_s
            job = StageJob(plan, compiled, rank, params[rank], group, deadline, torch.device("cpu"))
            try:
                reports.setdefault(rank, []).append(move_stage(job))
            except TransportError as error:
                errors[rank] = str(error)
                group.transport.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in params]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(deadline_s + 20)
        assert not thread.is_alive()
    return case, plan, params, reports, errors


def faults_found(plan, reports):
    """(tensor, rank) whose digest is not the sum of those that trainers sent."""
    off = {}
    for rank, parts in reports.items():
        sign = 1 if rank < plan.num_train else -1
        for part in parts:
            for tensor, by_rank in part.digests.items():
                for dst, value in by_rank.items():
                    off[tensor, dst] = off.get((tensor, dst), 0) + sign * value
    return {key for key, value in off.items() if value & MASK}


def wrong_tensors(case, params) -> set[tuple[str, int]]:
    """(tensor, rank) whose memory is not as planned, by looking at every element."""
    wrong = set()
    for rank in range(len(case.train.ranks), case.num_ranks):
        manifest = case.manifest(rank)
        expected = empty_params(manifest)
        fill_params(expected, case, manifest, SEED, 0)
        wrong |= {
            (holding.tensor, rank)
            for holding in manifest.holdings
            if not same_bits(params[rank][holding.param], expected[holding.param])
        }
    return wrong


def test_without_a_fault_all_digests_agree():
    case, plan, params, reports, errors = run_in_threads(None)
    assert errors == {} and faults_found(plan, reports) == set() and wrong_tensors(case, params) == set()


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("kind", [CORRUPT, DROP, TWICE, SWAP])
def test_a_lying_wire_is_named_by_tensor_and_rank(kind, number):
    case, plan, params, reports, errors = run_in_threads(Fault(kind, 0, 2, number))
    assert errors == {}
    wrong = wrong_tensors(case, params)
    assert wrong and faults_found(plan, reports) == wrong


def test_an_unpack_that_leaves_memory_as_it_was_is_named_by_tensor_and_rank(monkeypatch):
    copy, skipped = Runs.copy, []

    def once_lazy(runs, addresses, parcel, is_pack):
        if is_pack or skipped or not runs.num_bytes:
            copy(runs, addresses, parcel, is_pack)
        else:
            skipped.append(runs)

    monkeypatch.setattr(Runs, "copy", once_lazy)
    case, plan, params, reports, errors = run_in_threads(None)
    wrong = wrong_tensors(case, params)
    assert errors == {} and skipped and wrong
    assert faults_found(plan, reports) == wrong


@pytest.mark.parametrize("kind", [STALL, FAIL])
def test_a_wire_that_stops_is_an_error_that_names_the_peer(kind):
    _, _, _, _, errors = run_in_threads(Fault(kind, 0, 2, 1), deadline_s=2.0)
    words = "from rank 0" if kind == STALL else "to rank 2 failed on demand"
    assert any(words in error for error in errors.values()), errors

"""Plans of random worlds against brute force over elements."""

import os
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.plan import (
    Mesh,
    PlanOptions,
    Replicate,
    TensorSpec,
    build_plan,
    decode_manifest,
    encode_manifest,
    mesh_manifest,
)
from refit.plan.synth.config import model_from_config
from refit.plan.synth.gen import gen_manifest
from refit.plan.synth.parallel import GenMesh, TrainMesh
from refit.plan.synth.train import train_manifest
from tests.plan.test_models import TINY_MOE
from tests.plan.worlds import elements, expected, random_world, run


def check_world(seed):
    train, gen, options = random_world(seed)
    plan = build_plan(train, gen, options)
    assert run(plan, train, gen) == expected(plan, gen)
    check_classes(plan, train, gen)
    check_routes(plan, gen)
    return plan


def check_classes(plan, train, gen):
    """bulk exactly when the trainers hold all that is wanted and the generators hold everything (one replica
    here)."""
    for tensor in plan.tensors.values():
        whole = set(product(*map(range, tensor.shape)))
        held = {
            index
            for rank in train.ranks
            for h in rank.holdings
            if h.tensor == tensor.name
            for index in elements(h.region)
        }
        wanted = {
            index
            for rank in gen.ranks
            for h in rank.holdings
            if h.tensor == tensor.name
            for index in elements(h.region)
        }
        provable = bool(wanted) and wanted <= held and wanted == whole
        assert (tensor.kind == "bulk") == provable, tensor


def check_routes(plan, gen):
    routes = list(plan.routes())
    assert len(routes) == plan.num_routes
    wanted = {}
    for rank in gen.ranks:
        for held in rank.holdings:
            if plan.tensors[held.tensor].kind == "bulk":
                for index in elements(held.region):
                    key = (plan.num_train + rank.rank, held.tensor, index)
                    wanted[key] = wanted.get(key, 0) + 1
    for route in routes:
        for index in elements(route.region):
            wanted[route.dst_rank, route.tensor, index] -= 1
    assert not any(wanted.values())


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_any_world_moves_each_wanted_element_once_from_a_rank_that_has_it(seed):
    check_world(seed)


@pytest.mark.slow
@settings(max_examples=int(os.environ.get("REFIT_PLAN_EXAMPLES", "2500")), deadline=None)
@given(st.integers(0, 2**32))
def test_thousands_of_worlds_equal_brute_force(seed):
    check_world(seed)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_a_plan_from_wire_documents_is_the_same_plan(seed):
    train, gen, options = random_world(seed)
    again = build_plan(
        decode_manifest(encode_manifest(train)), decode_manifest(encode_manifest(gen)), options
    )
    assert again.digest == build_plan(train, gen, options).digest


@pytest.mark.parametrize("max_ops", [1, 2, 3, 4])
def test_a_rank_with_many_rounds_meets_no_more_peers_in_one_than_it_may(max_ops):
    """Also where the peers are no multiple of it: the last phase of one turn is not the first of the next."""
    weight = TensorSpec("weight", (640, 64), "float32")
    train, gen = (
        mesh_manifest(side, Mesh((size,), tuple(range(size))), {"weight": (weight, (Replicate(),))})
        for side, size in (("train", 1), ("gen", 5))
    )
    options = PlanOptions(bucket_bytes=1 << 16, max_ops_per_round=max_ops, whitelist=(".*",))
    rounds = build_plan(train, gen, options).rank_plan(0).stages[0].rounds
    assert len(rounds) > 2 * 5
    assert max(len(round_.sends) for round_ in rounds) == max_ops


def test_a_stage_travels_in_a_group_of_its_own_trainers_and_all_generators():
    model = model_from_config("tiny", TINY_MOE)
    train, gen = TrainMesh(pp=2, tp=2, ep=2), GenMesh(tp=2, replicas=2)
    plan = build_plan(train_manifest(model, train), gen_manifest(model, gen))
    generators = range(train.num_ranks, train.num_ranks + gen.num_ranks)
    groups = {
        rank: {stage.stage: stage.group_ranks for stage in plan.rank_plan(rank).stages}
        for rank in range(plan.num_train + plan.num_gen)
    }
    members = dict.fromkeys(plan.stages, ())
    for rank in plan.train.manifest.ranks:
        members[rank.stage] += (rank.rank,)
    assert len(members) == 2
    for rank in plan.train.manifest.ranks:
        assert groups[rank.rank] == {rank.stage: (*members[rank.stage], *generators)}
    for rank in generators:
        assert groups[rank] == {stage: (*ranks, *generators) for stage, ranks in members.items()}

"""Replanning after generators left or came: the same plan as a fresh one, with only the new boxes matched."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.plan import Manifest, PlanError, RankManifest, build_plan, replan
from refit.plan.synth.config import load_model
from refit.plan.synth.gen import gen_manifest
from refit.plan.synth.parallel import parse_gen, parse_train
from refit.plan.synth.train import train_manifest
from tests.plan.worlds import random_side, random_world

MODEL = load_model("qwen3-4b")
TRAIN = train_manifest(MODEL, parse_train("tp=2,pp=2,dp=2"))


def generators(*layouts):
    """One side made of several groups of replicas, each with a layout of its own."""
    ranks, replica = [], 0
    for layout in layouts:
        group = gen_manifest(MODEL, parse_gen(layout)).ranks
        for one in group:
            body = (one.tensors, one.params, one.holdings, one.misc)
            ranks.append(RankManifest("gen", len(ranks), one.stage, replica + one.replica, *body))
        replica += 1 + group[-1].replica
    return Manifest("gen", tuple(ranks))


def check_equal(again, fresh):
    """Bit for bit: every value that any rank acts on."""
    assert again.digest == fresh.digest
    assert (again.tensors, again.flows, again.totals) == (fresh.tensors, fresh.flows, fresh.totals)
    for rank in range(fresh.num_train + fresh.num_gen):
        assert again.rank_plan(rank) == fresh.rank_plan(rank)


@pytest.mark.parametrize(
    ("before", "after", "num_new_boxes"),
    [
        (["tp=4,replicas=3"], ["tp=4,replicas=2"], 0),
        (["tp=4,replicas=2"], ["tp=4,replicas=3"], 0),
        (["tp=4", "tp=2", "tp=4"], ["tp=4,replicas=2"], 0),
        (["tp=4,replicas=2"], ["tp=4,replicas=2", "tp=2"], None),
    ],
    ids=["one left", "one came", "the odd one left", "one of another layout came"],
)
def test_a_replan_equals_a_fresh_plan_and_matches_new_boxes_only(before, after, num_new_boxes):
    plan = build_plan(TRAIN, generators(*before))
    num_before, old_cells = plan.matcher.num_matches, dict(plan.matcher.cells)
    again, fresh = replan(plan, generators(*after)), build_plan(TRAIN, generators(*after))
    check_equal(again, fresh)
    num_new = again.matcher.num_matches - num_before
    if num_new_boxes is None:
        alone = build_plan(TRAIN, generators(*set(after) - set(before))).matcher
        num_new_boxes = len(alone.cells.keys() - old_cells.keys())
        assert 0 < num_new_boxes < fresh.matcher.num_matches
    assert num_new == num_new_boxes
    assert again.train is plan.train, "the trainers were indexed again"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_a_replan_of_any_world_for_any_other_generators_equals_a_fresh_plan(seed):
    from random import Random

    train, gen, options = random_world(seed)
    shapes = {spec.name: spec.shape for rank in gen.ranks for spec in rank.tensors}
    dtypes = {spec.name: spec.dtype for rank in gen.ranks for spec in rank.tensors}
    other = random_side(Random(seed + 1), "gen", shapes, dtypes)
    plan = build_plan(train, gen, options)
    check_equal(replan(plan, other), build_plan(train, other, options))


def test_only_generators_can_be_replanned():
    plan = build_plan(TRAIN, generators("tp=2"))
    with pytest.raises(PlanError, match=r"got \(train, train\)"):
        replan(plan, TRAIN)

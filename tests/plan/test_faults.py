"""Planted faults: the proof must kill each of them, and must name all of them at once."""

from dataclasses import replace

import pytest

from refit.plan import (
    Manifest,
    Mesh,
    PlanError,
    PlanOptions,
    Region,
    Replicate,
    Shard,
    TensorSpec,
    build_plan,
    mesh_manifest,
)
from refit.plan.plan import Plan
from refit.plan.proof import _copy_fault

WEIGHT = TensorSpec("weight", (24, 8), "float32")
BIAS = TensorSpec("bias", (24,), "float32")
OPTIONS = PlanOptions(bucket_bytes=4096, whitelist=(".*",))


def sides() -> tuple[Manifest, Manifest]:
    """Four trainers (2 cuts x 2 copies) and three generators in uneven rows."""
    train = mesh_manifest(
        "train",
        Mesh((2, 2), (0, 1, 2, 3)),
        {"weight": (WEIGHT, (Shard(0), Replicate())), "bias": (BIAS, (Shard(0), Replicate()))},
    )
    gen = mesh_manifest(
        "gen", Mesh((3,), (0, 1, 2)), {"weight": (WEIGHT, (Shard(0),)), "bias": (BIAS, (Shard(0),))}
    )
    return train, gen


@pytest.fixture
def plan() -> Plan:
    return build_plan(*sides(), OPTIONS)


def with_flow(plan: Plan, index: int, **changes) -> Plan:
    flows = list(plan.flows)
    flows[index] = replace(flows[index], **changes)
    return replace(plan, flows=tuple(flows))


def killed(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan.require_exact_cover()


def test_the_untouched_plan_is_proven(plan):
    plan.require_exact_cover()


def test_a_cut_off_by_one_row_is_killed(plan):
    flow = plan.flows[0]
    killed(with_flow(plan, 0, cuts=(*flow.cuts[:-1], flow.cuts[-1] - 1)), "do not deal out")


def test_a_box_off_by_one_is_killed(plan):
    region = plan.flows[0].region
    moved = region.with_dim(0, region.starts[0], region.stops[0] - 1)
    killed(with_flow(plan, 0, region=moved), "elements of .* are covered|rows do not match")


def test_a_lost_flow_is_killed(plan):
    killed(replace(plan, flows=plan.flows[1:]), "elements of .* are covered")


def test_a_doubled_flow_is_killed(plan):
    killed(replace(plan, flows=(*plan.flows, plan.flows[0])), "overlap")


def test_overlapping_boxes_are_killed(plan):
    first = plan.flows[0].region
    grown = first.with_dim(0, first.starts[0], first.stops[0])
    other = next(i for i, flow in enumerate(plan.flows) if i and flow.receivers == plan.flows[0].receivers)
    killed(with_flow(plan, other, region=grown), "overlap|covered|lead to no wanted box|does not hold")


def test_a_wrong_source_is_killed(plan):
    flow = plan.flows[0]
    wrong = tuple(rank for rank in range(4) if rank not in flow.holders)
    killed(with_flow(plan, 0, holders=wrong), "does not hold")


def test_unordered_rows_of_the_holders_are_killed(plan):
    flow = next(flow for flow in plan.flows if 0 < flow.cuts[1] < flow.cuts[-1])
    swapped = (flow.cuts[1], flow.cuts[0], *flow.cuts[2:])
    killed(with_flow(plan, flow.index, cuts=swapped), "do not deal out")


def test_a_lost_holder_is_killed(plan):
    flow = next(flow for flow in plan.flows if len(flow.holders) > 1)
    killed(with_flow(plan, flow.index, holders=flow.holders[:1]), "do not deal out")


def test_a_flow_to_the_wrong_receiver_is_killed(plan):
    flow = plan.flows[0]
    wrong = tuple((rank + 1) % 3 for rank in flow.receivers)
    killed(with_flow(plan, 0, receivers=wrong), "covered|no wanted box")


def test_a_flow_that_leads_to_no_wanted_box_is_killed_also_beside_a_whole_cover(plan):
    stray = replace(plan.flows[0], receivers=(0, 1, 2))
    killed(replace(plan, flows=(*plan.flows, stray)), "1 of .* flows lead to no wanted box")


def test_boxes_of_a_copy_that_are_no_partition_of_its_holdings_are_named(plan):
    low, high = Region((0, 0), (4, 8)), Region((2, 0), (6, 8))
    whole = [Region((0, 0), (6, 8))]
    assert _copy_fault([low, high], [low, high], plan.train) == "its boxes overlap"
    assert _copy_fault(whole, [low, high], plan.train) is None, "trainers may hold an element twice"
    assert _copy_fault(whole, [low, high], plan.gen) == "its holdings overlap inside one copy"
    assert _copy_fault([low], whole, plan.train) == "holding part [4:6, 0:8] is in no box"
    assert _copy_fault(whole, [low], plan.train) == "box part [4:6, 0:8] is in no holding"


def test_a_wrong_copy_number_is_killed(plan):
    killed(with_flow(plan, 0, copy=1), "covered|no wanted box")


def test_a_bulk_tensor_without_flows_is_killed(plan):
    killed(replace(plan, flows=tuple(flow for flow in plan.flows if "bias" not in flow.tensors)), "bias")


def test_a_misc_tensor_with_flows_is_killed(plan):
    tensors = dict(plan.tensors)
    tensors["bias"] = replace(tensors["bias"], kind="misc")
    killed(replace(plan, tensors=tensors), "its flows say otherwise")


def test_all_faults_are_reported_not_only_the_first(plan):
    broken = plan
    for index in range(3):
        flow = plan.flows[index]
        broken = with_flow(broken, index, cuts=(*flow.cuts[:-1], flow.cuts[-1] + 1))
    with pytest.raises(PlanError) as caught:
        broken.require_exact_cover()
    assert len(caught.value.problems) >= 3


def test_a_lost_train_holding_makes_the_tensor_misc_with_the_hole_named():
    train, gen = sides()
    ranks = [
        replace(rank, holdings=tuple(h for h in rank.holdings if h.tensor != "bias"))
        if rank.rank < 2
        else rank
        for rank in train.ranks
    ]
    classified = build_plan(Manifest("train", tuple(ranks)), gen, OPTIONS).tensors
    assert classified["bias"].kind == "misc"
    assert "no trainer holds [0:8]" in classified["bias"].reason
    assert classified["weight"].kind == "bulk"


def test_a_generator_with_a_gap_makes_the_tensor_misc():
    train, gen = sides()
    ranks = [
        replace(rank, holdings=tuple(h for h in rank.holdings if h.tensor != "bias"))
        if rank.rank == 1
        else rank
        for rank in gen.ranks
    ]
    reason = build_plan(train, Manifest("gen", tuple(ranks)), OPTIONS).tensors["bias"].reason
    assert reason == "replica 0 does not hold [8:16] on any of its ranks"


def test_contradicting_shapes_are_all_named():
    train, _ = sides()
    wide, long = replace(WEIGHT, shape=(24, 9)), replace(BIAS, shape=(25,))
    gen = mesh_manifest(
        "gen", Mesh((1,), (0,)), {"weight": (wide, (Replicate(),)), "bias": (long, (Replicate(),))}
    )
    with pytest.raises(PlanError) as caught:
        build_plan(train, gen, OPTIONS)
    assert [problem.split("'")[1] for problem in caught.value.problems] == ["bias", "weight"]


def test_a_tensor_that_no_trainer_names_is_an_error():
    train, _ = sides()
    other = TensorSpec("other", (2,), "float32")
    gen = mesh_manifest("gen", Mesh((1,), (0,)), {"other": (other, (Replicate(),))})
    with pytest.raises(PlanError, match="no trainer names it"):
        build_plan(train, gen, OPTIONS)


def test_an_uncastable_dtype_is_misc():
    train, _ = sides()
    gen = mesh_manifest(
        "gen", Mesh((1,), (0,)), {"bias": (replace(BIAS, dtype="float8_e4m3fn"), (Replicate(),))}
    )
    classified = build_plan(train, gen, OPTIONS).tensors
    assert classified["bias"].kind == "misc" and "cast" in classified["bias"].reason
    assert classified["weight"].reason == "no gen rank holds it"


def test_an_empty_whitelist_makes_everything_misc():
    plan = build_plan(*sides(), PlanOptions(whitelist=()))
    assert plan.bulk_bytes == 0 and plan.misc_names == ("bias", "weight")
    assert list(plan.routes()) == [] and plan.rank_plan(0).stages[0].rounds == ()

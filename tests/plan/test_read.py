"""Which rows are meant and who gives them, against brute force over elements. No torch."""

from itertools import product
from random import Random

import pytest

from refit.plan import Holding, Manifest, ParamSpec, PlanError, RankManifest, Region, TensorSpec
from refit.plan.read import ReadPlan, memory_of, parse_slice, plan_read, stored_rows, wanted
from refit.plan.sides import Side
from refit.plan.synth.config import load_model
from refit.plan.synth.gen import gen_manifest
from refit.plan.synth.parallel import parse_gen


def elements(region):
    return set(product(*(range(a, b) for a, b in zip(region.starts, region.stops, strict=True))))


def engine(shape, held, rows_stored=0):
    """Ranks that hold the given boxes of one tensor "t.weight", each in a dense param of its own."""
    ranks = []
    for number, regions in enumerate(held):
        params, holdings = [], []
        for place, region in enumerate(regions):
            strides = [1] * len(region.shape)
            for dim in range(len(strides) - 2, -1, -1):
                strides[dim] = strides[dim + 1] * region.shape[dim + 1]
            size = (max(rows_stored, region.shape[0]), *region.shape[1:])
            params.append(ParamSpec(f"p{place}", size, "float32"))
            holdings.append(Holding("t.weight", region, f"p{place}", 0, tuple(strides)))
        spec = TensorSpec("t.weight", shape, "float32")
        ranks.append(RankManifest("gen", number, 0, 0, (spec,), tuple(params), tuple(holdings), ()))
    return Side.of(Manifest("gen", tuple(ranks)))


def random_engine(random):
    shape = (random.randint(2, 9), random.randint(1, 6))
    cut = random.randint(1, shape[0] - 1)
    top, bottom = Region((0, 0), (cut, shape[1])), Region((cut, 0), shape)
    choices = [[top], [bottom], [top, bottom], [Region.whole(shape)], []]
    held = [random.choice(choices) for _ in range(random.randint(0, 3))]
    return shape, [*held, [top], [bottom]]


@pytest.mark.parametrize("seed", range(40))
def test_every_wanted_element_is_given_once_by_a_rank_that_holds_it_and_witnessed_by_all_others(seed):
    random = Random(seed)
    shape, held = random_engine(random)
    side = engine(shape, held)
    start = random.randrange(shape[0])
    region = Region((start, 0), (random.randint(start + 1, shape[0]), shape[1]))
    plan = plan_read(side, "t.weight", region)
    given = [
        (rank, element)
        for rank, regions in plan.given.items()
        for part in regions
        for element in elements(part)
    ]
    assert sorted(element for _, element in given) == sorted(elements(region))
    holders = {
        element: {rank for rank, regions in enumerate(held) if any(element in elements(r) for r in regions)}
        for element in elements(region)
    }
    giver = {element: rank for rank, element in given}
    assert all(giver[element] in ranks for element, ranks in holders.items())
    witnessed = {element: set() for element in holders}
    for rank, regions in plan.witnessed.items():
        for part in regions:
            for element in elements(part):
                witnessed[element].add(rank)
    assert witnessed == {element: ranks - {giver[element]} for element, ranks in holders.items()}


def test_a_row_of_the_other_rank_is_asked_of_the_other_rank_only():
    top, bottom = Region((0, 0), (4, 2)), Region((4, 0), (8, 2))
    plan = plan_read(engine((8, 2), [[top], [bottom]]), "t.weight", Region((5, 0), (6, 2)))
    assert (plan.given, plan.witnessed) == ({1: (Region((5, 0), (6, 2)),)}, {})


def test_a_plan_refuses_a_giver_that_does_not_hold_the_cell():
    plan = plan_read(engine((4, 1), [[Region.whole((4, 1))]]), "t.weight", Region.whole((4, 1)))
    with pytest.raises(PlanError, match="rank 3 does not hold"):
        ReadPlan(plan.tensor, plan.region, plan.cells, (3,))
    with pytest.raises(PlanError, match="elements"):
        ReadPlan(plan.tensor, plan.region, (), ())


def test_rows_that_no_rank_holds_are_named():
    side = engine((8, 2), [[Region((0, 0), (4, 2))]])
    with pytest.raises(PlanError, match=r"no gen rank holds \[4:8, 0:2\]"):
        plan_read(side, "t.weight", Region.whole((8, 2)))


@pytest.mark.parametrize("seed", range(20))
def test_memory_of_a_box_holds_each_element_once_though_the_rank_holds_some_twice(seed):
    random = Random(seed)
    whole = Region.whole((6, 4))
    parts = [
        Region((a, b), (random.randint(a + 1, 6), random.randint(b + 1, 4)))
        for a, b in ((random.randrange(6), random.randrange(4)) for _ in range(4))
    ]
    holdings = [Holding("t.weight", part, "p", 0, (9, 1)) for part in (*parts, whole)]
    found = memory_of(holdings, whole)
    counted = sorted(element for held in found for element in elements(held.region))
    assert counted == sorted(elements(whole))
    for held in found:  # every dense original starts at offset 0 of its own box
        origins = [one.region.starts for one in holdings if one.region.contains(held.region)]
        steps = [(held.region.starts[0] - row, held.region.starts[1] - column) for row, column in origins]
        assert held.offset in [9 * rows + columns for rows, columns in steps]


def test_memory_of_a_box_that_is_not_all_held_raises():
    with pytest.raises(PlanError, match="not held here"):
        memory_of([Holding("t.weight", Region((0,), (3,)), "p", 0, (1,))], Region((0,), (4,)))


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("a.weight", ("a.weight", (None, None))),
        ("a.weight[3]", ("a.weight", (3, 4))),
        ("a.weight[3:7]", ("a.weight", (3, 7))),
        ("a.weight[:7]", ("a.weight", (None, 7))),
        ("a.weight[3:]", ("a.weight", (3, None))),
        ("a.weight[:]", ("a.weight", (None, None))),
    ],
)
def test_slices_are_read_as_written(text, goal):
    assert parse_slice(text) == goal


@pytest.mark.parametrize("text", ["a[-1]", "a[1:2:3]", "a[]", "[3]", "a[1", "a[x]", ""])
def test_other_words_are_refused(text):
    with pytest.raises(PlanError, match=r"NAME\[START:STOP\]"):
        parse_slice(text)


def test_a_padded_row_is_refused_with_both_numbers_and_the_way_out():
    halves = [[Region((0, 0), (256, 4))], [Region((256, 0), (500, 4))]]
    side = engine((500, 4), halves, rows_stored=256)
    assert stored_rows(side.manifest, "t.weight") == 512
    assert wanted("t.weight", (499, 500), side).shape == (1, 4)
    for rows in ((500, 501), (499, 501), (511, 512)):
        with pytest.raises(
            PlanError, match=r"row \d+ .*padding.* 500 rows.*pads them to 512; ask for rows up to 500"
        ):
            wanted("t.weight", rows, side)
    with pytest.raises(PlanError, match=r"row 600 of t.weight is not there: t.weight has 500 rows"):
        wanted("t.weight", (600, 601), side)
    with pytest.raises(PlanError, match=r"rows 7:7 of t.weight are none"):
        wanted("t.weight", (7, 7), side)


def test_one_expert_is_a_row_of_the_stacked_tensor_and_both_names_are_known():
    side = Side.of(gen_manifest(load_model("qwen3-30b-a3b"), parse_gen("tp=2,ep=1")))
    name = "model.layers.0.mlp.experts.7.up_proj.weight"
    one = wanted(name, (2, 5), side)
    assert one.region.starts[0] == 7 and one.region.stops[0] == 8 and one.region.starts[1] == 2
    assert one.shape == (3, 2048)
    stacked = wanted(name.replace(".7.", ".*."), (7, 9), side)
    assert stacked.shape == (2, 768, 2048)
    with pytest.raises(PlanError, match=r"no tensor .*experts.128.* is held here"):
        wanted(name.replace(".7.", ".128."), (None, None), side)


def test_an_unknown_name_is_answered_with_the_nearest():
    side = Side.of(gen_manifest(load_model("qwen3-4b"), parse_gen("tp=2")))
    with pytest.raises(
        PlanError, match=r"nearest of its \d+ names is 'model.layers.3.self_attn.q_proj.weight'"
    ):
        wanted("model.layers.3.self_attn.q_proj.wieght", (None, None), side)

"""Slices of what moved: one changed element shows in the one part that holds it, and nowhere else."""

import random
import time
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.plan import Holding, Manifest, ParamSpec, PlanOptions, RankManifest, Region, TensorSpec, build_plan
from refit.transfer.compiled import compile_stage
from refit.transfer.digest import MASK, digest
from refit.transfer.errors import TransportError
from refit.transfer.memory import as_bits, strided_box
from refit.transfer.protocol import slices_key, suspects_key
from refit.transfer.rendezvous import ControlStore
from refit.transfer.slices import PARTS, Slice, put_slices, slices_of
from tests.transfer.cases import Case, empty_params, fill_params, make_case, param_dtypes

CPU = torch.device("cpu")


class World:
    """All ranks of a case after a refit without a fault."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        self.plan = build_plan(case.train, case.gen, case.options)
        self.params = {rank: empty_params(case.manifest(rank)) for rank in range(case.num_ranks)}
        self.stages = {}
        for rank, params in self.params.items():
            fill_params(params, case, case.manifest(rank), seed, 0)
            dtypes = param_dtypes(case.manifest(rank))
            stages = self.plan.rank_plan(rank).stages
            self.stages[rank] = [compile_stage(self.plan, stage, rank, dtypes, CPU) for stage in stages]

    @property
    def gen_ranks(self) -> range:
        return range(self.plan.num_train, self.case.num_ranks)

    def slices(self, ranks, suspects, deadline_s=60.0) -> list[Slice]:
        deadline = time.monotonic() + deadline_s
        return [
            each
            for rank in ranks
            for each in slices_of(self.plan, rank, self.stages[rank], self.params[rank], suspects, deadline)
        ]

    def everything(self) -> dict[str, list[str]]:
        return {str(rank): list(self.plan.tensors) for rank in self.gen_ranks}

    def differing(self) -> list[Slice]:
        """What generators hold of each part that differs from what the trainers hold of it."""
        sent = self.slices(range(self.plan.num_train), self.everything())
        held = self.slices(self.gen_ranks, self.everything())
        assert {key(each) for each in sent} == {key(each) for each in held}, "both ends are cut alike"
        told = set(sent)
        return [each for each in held if each not in told]

    def box(self, rank: int, holding: Holding) -> torch.Tensor:
        param, region = self.params[rank][holding.param], holding.region
        return as_bits(strided_box(param, region.shape, holding.strides, holding.offset))


def key(part: Slice):
    return part.tensor, part.source, part.target, part.region


def flip_one(world: World, rng: random.Random) -> tuple[int, str, tuple[int, ...]]:
    """Flip a bit of an element that some generator received: (joint rank, tensor, index in the tensor)."""
    rank = rng.choice(list(world.gen_ranks))
    solid = [held for held in world.case.manifest(rank).holdings if not held.region.is_empty]
    holding = rng.choice(solid)
    index = tuple(rng.randrange(size) for size in holding.region.shape)
    world.box(rank, holding)[index] ^= 1
    at = tuple(start + inside for start, inside in zip(holding.region.starts, index, strict=True))
    return rank, holding.tensor, at


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 3))
def test_one_flipped_element_shows_in_the_part_that_holds_it_and_in_no_other(seed, num_train, num_gen):
    world = World(make_case(seed, num_train, num_gen, num_tensors=5), seed)
    assert world.differing() == []
    rank, tensor, index = flip_one(world, random.Random(seed))
    (wrong,) = world.differing()
    assert (wrong.tensor, wrong.target) == (tensor, rank) and wrong.source in range(num_train)
    element = Region(index, tuple(i + 1 for i in index))
    assert wrong.region.contains(element)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000))
def test_the_parts_of_a_tensor_add_up_to_the_digest_of_all_that_a_rank_holds_of_it(seed):
    world = World(make_case(seed, 2, 3, num_tensors=5), seed)
    sums, wanted = defaultdict(int), defaultdict(int)
    for each in world.slices(world.gen_ranks, world.everything()):
        sums[each.tensor, each.target] += each.digest
    for rank in world.gen_ranks:
        for holding in world.case.manifest(rank).holdings:
            if not holding.region.is_empty:
                shape = world.plan.tensors[holding.tensor].shape
                wanted[holding.tensor, rank] += digest(world.box(rank, holding), holding.region, shape)
    assert {place: value & MASK for place, value in sums.items()} == {
        place: value & MASK for place, value in wanted.items()
    }


def two_halves(dtype: str, wire: str, rows: int = 600) -> Case:
    """One tensor: two trainers hold the left and the right half of its columns, one generator all, transposed."""

    def manifest(side, rank, start, stop, held):
        size = stop - start
        shape, strides = ((size, rows), (1, rows)) if side == "gen" else ((rows, size), (size, 1))
        holding = Holding("t", Region((0, start), (rows, stop)), "p", 0, strides)
        spec = TensorSpec("t", (rows, 8), held)
        return RankManifest(side, rank, 0, 0, (spec,), (ParamSpec("p", shape, held),), (holding,), ())

    train = Manifest("train", (manifest("train", 0, 0, 4, dtype), manifest("train", 1, 4, 8, dtype)))
    gen = Manifest("gen", (manifest("gen", 0, 0, 8, wire),))
    return Case(train, gen, PlanOptions(1 << 16, 16, ("t",)))


@pytest.mark.parametrize(
    ("dtype", "wire"),
    [("float32", "bfloat16"), ("uint8", "uint8"), ("float8_e4m3fn", "float8_e4m3fn"), ("int32", "int32")],
)
def test_each_of_several_senders_is_told_apart_through_casts_and_strides(dtype, wire):
    world = World(two_halves(dtype, wire), seed=3)
    (holding,) = world.case.gen.ranks[0].holdings
    world.box(2, holding)[17, 1] ^= 1
    world.box(2, holding)[599, 6] ^= 1
    first, second = sorted(world.differing(), key=lambda each: each.source)
    assert (first.source, second.source) == (0, 1)
    assert first.region.contains(Region((17, 1), (18, 2)))
    assert second.region.contains(Region((599, 6), (600, 7)))
    most = -(-600 * 4 // PARTS)
    assert max(first.region.num_elements, second.region.num_elements) <= most


def test_only_what_is_suspected_is_cut():
    world = World(make_case(8, 2, 2, num_tensors=6), seed=8)
    tensor = next(each.tensor for each in world.slices([2], world.everything()))
    found = world.slices(range(4), {"2": [tensor]})
    assert {(each.tensor, each.target) for each in found} == {(tensor, 2)}
    assert {each.source for each in found} <= {0, 1}


def test_a_slice_is_the_same_after_a_message_of_it():
    part = Slice("t", 0, 2, Region((1, 2), (3, 4)), 2**64 - 1)
    assert Slice.of_message(part.message()) == part


def test_who_is_not_done_in_time_says_so():
    world = World(make_case(8), seed=8)
    with pytest.raises(TransportError, match="rank 2 was not done with the slices of"):
        world.slices([2], world.everything(), deadline_s=0.0)


@pytest.fixture
def control():
    host = ControlStore.host()
    yield host
    host.close()


def put(control: ControlStore, world: World, params, left_s: float = 60.0) -> object:
    """What joint rank 2 has put in attempt 1."""
    put_slices(control, 1, world.plan, 2, world.stages[2], params, time.monotonic() + left_s)
    return control.peek(slices_key(1, 2))


def test_a_rank_that_nobody_suspects_puts_nothing(control):
    world = World(make_case(8), seed=8)
    assert put(control, world, world.params[2]) is None
    control.put(suspects_key(1), {"3": list(world.plan.tensors)})
    assert put(control, world, world.params[2]) is None


def test_a_rank_that_is_suspected_puts_what_it_holds(control):
    world = World(make_case(8), seed=8)
    control.put(suspects_key(1), world.everything())
    found = put(control, world, world.params[2])
    assert [Slice.of_message(each) for each in found] == world.slices([2], world.everything())


def test_a_rank_that_cannot_say_goes_on(control):
    world = World(make_case(8), seed=8)
    control.put(suspects_key(1), world.everything())
    assert put(control, world, {}) is None, "its params are gone"
    assert put(control, world, world.params[2], left_s=0.0) is None, "no time is left"

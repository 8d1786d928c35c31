"""Placements against torch's own arithmetic."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.plan import (
    Mesh,
    PlanError,
    Region,
    Replicate,
    Shard,
    TensorSpec,
    build_plan,
    mesh_manifest,
    placed,
)
from refit.plan.placement import chunk


@st.composite
def placements(draw):
    shape = tuple(draw(st.lists(st.integers(1, 13), min_size=1, max_size=4)))
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    choices = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
    chosen = tuple(draw(st.sampled_from(choices)) for _ in sizes)
    return shape, sizes, chosen


@settings(max_examples=1500, deadline=None)
@given(placements(), st.data())
def test_a_rank_holds_what_dtensor_says_it_holds(case, data):
    pytest.importorskip("torch")
    from torch.distributed.tensor import Replicate as TorchReplicate
    from torch.distributed.tensor import Shard as TorchShard
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

    shape, sizes, chosen = case
    coordinate = [data.draw(st.integers(0, size - 1)) for size in sizes]
    torch_placements = [TorchShard(p.dim) if isinstance(p, Shard) else TorchReplicate() for p in chosen]
    local, offset = _compute_local_shape_and_global_offset(shape, sizes, coordinate, torch_placements)
    rank = 0
    for size, index in zip(sizes, coordinate, strict=True):
        rank = rank * size + index
    total = 1
    for size in sizes:
        total *= size
    region = placed(shape, Mesh(sizes, tuple(range(total))), chosen, rank)
    assert region.shape == tuple(local)
    if not region.is_empty:
        assert region.starts == tuple(offset)


@given(st.integers(0, 50), st.integers(1, 9))
def test_chunks_follow_torch_chunk_and_are_empty_behind_the_last(size, parts):
    torch = pytest.importorskip("torch")
    found = [stop - start for start, stop in (chunk(size, parts, index) for index in range(parts))]
    expected = [len(piece) for piece in torch.chunk(torch.zeros(size), parts)] if size else []
    assert found == expected + [0] * (parts - len(expected))


def test_a_reordered_mesh_moves_the_boxes_with_the_ranks():
    mesh = Mesh((2, 2), (3, 1, 0, 2))
    where = {rank: placed((4, 6), mesh, (Shard(0), Shard(1)), rank) for rank in range(4)}
    assert where == {
        3: Region((0, 0), (2, 3)),
        1: Region((0, 3), (2, 6)),
        0: Region((2, 0), (4, 3)),
        2: Region((2, 3), (4, 6)),
    }


def test_a_rank0_tensor_is_one_element_on_every_rank():
    spec = TensorSpec("scale", (), "float32")
    sides = [
        mesh_manifest(side, Mesh((2,), (0, 1)), {"scale": (spec, (Replicate(),))})
        for side in ("train", "gen")
    ]
    plan = build_plan(*sides, None)
    assert plan.tensors["scale"].kind == "misc", "no default pattern names it"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Mesh((2, 2), (0, 1, 2)), "needs 4 ranks, got 3"),
        (lambda: Mesh((2,), (0, 0)), "names a rank twice"),
        (lambda: placed((4,), Mesh((2,), (0, 1)), (), 0), "one per axis"),
        (lambda: placed((4,), Mesh((2,), (0, 1)), (Shard(1),), 0), r"Shard\(1\) on a tensor of shape \(4,\)"),
        (lambda: placed((4,), Mesh((2,), (0, 1)), (Shard(0),), 7), "rank 7 is not in the mesh"),
        (lambda: Shard(-1), "counted from the front"),
    ],
)
def test_a_wrong_mesh_or_placement_is_refused_by_name(wrong, message):
    with pytest.raises(PlanError, match=message):
        wrong()

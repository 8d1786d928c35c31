"""Every trainer layout, on real Megatron: what a rank says it holds is what Bridge exports, element by element."""

import pytest

from refit.plan import Manifest, Region, decode_rank_manifest
from refit.plan.region import uncovered
from refit.train_side.options import TrainParallel
from tests.train_side import ranks

pytestmark = [pytest.mark.megatron, pytest.mark.processes, pytest.mark.timeout(400)]

DENSE = {
    "PP2": (TrainParallel(pipeline=2), {}),
    "TP2": (TrainParallel(tensor=2), {}),
    "DP2": (TrainParallel(data=2), {}),
    "TP4 with 2 KV heads": (TrainParallel(tensor=4), {}),
    "TP2 x PP2": (TrainParallel(tensor=2, pipeline=2), {}),
    "PP2 with 2 virtual stages": (TrainParallel(pipeline=2, virtual_pipeline=2), {}),
    "PP2, 1 and 3 layers": (TrainParallel(pipeline=2, first_stage_layers=1), {}),
    "PP2, tied embeddings": (TrainParallel(pipeline=2), {"tie_word_embeddings": True}),
    "TP2, tied embeddings": (TrainParallel(tensor=2), {"tie_word_embeddings": True}),
}
MOE = {
    "EP2": TrainParallel(expert=2, data=2),
    "PP2": TrainParallel(pipeline=2),
    "EP2 x TP2, ETP1": TrainParallel(tensor=2, expert=2),
    "EP2 x TP2, ETP2": TrainParallel(tensor=2, data=2, expert=2, expert_tensor=2),
    "EP4": TrainParallel(expert=4, data=4),
}


def check_addresses(results):
    manifest = Manifest("train", tuple(decode_rank_manifest(result["manifest"]) for result in results))
    for rank, result in enumerate(results):
        assert result["exported"] == result["file"], f"rank {rank} exports other tensors"
        assert result["export_differs"] == []
        assert result["misplaced"] is None, f"rank {rank}: {result['misplaced']}"
        assert result["dtypes_agree"]
        assert manifest.ranks[rank].misc == ()
    check_coverage(manifest)


def check_coverage(manifest: Manifest):
    """Together the ranks hold every element of every tensor they name."""
    shapes = {spec.name: spec.shape for rank in manifest.ranks for spec in rank.tensors}
    held: dict[str, list[Region]] = {name: [] for name in shapes}
    for rank in manifest.ranks:
        for holding in rank.holdings:
            held[holding.tensor].append(holding.region)
    for name, shape in shapes.items():
        assert uncovered(Region.whole(shape), held[name]) == (), f"{name} is not held whole"


@pytest.mark.parametrize("layout", DENSE)
def test_a_dense_layout_holds_every_element_where_bridge_exports_it_from(trainers, checkpoints, layout):
    parallel, overrides = DENSE[layout]
    folder = checkpoints("tiny-qwen3", coded=True, **overrides)
    check_addresses(trainers.run(ranks.address_truth, parallel.world_size, str(folder), parallel))


@pytest.mark.parametrize("layout", MOE)
def test_an_expert_layout_holds_every_element_where_bridge_exports_it_from(trainers, checkpoints, layout):
    parallel = MOE[layout]
    folder = checkpoints("tiny-qwen3-moe", coded=True)
    check_addresses(trainers.run(ranks.address_truth, parallel.world_size, str(folder), parallel))

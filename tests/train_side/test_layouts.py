"""Every trainer layout, on real Megatron: what a rank says it holds is what Bridge exports, element by element."""

import pytest

from refit.plan import Manifest, Region, decode_rank_manifest
from refit.plan.region import uncovered
from refit.train_side.options import TrainParallel
from tests.train_side import ranks

pytestmark = [pytest.mark.megatron, pytest.mark.processes, pytest.mark.timeout(400)]

MTP = {"num_nextn_predict_layers": 1}
TIED = {"tie_word_embeddings": True}
# (checkpoint, its overrides, layout). The first table runs by default: what the small validation matrix does not have
# (vLLM has no experts without a gate on a CPU). The second runs with `-m slow`.
QUICK = {
    "MoE EP2 x TP2 with ETP2": (
        "tiny-qwen3-moe",
        {},
        TrainParallel(tensor=2, data=2, expert=2, expert_tensor=2),
    ),
    "hybrid TP2": ("tiny-nemotron-h", {}, TrainParallel(tensor=2)),
}
SLOW = {
    "dense PP2": ("tiny-qwen3", {}, TrainParallel(pipeline=2)),
    "dense TP2": ("tiny-qwen3", {}, TrainParallel(tensor=2)),
    "dense DP2": ("tiny-qwen3", {}, TrainParallel(data=2)),
    "dense TP4 with 2 KV heads": ("tiny-qwen3", {}, TrainParallel(tensor=4)),
    "dense PP2 with 2 virtual stages": ("tiny-qwen3", {}, TrainParallel(pipeline=2, virtual_pipeline=2)),
    "dense PP2 of 1 and 3 layers": ("tiny-qwen3", {}, TrainParallel(pipeline=2, first_stage_layers=1)),
    "dense PP2 with tied embeddings": ("tiny-qwen3", TIED, TrainParallel(pipeline=2)),
    "dense TP2 x GTP2": ("tiny-qwen3", {}, TrainParallel(tensor=2, gtp=2)),
    "QKV bias TP2": ("tiny-qwen2.5", {}, TrainParallel(tensor=2)),
    "MoE EP2": ("tiny-qwen3-moe", {}, TrainParallel(expert=2, data=2)),
    "MoE EP2 x TP2 with ETP1": ("tiny-qwen3-moe", {}, TrainParallel(tensor=2, expert=2)),
    "MLA TP2": ("tiny-deepseek-v3", {}, TrainParallel(tensor=2)),
    "dense TP2 x PP2": ("tiny-qwen3", {}, TrainParallel(tensor=2, pipeline=2)),
    "dense PP2, last stage 1 layer": ("tiny-qwen3", {}, TrainParallel(pipeline=2, last_stage_layers=1)),
    "dense TP2 with tied embeddings": ("tiny-qwen3", TIED, TrainParallel(tensor=2)),
    "dense TP2, vocabulary 500 in 512": (
        "tiny-qwen3",
        {"vocab_size": 500},
        TrainParallel(tensor=2, vocab_multiple=128),
    ),
    "dense GTP3": ("tiny-qwen3", {}, TrainParallel(gtp=3)),
    "dense GTP2 x PP2": ("tiny-qwen3", {}, TrainParallel(gtp=2, pipeline=2)),
    "dense GTP2 with tied embeddings": ("tiny-qwen3", TIED, TrainParallel(gtp=2)),
    "QKV bias TP4": ("tiny-qwen2.5", {}, TrainParallel(tensor=4)),
    "QKV bias GTP2": ("tiny-qwen2.5", {}, TrainParallel(gtp=2)),
    "Llama PP2": ("tiny-llama", {}, TrainParallel(pipeline=2)),
    "Llama TP2": ("tiny-llama", {}, TrainParallel(tensor=2)),
    "MoE PP2": ("tiny-qwen3-moe", {}, TrainParallel(pipeline=2)),
    "MoE EP4": ("tiny-qwen3-moe", {}, TrainParallel(expert=4, data=4)),
    "MoE EP2 x PP2": ("tiny-qwen3-moe", {}, TrainParallel(expert=2, data=2, pipeline=2)),
    "MoE GTP2 x TP2 x EP2": (
        "tiny-qwen3-moe",
        {},
        TrainParallel(tensor=2, gtp=2, expert=2, expert_gtp=2),
    ),
    "MLA EP2": ("tiny-deepseek-v3", {}, TrainParallel(expert=2, data=2)),
    "MLA PP2 of 1 and 2 layers": (
        "tiny-deepseek-v3",
        {},
        TrainParallel(pipeline=2, first_stage_layers=1),
    ),
    "MLA GTP2 x TP2": ("tiny-deepseek-v3", {}, TrainParallel(tensor=2, gtp=2, expert_gtp=2)),
    "MLA with MTP": ("tiny-deepseek-v3", MTP, TrainParallel()),
    "MLA with MTP, PP2": ("tiny-deepseek-v3", MTP, TrainParallel(pipeline=2, first_stage_layers=1)),
    "MLA with MTP, EP2": ("tiny-deepseek-v3", MTP, TrainParallel(expert=2, data=2)),
    "MLA with MTP, TP2": ("tiny-deepseek-v3", MTP, TrainParallel(tensor=2)),
    "hybrid with latent MoE, TP2": ("tiny-nemotron-h", {"moe_latent_size": 64}, TrainParallel(tensor=2)),
    "hybrid TP4": ("tiny-nemotron-h", {}, TrainParallel(tensor=4)),
    "hybrid PP2": ("tiny-nemotron-h", {}, TrainParallel(pipeline=2)),
    "hybrid EP2": ("tiny-nemotron-h", {}, TrainParallel(expert=2, data=2)),
    "hybrid GTP2": ("tiny-nemotron-h", {}, TrainParallel(gtp=2, expert_gtp=2)),
}


def check_addresses(results):
    manifest = Manifest("train", tuple(decode_rank_manifest(result["manifest"]) for result in results))
    for rank, result in enumerate(results):
        assert result["exported"] == result["file"], f"rank {rank} exports other tensors"
        assert result["export_differs"] == []
        assert result["misplaced"] is None, f"rank {rank}: {result['misplaced']}"
        assert result["params_agree"]
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


@pytest.mark.parametrize("case", QUICK.values(), ids=QUICK)
def test_a_layout_holds_every_element_where_bridge_exports_it_from(trainers, checkpoints, case):
    name, overrides, parallel = case
    folder = checkpoints(name, coded=True, **overrides)
    check_addresses(trainers.run(ranks.address_truth, parallel.world_size, str(folder), parallel))


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW.values(), ids=SLOW)
def test_a_rarer_layout_does_so_too(trainers, checkpoints, case):
    name, overrides, parallel = case
    folder = checkpoints(name, coded=True, **overrides)
    check_addresses(trainers.run(ranks.address_truth, parallel.world_size, str(folder), parallel))


def test_what_bridge_changes_on_its_way_out_is_misc_with_the_reason_and_the_rest_is_not(
    trainers, checkpoints
):
    (found,) = trainers.run(ranks.unknown_mappings, 1, str(checkpoints("tiny-qwen3")))
    changed = {name for name in found["tensors"] if name.endswith(("down_proj.weight", "o_proj.weight"))}
    assert set(found["misc"]) == changed and len(changed) == 8
    assert set(found["held"]) == set(found["tensors"]) - changed
    assert "DoubledMapping has no lowering rule" in found["misc"]["model.layers.0.mlp.down_proj.weight"]
    assert "Qwen3Bridge changes" in found["misc"]["model.layers.3.self_attn.o_proj.weight"]
    assert found["export_is_doubled"]

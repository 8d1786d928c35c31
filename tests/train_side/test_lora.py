"""Trainers with LoRA: every layout starts from the same adapters, learns the same, and sends what it learned."""

import numpy as np
import pytest

from refit.plan import Manifest, decode_rank_manifest
from refit.train_side.options import LoraOptions, TrainOptions, TrainParallel
from tests.train_side import lora_ranks
from tests.train_side.test_layouts import check_coverage

pytestmark = [pytest.mark.megatron, pytest.mark.processes, pytest.mark.timeout(400)]

FP32 = {"precision": "fp32", "lr": 1e-3, "kl_coef": 0.1}
SMALL = {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def single_rank(trainers, checkpoints):
    made = {}

    def result(name, num_steps):
        if (name, num_steps) not in made:
            folder = str(checkpoints(name, **SMALL))
            made[name, num_steps] = trainers.run(
                lora_ranks.steps, 1, folder, TrainParallel(), num_steps, FP32
            )[0]
        return made[name, num_steps]

    return result


@pytest.mark.parametrize(
    ("name", "parallel", "num_steps"),
    [
        ("tiny-qwen3", TrainParallel(tensor=2), 20),
        ("tiny-qwen3-moe", TrainParallel(expert=2, data=2), 3),
        pytest.param("tiny-qwen3", TrainParallel(tensor=2, pipeline=2), 3, marks=pytest.mark.slow),
        pytest.param("tiny-qwen3", TrainParallel(pipeline=2), 3, marks=pytest.mark.slow),
        pytest.param("tiny-qwen3", TrainParallel(data=2), 3, marks=pytest.mark.slow),
        pytest.param("tiny-qwen3-moe", TrainParallel(pipeline=2), 3, marks=pytest.mark.slow),
    ],
    ids=["TP2", "MoE EP2", "TP2 PP2", "PP2", "DP2", "MoE PP2"],
)
def test_a_layout_with_adapters_trains_as_one_rank_does_and_holds_the_folded_weights(
    trainers, checkpoints, single_rank, name, parallel, num_steps
):
    folder = str(checkpoints(name, **SMALL))
    expected = single_rank(name, num_steps)
    results = trainers.run(lora_ranks.steps, parallel.world_size, folder, parallel, num_steps, FP32)
    for result in results:
        assert result["misplaced"] is None and result["base_is_as_it_was"]
        assert result["before"] == result["reference"], "fresh adapters must add nothing"
        for mine, theirs in zip(result["after"], expected["after"], strict=True):
            assert mine == pytest.approx(theirs, abs=2e-4)
        for mine, theirs in zip(result["steps"], expected["steps"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
        for tensor, weight in expected["exported"].items():
            np.testing.assert_allclose(result["exported"][tensor], weight, atol=2e-4, err_msg=tensor)
    assert expected["steps"][-1]["loss"] < expected["steps"][0]["loss"]
    check_coverage(Manifest("train", tuple(decode_rank_manifest(result["manifest"]) for result in results)))


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("tiny-qwen3", TrainParallel(tensor=2, pipeline=2)),
        ("tiny-qwen3-moe", TrainParallel(expert=2, data=2)),
    ],
    ids=["TP2 PP2", "MoE EP2"],
)
def test_every_layout_starts_from_the_same_adapters_whatever_the_random_state_of_its_ranks(
    trainers, checkpoints, name, parallel
):
    folder = str(checkpoints(name, **SMALL))
    (wanted,) = trainers.run(lora_ranks.drawn, 1, folder, TrainParallel())
    ranks = trainers.run(lora_ranks.drawn, parallel.world_size, folder, parallel)
    assert {layer for found in ranks for layer in found} == set(wanted)
    for layer, (_, _, whole) in wanted.items():
        assert whole.std() > 0.05, f"{layer} was not drawn"
        shards = [found[layer] for found in ranks if layer in found]
        for place, dim, shard in shards:
            size = shard.shape[dim]
            box = [slice(None)] * 2
            box[dim] = slice(place * size, (place + 1) * size)
            np.testing.assert_array_equal(shard, whole[tuple(box)], err_msg=f"{layer} at {place}")
        assert len({place for place, _, _ in shards}) * shards[0][2].size == whole.size
    different = {whole.tobytes() for _, _, whole in wanted.values()}
    assert len(different) == len(wanted), "two layers have the same adapter"


def test_a_factor_comes_from_the_first_rank_of_its_group_whole_or_in_slices(trainers):
    _, first, second = trainers.run(lora_ranks.handed_out, 3)
    assert first == [[[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [7, 8, 9]]]
    assert second == [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]], [[4, 5, 6], [10, 11, 12]]]


def test_an_adapter_adds_no_reduction_of_activations_forwards_or_backwards(trainers, checkpoints):
    for found in trainers.run(lora_ranks.reductions, 2, str(checkpoints("tiny-qwen3", **SMALL))):
        assert found["on"] == found["off"]
        assert min(found["on"]) > 0


def test_folding_on_the_shard_is_what_bridge_merges_from_whole_tensors_but_for_rounding(
    trainers, checkpoints
):
    folder = str(checkpoints("tiny-qwen3", **SMALL))
    for found in trainers.run(lora_ranks.against_bridge, 2, folder, TrainParallel(tensor=2)):
        assert found["worst"] < 4 and found["moved"] == 2 * 4 and found["names"] == 25


@pytest.mark.parametrize(
    "parallel",
    [TrainParallel(tensor=2), pytest.param(TrainParallel(tensor=2, pipeline=2), marks=pytest.mark.slow)],
    ids=["TP2", "TP2 PP2"],
)
def test_adapters_alone_are_offered_in_peft_names_and_make_the_folded_weights(
    trainers, checkpoints, parallel
):
    folder = str(checkpoints("tiny-qwen3", **SMALL))
    results = trainers.run(lora_ranks.adapters_alone, parallel.world_size, folder, parallel)
    manifests = [decode_rank_manifest(result["manifest"]) for result in results]
    described = {spec.name: spec.shape for manifest in manifests for spec in manifest.tensors}
    assert not any(manifest.holdings or manifest.params for manifest in manifests)
    assert {reason.tensor for manifest in manifests for reason in manifest.misc} == set(described)
    for result in results:
        assert result["exported"] == described and len(described) == 2 * 2 * 7
        assert len(result["errors"]) == 2 * 7 and max(result["errors"].values()) < 1e-6
        assert result["named"] and result["params"] == {}
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    assert described[name] == (64, 8)


def test_an_adapter_that_does_not_fit_its_layer_is_refused_with_both_shapes(trainers, checkpoints):
    found = trainers.run(lora_ranks.misfits, 2, str(checkpoints("tiny-qwen3", **SMALL)))
    for rank_of_a, rows_of_b, rank_of_b, astray in found:
        assert "lora_A is (3, 128) on each of 2 ranks of its group" in rank_of_a
        assert "6 rows and not 8; the base weight is (128, 128)" in rank_of_a
        assert "lora_B is (100, 8) on each of 2 ranks" in rows_of_b and "200 rows and not 128" in rows_of_b
        assert "lora_B (128, 4) do not make the base weight's (128, 128)" in rank_of_b
        assert astray.startswith("8 adapters belong to no single weight")


@pytest.mark.parametrize(
    ("parallel", "says"),
    [(TrainParallel(tensor=2), "rank 3 does not divide by tensor 2"), (TrainParallel(gtp=2), "gtp 2")],
)
def test_a_rank_or_a_layout_that_adapters_cannot_be_cut_for_is_refused(parallel, says):
    from refit.train_side.build import build_model

    with pytest.raises(ValueError, match=says):
        build_model("unread", parallel, TrainOptions(lora=LoraOptions(3, 6.0)), trainable=True)


def test_options_that_name_no_layer_are_refused():
    with pytest.raises(ValueError, match="linear_qkv, linear_proj"):
        LoraOptions(8, 16.0, targets=("q_proj",))

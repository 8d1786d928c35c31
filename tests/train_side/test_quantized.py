"""Real Megatron shards, quantized on the rank that holds them, against whole tensors quantized at once."""

import pytest

from refit.plan import Manifest, decode_rank_manifest
from refit.train_side.options import TrainParallel
from tests.train_side import quantized_ranks
from tests.train_side.test_layouts import check_coverage

pytestmark = [pytest.mark.megatron, pytest.mark.processes, pytest.mark.timeout(300)]

CUT = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 2}
CASES = {
    "dense TP2, cut through blocks": ("tiny-qwen3", CUT, TrainParallel(tensor=2), "fp8", True),
    "MoE EP2": ("tiny-qwen3-moe", {"num_hidden_layers": 2}, TrainParallel(expert=2, data=2), "fp8", False),
    "dense GTP3": ("tiny-qwen3", {"num_hidden_layers": 2}, TrainParallel(gtp=3), "fp8", True),
    "dense PP2": ("tiny-qwen3", {"num_hidden_layers": 2}, TrainParallel(pipeline=2), "fp8", False),
    "dense TP2 in MXFP8": ("tiny-qwen3", {"num_hidden_layers": 2}, TrainParallel(tensor=2), "mxfp8", False),
}


def check(trainers, checkpoints, case):
    name, overrides, parallel, form, is_cut = case
    found = trainers.run(
        quantized_ranks.quantized_truth,
        parallel.world_size,
        str(checkpoints(name, **overrides)),
        parallel,
        form,
    )
    for result in found:
        assert result["wrong"] == [] and result["misc"] == [] and result["some"]
        assert result["compared"] > 20
        assert (result["agreed"] > 0) == is_cut
    check_coverage(Manifest("train", tuple(decode_rank_manifest(result["manifest"]) for result in found)))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_trainers_hold_the_bytes_that_quantizing_the_whole_export_gives_twice_in_a_row(
    trainers, checkpoints, case
):
    check(trainers, checkpoints, case)


@pytest.mark.parametrize("name", ["tiny-qwen3-moe"])
def test_a_jobs_trainer_sends_what_an_fp8_checkpoint_of_its_weights_holds_and_again_after_they_changed(
    trainers, checkpoints, tmp_path, name
):
    folder = checkpoints(name, num_hidden_layers=2)
    (found,) = trainers.run(quantized_ranks.quantized_refits, 1, str(folder), str(tmp_path / "fp8"))
    assert found["wrong"] == []
    assert set(found["kinds"].values()) == {"bulk"}
    assert sum(tensor.endswith("weight_scale_inv") for tensor in found["kinds"]) == 2 * (4 + 3)

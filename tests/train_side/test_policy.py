"""Training on real Megatron: every layout learns the same, and the policy is what transformers makes of it."""

import math

import pytest

from refit.train_side.options import TrainParallel
from tests.train_side import ranks

pytestmark = [pytest.mark.megatron, pytest.mark.processes, pytest.mark.timeout(400)]

FP32 = {"precision": "fp32", "lr": 1e-3, "kl_coef": 0.1}


@pytest.fixture(scope="module")
def single_rank(trainers, checkpoints):
    """Two float32 steps on one rank, by model: what every layout must repeat."""
    made = {}

    def result(name, **overrides):
        key = (name, *sorted(overrides.items()))
        if key not in made:
            folder = str(checkpoints(name, **overrides))
            made[key] = trainers.run(ranks.two_steps, 1, folder, TrainParallel(), FP32)[0]
        return made[key]

    return result


def check_same(results, expected):
    for rank, result in enumerate(results):
        assert result["misplaced"] is None, f"rank {rank}: {result['misplaced']}"
        assert result["before"] == results[0]["before"], "ranks disagree"
        assert result["before"] == result["reference"]
        for mine, theirs in zip(
            result["before"] + result["after"], expected["before"] + expected["after"], strict=True
        ):
            assert mine == pytest.approx(theirs, abs=2e-4)
        for mine, theirs in zip(result["steps"], expected["steps"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
        assert result["sums"] == pytest.approx(expected["sums"], rel=1e-3, abs=2e-2)
        assert result["bits"] == results[0]["bits"], "replicas on two ranks have drifted apart"


@pytest.mark.parametrize(
    "parallel",
    [
        TrainParallel(pipeline=2),
        TrainParallel(tensor=2),
        TrainParallel(data=2),
        TrainParallel(pipeline=2, virtual_pipeline=2),
    ],
    ids=["PP2", "TP2", "DP2", "PP2 VPP2"],
)
def test_a_dense_layout_trains_as_one_rank_does(trainers, checkpoints, single_rank, parallel):
    folder = str(checkpoints("tiny-qwen3"))
    results = trainers.run(ranks.two_steps, parallel.world_size, folder, parallel, FP32)
    check_same(results, single_rank("tiny-qwen3"))


def test_tied_embeddings_on_two_stages_train_as_one_rank_does(trainers, checkpoints, single_rank):
    folder = str(checkpoints("tiny-qwen3", tie_word_embeddings=True))
    results = trainers.run(ranks.two_steps, 2, folder, TrainParallel(pipeline=2), FP32)
    check_same(results, single_rank("tiny-qwen3", tie_word_embeddings=True))


@pytest.mark.parametrize(
    "parallel",
    [TrainParallel(expert=2, data=2), TrainParallel(pipeline=2)],
    ids=["EP2", "PP2"],
)
def test_a_moe_layout_trains_as_one_rank_does(trainers, checkpoints, single_rank, parallel):
    folder = str(checkpoints("tiny-qwen3-moe"))
    results = trainers.run(ranks.two_steps, parallel.world_size, folder, parallel, FP32)
    check_same(results, single_rank("tiny-qwen3-moe"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("tiny-qwen3-moe", TrainParallel(tensor=2)),
        ("tiny-qwen3-moe", TrainParallel(tensor=2, expert=2)),
        ("tiny-qwen3-moe", TrainParallel(tensor=2, data=2, expert=2, expert_tensor=2)),
        ("tiny-deepseek-v3", TrainParallel(tensor=2, expert=2)),
        ("tiny-deepseek-v3", TrainParallel(pipeline=2, first_stage_layers=1)),
        ("tiny-nemotron-h", TrainParallel(tensor=2, expert=2)),
        ("tiny-nemotron-h", TrainParallel(pipeline=2)),
    ],
    ids=[
        "MoE TP2",
        "MoE TP2 EP2",
        "MoE TP2 EP2 ETP2",
        "MLA TP2 EP2",
        "MLA PP2",
        "hybrid TP2 EP2",
        "hybrid PP2",
    ],
)
def test_experts_under_tensor_parallelism_mla_and_mamba_train_as_one_rank_does(
    trainers, checkpoints, single_rank, name, parallel
):
    folder = str(checkpoints(name))
    results = trainers.run(ranks.two_steps, parallel.world_size, folder, parallel, FP32)
    check_same(results, single_rank(name))


def test_a_step_moves_the_policy_towards_the_advantages_and_away_from_the_reference(single_rank):
    result, batch = single_rank("tiny-qwen3"), ranks.sample_batch()
    gain = sum(
        advantage * (sum(after) - sum(before))
        for advantage, after, before in zip(batch.advantages, result["after"], result["before"], strict=True)
    )
    assert gain > 1.0
    first, second = result["steps"]
    assert first["kl_to_reference"] == 0.0 < second["kl_to_reference"]
    assert math.isfinite(first["grad_norm"]) and first["grad_norm"] > 0


@pytest.mark.parametrize(
    "name",
    [
        "tiny-qwen3",
        "tiny-qwen3-moe",
        pytest.param("tiny-deepseek-v3", marks=pytest.mark.slow),
        pytest.param("tiny-nemotron-h", marks=pytest.mark.slow),
    ],
)
def test_logprobs_in_bf16_are_those_of_transformers_on_the_saved_weights(
    trainers, checkpoints, tmp_path, name
):
    num_layers = 3 if name == "tiny-deepseek-v3" else 4
    parallel = TrainParallel(pipeline=2, first_stage_layers=1 if num_layers % 2 else None)
    found = trainers.run(
        ranks.against_transformers, 2, str(checkpoints(name)), parallel, str(tmp_path / "saved")
    )[0]
    assert found["k3"] < 1e-4, found
    assert found["max"] < 0.2, found


def test_export_of_named_tensors_makes_only_them_and_refuses_unknown_names(trainers, checkpoints):
    names = ["lm_head.weight", "model.layers.3.self_attn.k_proj.weight"]
    folder = str(checkpoints("tiny-qwen3"))
    for some, error in trainers.run(ranks.partial_export, 2, folder, TrainParallel(tensor=2), names):
        assert some == {names[0]: (259, 128), names[1]: (64, 128)}
        assert "model.layers.99.mlp.up_proj.weight" in error


def test_describing_costs_under_one_percent_of_the_model_and_no_tensor_operation(trainers, checkpoints):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 32}
    folder = str(checkpoints("tiny-qwen3", **sizes))
    for cost in trainers.run(ranks.describe_cost, 2, folder):
        assert cost["operations"] == []
        assert cost["peak_bytes"] < 0.01 * cost["model_bytes"], cost


def test_a_parameter_that_was_recreated_is_refused(trainers, checkpoints):
    (errors,) = trainers.run(ranks.stale_params, 1, str(checkpoints("tiny-qwen3")))
    assert len(errors) == 2
    for error in errors:
        assert error.startswith("StaleTasksError") and "decoder.final_layernorm.weight" in error

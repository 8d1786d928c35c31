"""Trainers whose parameters are doubles of Transformer Engine's FP8 blocks: that library cannot run on a CPU."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from refit.plan import Manifest, decode_rank_manifest
from refit.train_side.lowering.fp8_params import (
    NUM_TERMS,
    BlockParam,
    block_param,
    is_block_param,
    one_per_block,
)
from refit.train_side.lowering.pieces import CannotLowerError
from refit.train_side.options import TrainParallel
from tests.train_side import quantized_ranks
from tests.train_side.test_layouts import check_coverage

TWO_LAYERS = {"num_hidden_layers": 2}
WIDE = TWO_LAYERS | {"head_dim": 128, "intermediate_size": 512}
CASES = {
    "dense TP2, ragged rows and columns": (
        "tiny-qwen3",
        WIDE | {"hidden_size": 192},
        TrainParallel(tensor=2),
    ),
    "MoE EP2": ("tiny-qwen3-moe", WIDE, TrainParallel(expert=2, data=2)),
    "dense PP2": ("tiny-qwen3", WIDE, TrainParallel(pipeline=2)),
}
MATRICES = pytest.mark.megatron, pytest.mark.processes, pytest.mark.timeout(300), pytest.mark.slow


def marked(function):
    for mark in MATRICES:
        function = mark(function)
    return function


@marked
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_doubles_of_te_blocks_are_held_and_exported_as_engines_store_them_twice_in_a_row(
    trainers, checkpoints, case
):
    name, overrides, parallel = case
    found = trainers.run(
        quantized_ranks.block_truth, parallel.world_size, str(checkpoints(name, **overrides)), parallel
    )
    for result in found:
        assert result["wrong"] == [] and result["misc"] == {}
        names = {tensor.rpartition("_proj.")[2] for tensor in result["from_blocks"]}
        assert names == {"weight", "weight_scale_inv"}
        assert len(result["from_blocks"]) >= 2 * 7  # every projection of a layer, elements and scales
        assert all("FP8 blocks, which these engines do not store" in text for text in result["bf16"].values())
        assert len(result["bf16"]) == len(result["from_blocks"]) / 2
    check_coverage(Manifest("train", tuple(decode_rank_manifest(result["manifest"]) for result in found)))


@marked
def test_doubles_of_te_blocks_that_a_cut_or_a_fused_neighbour_shares_are_misc_with_the_reason(
    trainers, checkpoints
):
    found = trainers.run(
        quantized_ranks.block_truth, 2, str(checkpoints("tiny-qwen3", **TWO_LAYERS)), TrainParallel(tensor=2)
    )
    for result in found:
        assert result["wrong"] == []
        assert {name.split(".")[-2] for name in result["from_blocks"]} == {
            "gate_proj",
            "up_proj",
            "down_proj",
        }
        assert {name.split(".")[-2] for name in result["misc"]} == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert all("block" in reason for reason in result["misc"].values())


def parameter(**changes):
    """A double of one parameter with other metadata."""
    found = {
        "rowwise_data": torch.zeros(256, 200, dtype=torch.uint8),
        "rowwise_scale_inv": torch.ones(2, 4),
        "quantizer": SimpleNamespace(block_len=128),
        "is_2D_scaled": True,
    } | changes
    return SimpleNamespace(get_metadata=lambda: found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_2D_scaled": False}, "a scale for runs of 128, not for 128 x 128"),
        ({"quantizer": SimpleNamespace(block_len=64)}, "a scale for blocks of 64 x 64, not for 128 x 128"),
        ({"rowwise_data": None}, "without dense row-wise data"),
        ({"rowwise_data": torch.zeros(200, 256, dtype=torch.uint8).t()}, "without dense row-wise data"),
    ],
)
def test_a_double_of_te_blocks_in_another_form_is_refused_by_name(changes, words):
    assert is_block_param(parameter(**changes))
    with pytest.raises(CannotLowerError, match=f"^w is stored in FP8.*{words}"):
        block_param("w", parameter(**changes))


def test_a_double_of_te_blocks_gives_its_own_memory_and_a_scale_per_element():
    scales = torch.tensor([[1.0, 2.0, torch.nan, torch.nan], [3.0, 4.0, torch.nan, torch.nan]])
    weight = parameter(rowwise_scale_inv=scales)
    blocks = block_param("w", weight)
    assert blocks.elements.dtype is torch.float8_e4m3fn and blocks.scales is scales
    assert blocks.elements.data_ptr() == weight.get_metadata()["rowwise_data"].data_ptr()
    mixed = blocks.scale_term(0).float()
    assert mixed.shape == (256, 200) and not mixed.isnan().any()
    assert torch.equal(one_per_block("w", mixed), scales[:, :2])
    assert torch.equal(one_per_block("w", -mixed), -scales[:, :2])  # terms may be negative, blocks ragged
    mixed[5, 199] = 9.0
    with pytest.raises(ValueError, match=r"w: a block of .* has two scales"):
        one_per_block("w", mixed)


def test_the_terms_of_any_scale_add_up_to_it_exactly():
    exponents = torch.randint(-22, 120, (64, 64), generator=torch.Generator().manual_seed(0)).float()
    scales = torch.rand(64, 64, generator=torch.Generator().manual_seed(1)).add(1) * torch.exp2(exponents)
    blocks = BlockParam(torch.zeros(1, 1, dtype=torch.float8_e4m3fn), scales[:1, :1])
    for value in scales.flatten()[::7]:
        terms = [
            dataclasses.replace(blocks, scales=value.view(1, 1)).scale_term(n).float()
            for n in range(NUM_TERMS)
        ]
        assert sum(terms[1:], terms[0]).item() == value.item()


def test_plain_parameters_and_those_without_scales_are_no_te_blocks():
    assert not is_block_param(torch.nn.Parameter(torch.zeros(2, 2)))
    assert not is_block_param(parameter(rowwise_scale_inv=None))

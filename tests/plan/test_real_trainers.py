"""Manifests from a config equal those of real Megatron trainers, tensor by tensor, stride by stride."""

import pytest

from refit.plan import decode_rank_manifest
from refit.plan.synth.config import load_model
from refit.plan.synth.parallel import TrainMesh
from refit.plan.synth.train import train_manifest
from refit.train_side.options import TrainParallel
from tests.plan.real import differences
from tests.train_side import ranks
from tests.train_side.conftest import checkpoints, trainers  # noqa: F401

pytestmark = [pytest.mark.megatron, pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(400)]

TIED = {"tie_word_embeddings": True}
CASES = {
    "dense TP2 x PP2": ("tiny-qwen3", {}, TrainParallel(tensor=2, pipeline=2), TrainMesh(tp=2, pp=2)),
    "dense TP4 with 2 KV heads": ("tiny-qwen3", {}, TrainParallel(tensor=4), TrainMesh(tp=4)),
    "dense PP2, 2 virtual stages": (
        "tiny-qwen3",
        {},
        TrainParallel(pipeline=2, virtual_pipeline=2),
        TrainMesh(pp=2, vpp=2),
    ),
    "dense PP2, first stage 1 layer": (
        "tiny-qwen3",
        {},
        TrainParallel(pipeline=2, first_stage_layers=1),
        TrainMesh(pp=2, first=1),
    ),
    "dense PP2, tied": ("tiny-qwen3", TIED, TrainParallel(pipeline=2), TrainMesh(pp=2)),
    "dense TP2 x GTP2": ("tiny-qwen3", {}, TrainParallel(tensor=2, gtp=2), TrainMesh(tp=2, gtp=2)),
    "QKV bias TP2": ("tiny-qwen2.5", {}, TrainParallel(tensor=2), TrainMesh(tp=2)),
    "MoE EP2": ("tiny-qwen3-moe", {}, TrainParallel(expert=2, data=2), TrainMesh(ep=2)),
    "MoE EP2 x TP2, ETP1": (
        "tiny-qwen3-moe",
        {},
        TrainParallel(tensor=2, expert=2),
        TrainMesh(tp=2, ep=2, etp=1),
    ),
    "MoE EP2 x TP2, ETP2": (
        "tiny-qwen3-moe",
        {},
        TrainParallel(tensor=2, data=2, expert=2, expert_tensor=2),
        TrainMesh(tp=2, ep=2, etp=2),
    ),
    "MLA TP2": ("tiny-deepseek-v3", {}, TrainParallel(tensor=2), TrainMesh(tp=2, etp=1, te=0)),
    "hybrid TP2": ("tiny-nemotron-h", {}, TrainParallel(tensor=2), TrainMesh(tp=2, etp=1)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_config_derived_trainer_equals_the_real_one(trainers, checkpoints, case):  # noqa: F811
    name, overrides, parallel, mesh = case
    folder = checkpoints(name, coded=True, **overrides)
    results = trainers.run(ranks.address_truth, parallel.world_size, str(folder), parallel)
    reals = [decode_rank_manifest(result["manifest"]) for result in results]
    synthetic = train_manifest(load_model(str(folder)), mesh_of(mesh))
    found = [d for real, mine in zip(reals, synthetic.ranks, strict=True) for d in differences(real, mine)]
    assert not found, "\n".join(found[:60])


def mesh_of(mesh):
    from dataclasses import replace

    return replace(mesh, dtype="float32")

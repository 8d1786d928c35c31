"""Every shipped model: its published size, and plans near the lower bound on several layouts."""

import tracemalloc
from math import prod

import pytest

from refit.plan import ConfigError, build_plan
from refit.plan.cost import Topology, cost_of, max_over_mean_in_stage
from refit.plan.synth.config import load_model, model_from_config, shipped_models
from refit.plan.synth.gen import gen_manifest, linear_experts
from refit.plan.synth.modules import shapes
from refit.plan.synth.parallel import GenMesh, TrainMesh, parse_gen, parse_train
from refit.plan.synth.train import train_manifest

BILLIONS = {
    "deepseek-v3": 671.03,
    "kimi-k2": 1026.41,
    "llama-405b": 405.85,
    "llama-70b": 70.55,
    "nemotron-3-nano-30b-a3b": 31.58,
    "nemotron-3-super-120b-a12b": 120.67,
    "nemotron-h-8b": 8.10,
    "qwen2.5-7b": 7.62,
    "qwen3-235b-a22b": 235.09,
    "qwen3-30b-a3b": 30.53,
    "qwen3-4b": 4.02,
}
SMALL = {
    "qwen3-4b": (
        ("tp=2,dp=2", "tp=4,replicas=3"),
        ("tp=1,pp=4,dp=2", "tp=2,replicas=5"),
        ("tp=4,pp=2,dp=3", "tp=8,replicas=7"),
    ),
    "qwen2.5-7b": (
        ("tp=4,dp=2", "tp=4,replicas=3"),
        ("tp=2,pp=2,dp=3", "tp=2,pp=2,replicas=5"),
        ("tp=1,gtp=4,dp=2", "tp=4,replicas=7"),
    ),
    "nemotron-h-8b": (
        ("tp=2,dp=4", "tp=4,replicas=3"),
        ("tp=8,pp=2,dp=1", "tp=8,replicas=5"),
        ("tp=1,pp=4,dp=2", "tp=2,replicas=7"),
    ),
    "llama-70b": (
        ("tp=4,pp=4,dp=2", "tp=8,replicas=3"),
        ("tp=8,pp=2,dp=2", "tp=4,pp=2,replicas=5"),
        ("tp=2,pp=8,first=9,last=11", "tp=8,replicas=7"),
    ),
}
LARGE = {
    "llama-405b": (
        ("tp=8,pp=9,dp=1", "tp=8,replicas=3"),
        ("tp=8,pp=14,dp=2", "tp=8,pp=2,replicas=5"),
        ("tp=8,pp=7,vpp=2,dp=2", "tp=16,replicas=7"),
    ),
    "qwen3-30b-a3b": (
        ("tp=2,ep=4,etp=1,dp=3", "tp=4,replicas=3"),
        ("tp=1,ep=8,pp=2", "tp=2,ep=1,dp=2,replicas=5"),
        ("tp=4,ep=4,etp=1,dp=4", "tp=4,replicas=7"),
    ),
    "qwen3-235b-a22b": (
        ("tp=4,ep=16,etp=1,dp=1", "tp=8,replicas=3"),
        ("tp=2,pp=8,ep=8,etp=1", "tp=8,replicas=5"),
        ("tp=4,pp=4,ep=8,etp=1,dp=2", "tp=8,ep=1,replicas=7"),
    ),
    "nemotron-3-nano-30b-a3b": (
        ("tp=2,ep=8,etp=1", "tp=2,replicas=3"),
        ("tp=1,pp=4,ep=4", "tp=4,replicas=5"),
        ("tp=4,ep=4,etp=1,dp=2", "tp=8,replicas=7"),
    ),
    "nemotron-3-super-120b-a12b": (
        ("tp=2,pp=4,ep=8,etp=1", "tp=4,replicas=3"),
        ("tp=4,ep=32,etp=1", "tp=8,replicas=5"),
        ("tp=2,pp=2,ep=16,etp=1,dp=2", "tp=8,replicas=7"),
    ),
    "deepseek-v3": (
        ("tp=1,pp=16,ep=16,dp=1", "tp=32,replicas=8"),
        ("tp=2,pp=8,ep=32,etp=1", "tp=16,ep=1,replicas=3"),
        ("tp=1,pp=8,ep=32,dp=1", "tp=32,replicas=7"),
    ),
    "kimi-k2": (
        ("tp=1,pp=16,ep=16,dp=1", "tp=32,replicas=4"),
        ("tp=1,pp=8,ep=32,dp=1", "tp=16,ep=1,replicas=5"),
        ("tp=2,pp=8,ep=32,etp=1", "tp=32,replicas=3"),
    ),
}
TINY_MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "moe_intermediate_size": 32,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}


def planned(name, train, gen):
    model = load_model(name)
    return build_plan(train_manifest(model, parse_train(train)), gen_manifest(model, parse_gen(gen)))


def check_near_bound(name, train, gen):
    plan = planned(name, train, gen)
    cost = cost_of(plan, Topology())
    assert cost.bound_ratio <= 1.05, f"{name} {train} -> {gen}: {cost.busiest} against {cost.bound_link}"
    assert cost.idle_senders == 0
    assert max_over_mean_in_stage(plan.totals) <= 1.001
    assert plan.bulk_bytes >= 0.999 * (plan.bulk_bytes + plan.misc_bytes)


def test_every_shipped_model_has_its_published_number_of_parameters():
    found = {}
    for name in shipped_models():
        model = load_model(name)
        modules = [*model.first, *(module for layer in model.layers for module in layer), *model.last]
        tensors = {tensor: shape for module in modules for tensor, (shape, _) in shapes(module).items()}
        found[name] = round(sum(map(prod, tensors.values())) / 1e9, 2)
    assert found == BILLIONS


def test_every_shipped_model_has_three_layouts_here():
    assert {**SMALL, **LARGE}.keys() == set(shipped_models())
    assert all(len(layouts) >= 3 for layouts in {**SMALL, **LARGE}.values())


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name, some in SMALL.items() for layout in some]
)
def test_plans_of_dense_models_are_within_5_percent_of_the_bound(name, layout):
    check_near_bound(name, *layout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name, some in LARGE.items() for layout in some]
)
def test_plans_of_large_models_are_within_5_percent_of_the_bound(name, layout):
    check_near_bound(name, *layout)


@pytest.mark.parametrize(
    ("train", "gen"),
    [
        (TrainMesh(tp=2, ep=4, etp=1, dp=2), GenMesh(tp=2, replicas=3)),
        (TrainMesh(tp=2, pp=3, ep=2), GenMesh(tp=4, dp=2, ep=1)),
        (TrainMesh(pp=2, ep=8, layers=(1, 2)), GenMesh(tp=2, pp=2, replicas=2)),
        (TrainMesh(tp=4, gtp=2, ep=4, etp=1, egtp=2), GenMesh(tp=8)),
        (TrainMesh(tp=8), GenMesh(tp=1, replicas=5)),
        (TrainMesh(ep=2, gtp=3), GenMesh(tp=2, dp=2, ep=1)),
    ],
)
def test_any_mixture_of_parallelisms_is_all_bulk_and_every_rank_gets_its_bytes(train, gen):
    model = model_from_config("tiny", TINY_MOE)
    plan = build_plan(train_manifest(model, train), gen_manifest(model, gen))
    assert plan.misc_bytes == 0
    sent = received = 0
    for rank in range(plan.num_train + plan.num_gen):
        share = plan.rank_plan(rank)
        sent, received = sent + share.bytes_sent, received + share.bytes_received
    assert sent == received > 0


def test_a_generators_experts_follow_vllms_linear_placement():
    assert [len(linear_experts(10, 4, rank)) for rank in range(4)] == [3, 3, 2, 2]
    assert [rank for part in range(4) for rank in linear_experts(10, 4, part)] == list(range(10))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp=2,xx=1", "'xx=1' is not KEY=VALUE"),
        ("tp", "'tp' is not KEY=VALUE"),
        ("tp=2,tp=2", "tp is given twice"),
        ("tp=-1", "must be a whole number"),
        ("tp=0", "train tp is 0"),
    ],
)
def test_a_wrong_layout_string_is_refused_by_key(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_train(text)


@pytest.mark.parametrize(
    ("mesh", "sizes", "message"),
    [
        (
            TrainMesh,
            {"tp": 8, "dp": 1_000_000},
            "train layout has 8000000 ranks, a plan takes up to 65536; lower dp",
        ),
        (GenMesh, {"tp": 8, "replicas": 1_000_000}, "gen layout has 8000000 ranks, .* 65536; lower replicas"),
    ],
)
def test_a_layout_of_more_ranks_than_a_plan_takes_is_refused_at_once(mesh, sizes, message):
    with pytest.raises(ConfigError, match=message):
        mesh(**sizes)


def test_axes_of_experts_are_refused_for_a_model_without_experts():
    model = load_model("qwen3-4b")
    with pytest.raises(ConfigError, match="train ep=4, etp=2: qwen3-4b has no experts; leave that out"):
        train_manifest(model, TrainMesh(tp=2, ep=4, etp=2))
    with pytest.raises(ConfigError, match="gen ep=1: qwen3-4b has no experts; leave that out"):
        gen_manifest(model, GenMesh(tp=4, ep=1))


def test_layouts_that_do_not_divide_are_refused_with_both_numbers():
    model = load_model("qwen3-4b")
    for make in (
        lambda: train_manifest(model, TrainMesh(tp=3)),
        lambda: train_manifest(model, TrainMesh(pp=40)),
        lambda: train_manifest(model, TrainMesh(pp=2, layers=(10, 10))),
        lambda: gen_manifest(model, GenMesh(tp=3)),
        lambda: gen_manifest(model, GenMesh(ep=3)),
        lambda: load_model("no-such-model"),
    ):
        with pytest.raises(ConfigError):
            make()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_4096_trainers_to_2048_generators_stay_under_2_gib():
    tracemalloc.start()
    plan = planned("deepseek-v3", "tp=1,pp=16,ep=64,dp=4", "tp=32,replicas=64")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (plan.num_train, plan.num_gen) == (4096, 2048)
    assert peak_bytes < 2 << 30
    assert cost_of(plan, Topology()).bound_ratio <= 1.05

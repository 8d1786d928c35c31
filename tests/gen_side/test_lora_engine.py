"""A real vLLM engine whose adapter is refitted, against engines on checkpoints that PEFT itself merged."""

import json

import pytest
import torch
from safetensors.torch import save_file

from refit.gen_side.generator import Generator, GenOptions, GenParallel
from refit.gen_side.loader.hf_index import read_hf_shapes
from refit.gen_side.lora import AdapterStaging, LoraSpec
from refit.gen_side.staging import StagingError
from refit.plan import Manifest, PlanError, RankManifest, TensorSpec, build_plan
from refit.plan.naming import peft_names
from refit.service.reader import JobEngine, Reader
from refit.train_side.tiny_models import make_tiny_model
from tests.gen_side.checkpoints import tensors_of
from tests.gen_side.rounds import TIMEOUT_S, Rounds, manifest_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = {"rank": 8, "alpha": 16.0, "modules": MODULES}
FP32 = {"dtype": "float32", "prefix_caching": True, "kv_cache": "keep"}
PROMPTS = [[1, 2, 3, 4, 5] * 30, [200, 100, 50] * 40]  # longer than a block, so that prefixes are cached
BUILD_S = 400.0


def greedy(generator):
    return [s.tokens for s in generator.generate(PROMPTS, 1, 8, 0.0, 0)]


def adapter_for(folder, seed, rank=8):
    """Random factors for every projection of the checkpoint, by PEFT name."""
    random, found = torch.Generator().manual_seed(seed), {}
    for name, (shape, _) in read_hf_shapes(folder).items():
        if name.removesuffix(".weight").endswith(MODULES):
            name_a, name_b = peft_names(name)
            found[name_a] = torch.randn(rank, shape[1], generator=random) * 0.1
            found[name_b] = torch.randn(shape[0], rank, generator=random) * 0.1
    return found


def copies(adapter):
    return {
        name: tensor.clone() for name, tensor in adapter.items()
    }  # Rounds writes into what it begins with


def merged_by_peft(start, adapter, folder):
    """A checkpoint that PEFT made of the base and the adapter on disk."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (folder / "adapter").mkdir(parents=True)
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": [*MODULES], "bias": "none"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    base = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().save_pretrained(folder / "merged")
    return folder / "merged"


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["TP1", "TP2"])
def case(request, tmp_path_factory):
    """(generator with LoRA on the start checkpoint, two adapters, greedy answers of engines on PEFT's merges)."""
    folder = tmp_path_factory.mktemp("lora")
    start = make_tiny_model(
        "tiny-qwen3", folder / "start", dtype="float32", overrides={"num_hidden_layers": 2}
    )
    adapters = [adapter_for(start, seed) for seed in (1, 2)]
    goals = []
    for number, adapter in enumerate(adapters):
        fresh = Generator.build(
            merged_by_peft(start, adapter, folder / str(number)), GenParallel(), GenOptions(**FP32), BUILD_S
        )
        goals.append(greedy(fresh))
        fresh.close()
    parallel = GenParallel(tensor=request.param)
    generator = Generator.build(start, parallel, GenOptions(lora=LORA, **FP32), BUILD_S)
    yield generator, adapters, goals, request.param
    generator.close()


def test_each_version_of_the_adapter_answers_as_its_merged_checkpoint_and_reuses_no_prefix_of_another(case):
    generator, (one, two), (goal_one, goal_two), num_workers = case
    base = greedy(generator)
    assert len({str(answers) for answers in (base, goal_one, goal_two)}) == 3
    with Rounds(generator, copies(one), num_workers) as rounds:
        meanwhile = []
        assert rounds.refit(1, one, between=lambda: meanwhile.append(greedy(generator)))
        assert meanwhile == [base], "a staged adapter must not serve"
        for version, adapter, goal in ((2, two, goal_two), (3, one, goal_one)):
            assert greedy(generator) == (goal_one if version == 2 else goal_two)
            assert rounds.refit(version, adapter)
            assert greedy(generator) == goal
            assert generator.weight_version() == version
        assert {tensor.kind for tensor in rounds.plan.tensors.values()} == {"misc"}
        assert rounds.plan.misc_bytes == sum(tensor.nbytes for tensor in one.values())
        for found in rounds.audit():
            assert found["changed"] == [] and found["digests"] == rounds.trained_digests()


def test_the_base_and_the_adapter_on_it_are_read_back_under_their_own_names(case):
    generator, (one, _), _, num_workers = case
    base = tensors_of(generator._llm.llm_engine.model_config.model)
    with Rounds(generator, copies(one), num_workers) as rounds:
        assert rounds.refit(5, one)
        reader = Reader(JobEngine(rounds.control, 0, num_workers), rounds.control, TIMEOUT_S)
        wrong = [n for n, t in (base | one).items() if not torch.equal(reader.read(n).tensor, t)]
        assert wrong == [] and len(reader.side.specs) == len(base | one)
        row = reader.read("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight", 3)
        assert (row.version, row.tensor.shape) == (5, (1, 8))
        assert row.ranks == (0,) and row.witnesses == tuple(range(1, num_workers))


def test_a_refused_adapter_leaves_the_old_one_serving(case):
    generator, (one, two), (goal_one, _), num_workers = case
    with Rounds(generator, copies(one), num_workers) as rounds:
        assert rounds.refit(10, one)
        assert not rounds.refit(11, two, refuse="digests disagree")
        assert generator.weight_version() == 10
        assert greedy(generator) == goal_one
        assert not rounds.refit(12, two, fail="a trainer died")
        assert greedy(generator) == goal_one


def test_an_adapter_of_another_rank_is_refused_with_both_shapes(tmp_path):
    start = make_tiny_model("tiny-qwen3", tmp_path / "start", overrides={"num_hidden_layers": 1})
    trained = manifest_of(adapter_for(start, seed=1, rank=4))
    tensors = LoraSpec(**LORA).tensors(read_hf_shapes(start), "float32")
    served = RankManifest("gen", 0, 0, 0, tensors, (), (), ())
    with pytest.raises(
        PlanError, match=r"shape \(4, 128\) on trainers and \(8, 128\) on generators"
    ) as refused:
        build_plan(Manifest("train", (trained,)), Manifest("gen", (served,)))
    first_two = str(refused.value).splitlines()[1:3]
    assert "lora_A" in first_two[0] and "lora_B" in first_two[1]
    assert all(
        "trainers learn adapters of rank 4, the engine was built for 8: " in each for each in first_two
    )


def test_a_tensor_that_is_no_part_of_the_adapter_or_is_missing_is_refused():
    staging = AdapterStaging({"a": TensorSpec("a", (2, 3), "float32")})
    with pytest.raises(
        StagingError, match=r"adapter tensor b came as \(2, 3\); this engine has no such tensor"
    ):
        staging.load_misc([("b", torch.zeros(2, 3))])
    with pytest.raises(
        StagingError, match=r"a came as \(2, 4\); this engine has \(2, 3\): build both with one"
    ):
        staging.load_misc([("a", torch.zeros(2, 4))])
    with pytest.raises(StagingError, match="1 adapter tensors did not come, a first"):
        staging.load_misc([])

"""A real vLLM engine that stores FP8 (on this CPU: decoded at use), refitted with tensors quantized by the sender."""

import json

import pytest
import torch
from safetensors.torch import save_file

from refit.gen_side.generator import Generator, GenOptions, GenParallel
from refit.plan import PlanError
from refit.service.diff import diff
from refit.service.holders import CheckpointWeights, EngineWeights
from refit.service.reader import JobEngine, Reader
from refit.train_side.tiny_models import make_tiny_model
from refit.transfer.precision.checkpoint import quantize_checkpoint
from refit.transfer.protocol import RefitReport, report_key
from tests.gen_side.checkpoints import shifted, tensors_of
from tests.gen_side.rounds import TIMEOUT_S, Rounds
from tests.gen_side.test_engine import BUILD_S, PROMPTS, greedy

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

SIZES = {"hidden_size": 256, "head_dim": 128, "intermediate_size": 512, "num_hidden_layers": 2}
EXPERTS = {"moe_intermediate_size": 256, "num_experts": 4}
HAS_FP8_KV = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()
NO_FP8_KV = "vLLM has an FP8 KV cache on CPUs with AVX-512 or AMX only"
KV = "fp8" if HAS_FP8_KV else "auto"
KL_LIMIT = 1.2e-2
BYTES_LIMIT = 0.52


def with_kv_scales(folder, factor):
    """Add calibrated scales of keys and values to an FP8 checkpoint, different in every layer."""
    tensors = tensors_of(folder)
    for layer in range(SIZES["num_hidden_layers"]):
        for position, part in enumerate("kv"):
            value = factor * (0.5 + layer + 0.25 * position)
            tensors[f"model.layers.{layer}.self_attn.{part}_proj.{part}_scale"] = torch.tensor(value)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=["tiny-qwen3", pytest.param("tiny-qwen3-moe", marks=pytest.mark.slow)])
def folders(request, tmp_path_factory):
    """(start, changed) of one model in FP8, with KV-cache scales."""
    folder = tmp_path_factory.mktemp("fp8")
    start = make_tiny_model(
        request.param, folder / "bf16", overrides=SIZES | (EXPERTS if "moe" in request.param else {})
    )
    changed = shifted(start, folder / "changed-bf16", seed=1)
    return [
        with_kv_scales(quantize_checkpoint(source, folder / name, "fp8"), factor)
        for source, name, factor in ((start, "start", 1.0), (changed, "changed", 4.0))
    ]


def built(folder, **options):
    return Generator.build(folder, GenParallel(), GenOptions(**options), BUILD_S)


def scales(generator):
    model = generator._llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    layers = [layer.self_attn.attn for layer in model.model.layers]
    return [(a._k_scale_float, a._v_scale_float, a._k_scale.item(), a._v_scale.item()) for a in layers]


def parameters(generator):
    model = generator._llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    return {
        name: (p.dtype, p.detach().clone().view(torch.uint8))
        for name, p in model.named_parameters()
        if p.numel()
    }


def differing(found, wanted):
    assert found.keys() == wanted.keys()
    return [n for n in wanted if found[n][0] != wanted[n][0] or not torch.equal(found[n][1], wanted[n][1])]


def test_fp8_weights_and_kv_scales_arrive_as_if_loaded_from_disk_twice_in_a_row(folders):
    start, changed = folders
    fresh = built(changed, kv_cache_dtype=KV)
    goal, goal_scales, goal_answers = parameters(fresh), scales(fresh), greedy(fresh)
    fresh.close()
    generator = built(start, kv_cache_dtype=KV)
    try:
        before, before_scales = parameters(generator), scales(generator)
        if HAS_FP8_KV:
            assert goal_scales == [(4 * (0.5 + i), 4 * (0.75 + i)) * 2 for i in range(2)]
            assert before_scales != goal_scales
        assert differing(before, goal)
        assert any(dtype is torch.float8_e4m3fn for dtype, _ in before.values())
        with Rounds(generator, tensors_of(start), 1) as rounds:
            kinds = {tensor.name: tensor.kind for tensor in rounds.plan.tensors.values()}
            assert {kind for name, kind in kinds.items() if name.endswith(("weight", "scale_inv"))} == {
                "bulk"
            }
            assert {kind for name, kind in kinds.items() if name.endswith(("k_scale", "v_scale"))} == {"misc"}
            for version, (folder, wanted, wanted_scales) in enumerate(
                [(changed, goal, goal_scales), (changed, goal, goal_scales), (start, before, before_scales)],
                1,
            ):
                assert rounds.refit(version, tensors_of(folder))
                assert differing(parameters(generator), wanted) == []
                assert scales(generator) == wanted_scales  # set, not multiplied by the old ones
            assert rounds.refit(4, tensors_of(changed))
        assert greedy(generator) == goal_answers
    finally:
        generator.close()
    if not HAS_FP8_KV:
        pytest.skip(f"the weights arrived; their KV scales were not tried: {NO_FP8_KV}")


def decoded(tensors, name):
    """A weight of the checkpoint as its blocks of 128 x 128 stand for it."""
    weight, scale = tensors[name].float(), tensors[f"{name}_scale_inv"]
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return weight * wide[: weight.shape[0], : weight.shape[1]]


@pytest.mark.slow
@pytest.mark.processes
def test_an_fp8_weight_is_read_as_stored_and_dequantized_from_a_live_engine(folders):
    parallel = GenParallel(tensor=2)
    generator = Generator.build(folders[0], parallel, GenOptions(kv_cache_dtype=KV), BUILD_S)
    try:
        with Rounds(generator, tensors_of(folders[0]), parallel.num_ranks) as rounds:
            reader = Reader(JobEngine(rounds.control, 0, parallel.num_ranks), rounds.control, TIMEOUT_S)
            for version, folder in enumerate(folders):
                tensors = tensors_of(folder)
                assert version == 0 or rounds.refit(version, tensors)
                weights = [name for name, each in tensors.items() if each.dtype is torch.float8_e4m3fn]
                assert len(weights) > 10
                for name in weights:
                    for part in (name, f"{name}_scale_inv"):
                        stored = reader.read(part, version=version).tensor
                        assert stored.dtype is tensors[part].dtype
                        assert torch.equal(stored.view(torch.uint8), tensors[part].view(torch.uint8)), part
                    goal = decoded(tensors, name)
                    found = reader.read(name, version=version, dequantize=True)
                    assert found.tensor.dtype is torch.float32 and torch.equal(found.tensor, goal), name
                rows = slice(100, 200)  # of two blocks, neither of them whole
                name = "model.layers.1.self_attn.q_proj.weight"
                part = reader.read(name, rows, dequantize=True)
                assert torch.equal(part.tensor, decoded(tensors, name)[rows])
                assert part.ranks == (0,)
                with pytest.raises(PlanError, match="is not stored quantized; read it without dequantize"):
                    reader.read("model.norm.weight", dequantize=True)
                report = diff(CheckpointWeights.open(folder), EngineWeights(reader))
                assert report.equal and not set(report.skipped) & set(weights)
    finally:
        generator.close()


PER_HEAD = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "config_groups": {},
    "ignore": [],
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "attn_head", "symmetric": True},
}


def with_scales_per_head(folder, factor):
    """Give a bf16 checkpoint calibrated scales for each KV head, as llm-compressor writes them."""
    tensors = tensors_of(folder)
    for layer in range(SIZES["num_hidden_layers"]):
        for part, first in (("k", 0.5), ("v", 0.75)):
            values = factor * torch.tensor([first + layer, 2 * first + layer])
            tensors[f"model.layers.{layer}.self_attn.{part}_proj.{part}_scale"] = values.view(2, 1, 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": PER_HEAD}))
    return folder


def scales_per_head(generator):
    model = generator._llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    layers = [layer.self_attn.attn for layer in model.model.layers]
    return [
        (a._k_scale.tolist(), a._v_scale.tolist(), a._k_scale_float, a._k_scale.data_ptr()) for a in layers
    ]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_FP8_KV, reason=NO_FP8_KV)
def test_kv_scales_of_each_head_arrive_in_place_and_a_second_refit_does_not_compound_them(tmp_path):
    start = make_tiny_model("tiny-qwen3", tmp_path / "start", overrides={"num_hidden_layers": 2})
    changed = shifted(start, tmp_path / "changed", seed=1)
    with_scales_per_head(start, 1.0), with_scales_per_head(changed, 4.0)
    generator = built(start, kv_cache_dtype="fp8")
    try:
        before = scales_per_head(generator)
        assert [(k, v, top) for k, v, top, _ in before] == [
            ([0.5 + i, 1.0 + i], [0.75 + i, 1.5 + i], 1.0 + i) for i in range(2)
        ]
        goal = [([4 * x for x in k], [4 * x for x in v], 4 * top, address) for k, v, top, address in before]
        with Rounds(generator, tensors_of(start), 1) as rounds:
            for version, (folder, wanted) in enumerate(
                [(changed, goal), (changed, goal), (start, before)], 1
            ):
                assert rounds.refit(version, tensors_of(folder))
                assert scales_per_head(generator) == wanted
    finally:
        generator.close()


@pytest.mark.slow
def test_an_fp8_refit_sends_half_the_bytes_and_the_engine_answers_close_to_a_bf16_engine(tmp_path):
    wide = SIZES | {"intermediate_size": 1024, "num_hidden_layers": 6}
    plain = make_tiny_model("tiny-qwen3", tmp_path / "bf16", overrides=wide)
    changed = shifted(plain, tmp_path / "changed", seed=1)
    folders = {
        "bf16": (plain, changed),
        "fp8": tuple(
            quantize_checkpoint(folder, tmp_path / f"fp8-{folder.name}", "fp8") for folder in (plain, changed)
        ),
    }
    answers, sent_bytes = {}, {}
    for name, (start, target) in folders.items():
        generator = built(start)
        try:
            with Rounds(generator, tensors_of(start), 1) as rounds:
                assert rounds.refit(1, tensors_of(target))
                report = RefitReport.of_message(rounds.control.get(report_key(rounds.attempt, 0), 10.0))
            samples = answers.setdefault("samples", generator.generate(PROMPTS, 16, 8, 1.0, 3))
            answers[name], sent_bytes[name] = forced(generator, samples), report.bytes_sent
        finally:
            generator.close()
    delta = torch.tensor(answers["bf16"], dtype=torch.float64) - torch.tensor(
        answers["fp8"], dtype=torch.float64
    )
    kl, ratio = (delta.exp() - delta - 1).mean().item(), sent_bytes["fp8"] / sent_bytes["bf16"]
    print(json.dumps({"k3": kl, "tokens": len(delta), "bytes": sent_bytes, "ratio": ratio}))
    assert 0 < kl <= KL_LIMIT
    assert ratio <= BYTES_LIMIT


def forced(generator, samples):
    """Log-probabilities of the tokens of `samples`, under this engine."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    inputs = [{"prompt_token_ids": [*PROMPTS[s.prompt_index], *s.tokens]} for s in samples]
    outputs = generator._llm.generate(inputs, sampling, use_tqdm=False)
    return [
        float(entry[token].logprob)
        for sample, output in zip(samples, outputs, strict=True)
        for token, entry in list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))[
            len(PROMPTS[sample.prompt_index]) :
        ]
    ]

"""Every setting that cannot work is refused with key, value and remedy; what can work passes."""

from __future__ import annotations

import dataclasses
import json

import pytest

from refit.plan.errors import ConfigError
from refit.run import config_folder, load_config
from refit.service.gate.check import check, inspect_machine, read_model_config
from refit.service.gate.rules import Environment

LAPTOP = Environment(available_memory_bytes=24 * 2**30, num_cuda_devices=0, taken_ports=(7777,))
EIGHT_GPUS = dataclasses.replace(LAPTOP, num_cuda_devices=8)


@pytest.fixture(scope="module")
def models():
    """The HF configs that `policy.model` names, read once: transformers takes seconds to import."""
    names = ("tiny-qwen3", "tiny-qwen3-wide", "tiny-qwen3-peaked", "tiny-qwen3-moe", "tiny-deepseek-v3")
    names += ("tiny-nemotron-h", "tiny-nemotron-h-dense")
    return {name: read_model_config(name) for name in names}


def refuse(models, overrides, environment=LAPTOP, name="default", **changes):
    """The message of the refusal; `changes` overwrite fields of the HF config."""
    config = load_config(name, overrides)
    model = models.get(config.policy.model)
    with pytest.raises(ConfigError) as refused:
        check(config, None if model is None else {**model, **changes}, environment)
    return str(refused.value)


MOE = "policy.model=tiny-qwen3-moe"
HYBRID = "policy.model=tiny-nemotron-h-dense"
ONE_STAGE = "policy.pipeline_parallel=1"
ADAPTER = ["policy.lora_rank=4", "policy.lora_refit=adapter", "refit.pause=keep"]

BULK, DELTA = "+policy.nccl_xfer_refit=true", "refit.delta=true"

REFUSALS = [
    # overrides, what the message must hold
    ([DELTA], ["refit.delta = True: without bulk nothing is compared", "add +policy.nccl_xfer_refit=true"]),
    ([BULK, DELTA, "refit.bulk=golden"], ["refit.delta = True: the golden path", "use refit.bulk=p2p"]),
    ([BULK, DELTA, "refit.transport=cuda_ipc"], ["refit.delta = True: it compares weights in host memory"]),
    ([BULK, DELTA, *ADAPTER], ["refit.delta = True: adapters go by broadcast", "policy.lora_refit=merged"]),
    (["policy.tensor_parallel=0"], ["policy.tensor_parallel = 0", "at least 1"]),
    (["generation.replicas=-1"], ["generation.replicas = -1", "at least 1"]),
    (["policy.lr=-1"], ["policy.lr = -1", "at least 0"]),
    (["policy.lr=nan"], ["policy.lr = nan"]),
    (["policy.clip_ratio=1.5"], ["policy.clip_ratio = 1.5", "between 0 and 1"]),
    (["policy.kl_coef=-0.1"], ["policy.kl_coef = -0.1"]),
    (["policy.num_microbatches=0"], ["policy.num_microbatches = 0"]),
    (["grpo.steps=0"], ["grpo.steps = 0", "Use 1 or more"]),
    (["cluster.port=70000"], ["cluster.port = 70000", "at most 65535"]),
    (["refit.buffer_bytes=10"], ["refit.buffer_bytes = 10", "at least 65536"]),
    (["refit.num_streams=0"], ["refit.num_streams = 0"]),
    (["refit.timeout_s=0"], ["refit.timeout_s = 0"]),
    (["refit.timeout_s=inf"], ["refit.timeout_s = inf", "at most 86400"]),
    (["cluster.build_timeout_s=0"], ["cluster.build_timeout_s = 0", "at least 1.0"]),
    (["grpo.timeout_s=0.5"], ["grpo.timeout_s = 0.5", "at least 1.0"]),
    (["policy.kl_coef=inf"], ["policy.kl_coef = inf", "must be finite"]),
    (["refit.verify_every=-1"], ["refit.verify_every = -1"]),
    (["refit.retries=-1"], ["refit.retries = -1"]),
    (["cluster.nic_gbps=0"], ["cluster.nic_gbps = 0", "at least 0.001"]),
    (["cluster.nic_gbps=inf"], ["cluster.nic_gbps = inf", "at most 100000.0"]),
    (["cluster.restart_generators=-1"], ["cluster.restart_generators = -1"]),
    (["cluster.placement=NEAR"], ["cluster.placement = 'NEAR'", "PACK, SPREAD"]),
    (["refit.pause=stop"], ["refit.pause = 'stop'", "wait, abort, keep"]),
    (["refit.kv_cache=drop"], ["refit.kv_cache = 'drop'", "clear, keep"]),
    (["grpo.max_staleness=-1"], ["grpo.max_staleness = -1"]),
    (["grpo.checkpoint_every=-1"], ["grpo.checkpoint_every = -1"]),
    (["policy.precision=fp8"], ["policy.precision = 'fp8'", "Use one of bf16, fp32"]),
    (["generation.precision=int4"], ["generation.precision = 'int4'", "Use one of bf16, fp32, fp8, mxfp8"]),
    (["generation.precision=nvfp4"], ["generation.precision = 'nvfp4'", "Use one of"]),
    (
        ["generation.precision=mxfp8", "policy.precision=fp32"],
        ["'mxfp8'", "policy.precision 'fp32'", "=bf16"],
    ),
    (
        ["generation.precision=fp8"],
        ["generation.tensor_parallel = 2", "64 of attention rows", "blocks of 128"],
    ),
    (["policy.lora_rank=-1"], ["policy.lora_rank = -1", "at least 0"]),
    (
        ["policy.lora_refit=adapter"],
        ["policy.lora_refit = 'adapter'", "policy.lora_rank is 0", "no adapters"],
    ),
    (
        ["policy.lora_rank=3", "policy.tensor_parallel=2"],
        ["policy.lora_rank = 3", "policy.tensor_parallel 2", "multiple of 2"],
    ),
    (["policy.lora_rank=4", "policy.lora_alpha=0"], ["policy.lora_alpha = 0", "above 0"]),
    (["policy.lora_rank=4", "policy.lora_targets=[q_proj]"], ["('q_proj',)", "linear_qkv, linear_proj"]),
    ([HYBRID, "policy.lora_rank=4"], ["policy.lora_rank = 4", "of Mamba"]),
    (
        [MOE, "policy.lora_rank=4", "policy.tensor_parallel=2", ONE_STAGE],
        ["policy.tensor_parallel = 2", "share out the sequence"],
    ),
    (["policy.lora_rank=4", "policy.lora_refit=both"], ["policy.lora_refit = 'both'", "merged, adapter"]),
    (ADAPTER, ["policy.lora_refit = 'adapter'", "refit.pause keep", "use merged"]),
    ([*ADAPTER, MOE], ["models with experts"]),
    ([*ADAPTER, "generation.precision=fp8"], ["engines in fp8"]),
    ([*ADAPTER, "policy.lora_rank=1024"], ["policy.lora_rank 1024 is above 512"]),
    (["policy.lora_rank=4", "policy.lora_targets=[]"], ["policy.lora_targets = ()", "linear_qkv"]),
    (["refit.backend=mpi"], ["refit.backend = 'mpi'", "Use one of gloo, nccl"]),
    (
        ["refit.transport=carrier_pigeon"],
        ["refit.transport = 'carrier_pigeon'", "auto, process_group, tcp, nixl, cuda_ipc"],
    ),
    (
        ["refit.transport=tcp", "refit.backend=nccl"],
        ["refit.transport = 'tcp'", "they are on GPUs", "Use auto"],
    ),
    (["refit.transport=cuda_ipc"], ["refit.transport = 'cuda_ipc'", "no CUDA device to share"]),
    (["refit.bulk=m2n"], ["refit.bulk = 'm2n'", "Use one of p2p, golden"]),
    (["grpo.task=chess"], ["grpo.task = 'chess'", "basic_arithmetic"]),
    (["policy.model=/no/such/folder"], ["policy.model = '/no/such/folder'", "no such folder", "tiny-qwen3"]),
    (["policy.tensor_parallel=3"], ["policy.tensor_parallel = 3", "4 attention heads", "divisor of 4"]),
    (["policy.tensor_parallel=3"], ["2 KV heads"]),
    (["generation.tensor_parallel=8"], ["generation.tensor_parallel = 8", "4 attention heads"]),
    (["policy.pipeline_parallel=5"], ["policy.pipeline_parallel = 5", "4 layers", "at most 4"]),
    (["policy.pipeline_parallel=3"], ["policy.pipeline_parallel = 3", "divisor of 4"]),
    (["policy.expert_parallel=2"], ["policy.expert_parallel = 2", "no experts"]),
    ([MOE, "policy.expert_parallel=3", "policy.data_parallel=3"], ["does not divide the 8 experts"]),
    ([MOE, "policy.expert_parallel=2"], ["policy.expert_parallel = 2", "1 ranks", "policy.data_parallel"]),
    (["policy.first_stage_layers=4"], ["policy.first_stage_layers = 4", "leaves 0 of 4 layers to 1 other"]),
    (["policy.last_stage_layers=0"], ["policy.last_stage_layers = 0", "leaves 4 of 4 layers to 1 other"]),
    ([ONE_STAGE, "policy.first_stage_layers=1"], ["policy.first_stage_layers = 1", "there is one stage"]),
    (
        ["policy.pipeline_parallel=3", "policy.first_stage_layers=1"],
        ["policy.first_stage_layers = 1", "leaves 3 of 4 layers to 2 other stages"],
    ),
    (["policy.virtual_pipeline=3"], ["policy.virtual_pipeline = 3", "the 2 layers of a stage"]),
    ([ONE_STAGE, "policy.virtual_pipeline=2"], ["policy.virtual_pipeline = 2", "there is one"]),
    (
        ["policy.virtual_pipeline=2", "policy.num_microbatches=3"],
        ["policy.num_microbatches = 3", "a multiple of 2"],
    ),
    (
        ["policy.virtual_pipeline=2", "policy.first_stage_layers=1"],
        ["policy.virtual_pipeline = 2", "the 1 layers of a stage", "the 3 layers of a stage"],
    ),
    (["policy.expert_tensor_parallel=2"], ["policy.expert_tensor_parallel = 2", "no experts", "1 ranks"]),
    (
        [MOE, "policy.expert_tensor_parallel=3", "policy.data_parallel=3"],
        ["policy.expert_tensor_parallel = 3", "expert width of 128"],
    ),
    (
        ["policy.first_stage_layers=2", "policy.last_stage_layers=1"],
        ["policy.first_stage_layers = 2", "leaves 1 of 4 layers to 0 other stages"],
    ),
    ([HYBRID, "policy.virtual_pipeline=2"], ["policy.virtual_pipeline = 2", "Mamba hybrids"]),
    ([HYBRID, "policy.tensor_parallel=3"], ["number of Mamba heads of 8", "number of Mamba groups of 4"]),
    (["policy.model=tiny-nemotron-h"], ["tiny-nemotron-h", "experts without a gate", "is_act_and_mul"]),
    ([MOE, "generation.expert_parallel=2"], ["generation.expert_parallel = 2", "crashes", "Use 1"]),
    (["generation.pipeline_parallel=5"], ["generation.pipeline_parallel = 5", "4 layers", "at most 4"]),
    (
        ["generation.sequence_parallel=true", "generation.tensor_parallel=1"],
        ["generation.sequence_parallel = True", "there is one", "generation.tensor_parallel=2"],
    ),
    (["generation.temperature=0.7"], ["generation.temperature = 0.7", "Use 1.0"]),
    (["generation.max_new_tokens=128"], ["generation.max_new_tokens = 128", "no room for a prompt"]),
    (["generation.max_model_len=4096"], ["generation.max_model_len = 4096", "512 positions"]),
    (["grpo.samples_per_prompt=1"], ["grpo.samples_per_prompt = 1", "at least 2"]),
    (["generation.replicas=17"], ["generation.replicas = 17", "without work"]),
    (["policy.num_microbatches=300"], ["policy.num_microbatches = 300", "256 samples"]),
    (["cluster.port=7777"], ["cluster.port = 7777", "another process listens", "0 for any free one"]),
    (["refit.backend=nccl"], ["refit.backend = 'nccl'", "4 ranks", "this machine has 0"]),
    (["refit.force_misc=['(']"], ["refit.force_misc = '('", "not a regular expression"]),
    (
        ["cluster.min_free_memory_bytes=100000000000000"],
        ["min_free_memory_bytes", "24.0 GiB", "is asked for"],
    ),
]


@pytest.mark.parametrize(("overrides", "says"), REFUSALS, ids=[" ".join(case[0]) for case in REFUSALS])
def test_a_setting_that_cannot_work_is_refused_with_key_value_and_remedy(models, overrides, says):
    message = refuse(models, overrides)
    for words in says:
        assert words in message


# policy.precision -> what generation.precision may be; every other pair of these words is refused
WORDS = ("bf16", "fp32", "fp8", "mxfp8", "nvfp4")
CONNECTED = {"bf16": ("bf16", "fp32", "fp8", "mxfp8"), "fp32": ("bf16", "fp32")}


def test_mxfp8_is_refused_where_a_rank_has_no_whole_groups_and_passes_for_experts_that_have(models):
    overrides = [MOE, "generation.precision=mxfp8"]
    check(load_config("default", overrides), models["tiny-qwen3-moe"], LAPTOP)
    message = refuse(models, overrides, moe_intermediate_size=96)
    assert "generation.tensor_parallel = 2: with MXFP8 groups of 32, a rank's 48 columns of expert" in message


@pytest.mark.parametrize("engine", WORDS)
@pytest.mark.parametrize("train", WORDS)
def test_each_pair_of_precisions_is_connected_or_refused_by_the_names_of_both(models, train, engine):
    overrides = [
        "policy.model=tiny-qwen3-wide",
        f"policy.precision={train}",
        f"generation.precision={engine}",
    ]
    if engine in CONNECTED.get(train, ()):
        config = load_config("default", overrides)
        check(config, models["tiny-qwen3-wide"], LAPTOP)
        return
    message = refuse(models, overrides)
    assert f"generation.precision = {engine!r}: " in message
    assert f"policy.precision {train!r}" in message and ("Use one of" in message or "=bf16" in message)


MODEL_REFUSALS = [
    ({"head_dim": 16}, ["policy.model", "head size 16", "on a CPU"]),
    ({"model_type": "gpt2"}, ["model_type 'gpt2'", "qwen3"]),
    ({"quantization_config": {"quant_method": "fp8"}}, ["quantized", "bf16"]),
    ({"eos_token_id": None}, ["eos_token_id is None"]),
    ({"num_hidden_layers": None}, ["policy.model", "num_hidden_layers is None; an integer is needed"]),
    ({"model_type": "deepseek_v3"}, ["policy.model", "kv_lora_rank is None; an integer is needed"]),
    ({"intermediate_size": 251}, ["generation.tensor_parallel = 2", "MLP width of 251"]),
    ({"num_attention_heads": 12, "num_key_value_heads": 3}, ["generation.tensor_parallel = 2", "3 KV heads"]),
]


@pytest.mark.parametrize(("changes", "says"), MODEL_REFUSALS, ids=[str(case[0]) for case in MODEL_REFUSALS])
def test_a_model_that_a_side_cannot_hold_is_refused(models, tmp_path, changes, says):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**models["tiny-qwen3"], **changes}))
    (folder / "model.safetensors").write_bytes(b"")
    config = load_config("default", [f"policy.model={folder}"])
    with pytest.raises(ConfigError) as refused:
        check(config, read_model_config(str(folder)), LAPTOP)
    for words in says:
        assert words in str(refused.value)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "config.json is missing"),
        ({"config.json": "{"}, "is not JSON"),
        ({"config.json": "[]"}, "config.json"),
        ({"config.json": None}, "holds no .safetensors file"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(models, tmp_path, files, says):
    for name, text in files.items():
        (tmp_path / name).write_text(json.dumps(models["tiny-qwen3"]) if text is None else text)
    config = load_config("default", [f"policy.model={tmp_path}"])
    with pytest.raises(ConfigError, match=says):
        check(config, read_model_config(str(tmp_path)), LAPTOP)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json"])
def test_a_large_vocabulary_without_a_tokenizer_is_refused(models, tmp_path, name):
    document = {**models["tiny-qwen3"], "vocab_size": 151_936}
    (tmp_path / "config.json").write_text(json.dumps(document))
    (tmp_path / "model.safetensors").write_text("")
    config = load_config("default", [f"policy.model={tmp_path}"])
    with pytest.raises(ConfigError, match=r"policy\.model = .*no tokenizer, and its vocabulary of 151936"):
        check(config, document, LAPTOP)
    check(config, {**document, "vocab_size": 259}, LAPTOP)
    (tmp_path / name).write_text("{}")
    check(config, document, LAPTOP)


def test_all_violations_are_listed_at_once(models):
    message = refuse(
        models, ["policy.tensor_parallel=3", "grpo.task=chess", "refit.backend=nccl", "cluster.port=7777"]
    )
    assert message.startswith("6 settings cannot work; nothing was started")
    for key in ("policy.tensor_parallel", "grpo.task", "refit.backend", "cluster.port"):
        assert f"- {key} = " in message


def test_too_little_memory_is_refused_by_the_estimate(models):
    poor = dataclasses.replace(LAPTOP, available_memory_bytes=2 * 2**30)
    message = refuse(models, [], poor)
    assert "2.0 GiB of memory are free" in message
    assert "is the estimate for this job" in message


def test_the_memory_estimate_grows_with_the_model(models):
    wide = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    message = refuse(models, [], dataclasses.replace(LAPTOP, available_memory_bytes=2**40), **wide)
    assert "is the estimate for this job" in message


def test_what_only_a_cpu_cannot_do_passes_with_devices(models):
    config = load_config(
        "ep2_moe_to_tp2",
        ["generation.expert_parallel=2", "refit.backend=nccl", "generation.pipeline_parallel=2"],
    )
    check(config, models["tiny-qwen3-moe"], EIGHT_GPUS)


WORKS = [
    ["policy.model=tiny-deepseek-v3", "policy.first_stage_layers=1"],
    ["policy.model=tiny-deepseek-v3", "policy.tensor_parallel=2", "policy.expert_parallel=2", ONE_STAGE],
    [HYBRID],
    [HYBRID, "policy.first_stage_layers=1"],
    [HYBRID, "policy.tensor_parallel=2", ONE_STAGE],
    [MOE, "policy.tensor_parallel=2", "policy.data_parallel=2", "policy.expert_tensor_parallel=2", ONE_STAGE],
    ["policy.virtual_pipeline=2"],
    ["policy.num_microbatches=256"],  # as many as samples in a step
    ["policy.pipeline_parallel=3", "policy.first_stage_layers=1", "policy.last_stage_layers=2"],
]


@pytest.mark.parametrize("overrides", WORKS, ids=[" ".join(overrides) for overrides in WORKS])
def test_layouts_and_families_that_were_seen_to_train_pass(models, overrides):
    config = load_config("default", overrides)
    check(config, models[config.policy.model], LAPTOP)


def test_a_latent_that_the_cpu_kernel_cannot_read_is_refused_without_cuda_only(models):
    other = {**models["tiny-deepseek-v3"], "kv_lora_rank": 64, "qk_rope_head_dim": 32}
    config = load_config("default", ["policy.model=tiny-deepseek-v3", ONE_STAGE])
    with pytest.raises(ConfigError, match=r"its MLA caches 64 \+ 32 elements.*kv_lora_rank 512"):
        check(config, other, LAPTOP)
    check(config, other, EIGHT_GPUS)


@pytest.mark.parametrize("tensor", [1, 2])
def test_an_engine_may_be_a_pipeline_also_of_stages_of_unequal_length(models, tensor):
    for pipeline in (2, 3, 4):
        overrides = [f"generation.pipeline_parallel={pipeline}", f"generation.tensor_parallel={tensor}"]
        check(load_config("default", overrides), models["tiny-qwen3"], LAPTOP)
        check(load_config("default", [MOE, *overrides]), models["tiny-qwen3-moe"], LAPTOP)


@pytest.mark.parametrize(
    "overrides", [[HYBRID], ["policy.model=tiny-deepseek-v3"], ["generation.precision=fp8"]]
)
def test_stages_of_engines_that_no_cpu_was_seen_to_run_are_refused_without_cuda_only(models, overrides):
    overrides = [*overrides, "generation.pipeline_parallel=2"]
    assert "generation.pipeline_parallel = 2: engines of several stages" in refuse(models, overrides)
    with_another_fault = [*overrides, "refit.backend=nccl", "grpo.samples_per_prompt=1"]
    assert "several stages" not in refuse(models, with_another_fault, EIGHT_GPUS)


def test_engine_experts_must_be_spread_over_all_tensor_ranks(models):
    message = refuse(
        models, ["generation.expert_parallel=2", "generation.tensor_parallel=4"], EIGHT_GPUS, "ep2_moe_to_tp2"
    )
    assert "generation.expert_parallel = 2" in message
    assert "Make both equal" in message


def test_devices_and_memory_of_an_existing_cluster_are_not_judged_here(models):
    nothing = Environment(available_memory_bytes=0, num_cuda_devices=0, taken_ports=())
    config = load_config("default", ["cluster.address=auto", "refit.backend=nccl"])
    check(config, models["tiny-qwen3"], nothing)


def test_a_transport_whose_package_is_missing_is_refused(models):
    message = refuse(models, ["refit.transport=nixl"], dataclasses.replace(LAPTOP, has_nixl=False))
    assert "refit.transport = 'nixl': the package nixl is not installed. Install nixl" in message
    config = load_config("default", ["refit.transport=nixl"])
    check(config, models["tiny-qwen3"], LAPTOP)


def test_a_cluster_that_does_not_answer_is_refused(models):
    config = load_config("default", ["cluster.address='127.0.0.1:1'"])
    with pytest.raises(ConfigError, match=r"cluster.address = '127.0.0.1:1': no Ray answers"):
        check(config, models["tiny-qwen3"], inspect_machine(config))


@pytest.mark.parametrize("name", sorted(path.stem for path in config_folder().glob("*.yaml")))
def test_every_named_configuration_passes_on_a_laptop(models, name):
    config = load_config(name)
    check(config, models[config.policy.model], LAPTOP)

"""Manifests from a config equal those that tracing real vLLM loaders gives, tensor by tensor, stride by stride."""

import pytest

from refit.gen_side.generator import GenParallel
from refit.plan import decode_rank_manifest
from refit.plan.synth.config import load_model
from refit.plan.synth.gen import gen_manifest
from refit.plan.synth.parallel import GenMesh
from tests.gen_side.families import make_family
from tests.gen_side.farm import run_ranks
from tests.plan.real import differences, traced, with_names_of

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

CASES = {
    "qwen2 with biases, TP2": ("qwen2-bias", GenParallel(tensor=2)),
    "qwen2 with 2 KV heads, TP4": ("qwen2-bias", GenParallel(tensor=4)),
    "qwen3 tied, PP2": ("qwen3-tied", GenParallel(pipeline=2)),
    "llama with odd vocabulary, TP4": ("llama-odd-vocabulary", GenParallel(tensor=4)),
    "qwen3-moe, TP2": ("qwen3-moe", GenParallel(tensor=2)),
    "qwen3-moe, TP2 with EP": ("qwen3-moe", GenParallel(tensor=2, expert=True)),
    "deepseek-v3, TP2": ("deepseek-v3", GenParallel(tensor=2)),
    "deepseek-v3, PP2": ("deepseek-v3", GenParallel(pipeline=2)),
    "nemotron-h, TP2": ("nemotron-h", GenParallel(tensor=2)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            made[family] = make_family(family, tmp_path_factory.mktemp(family) / "start")
        return made[family]

    return of


@pytest.mark.parametrize("case", CASES)
def test_a_config_derived_generator_equals_the_real_one(case, folders):
    family, parallel = CASES[case]
    folder = folders(family)
    dtype = "bfloat16" if family == "nemotron-h" else "float32"  # vLLM's CPU kernel of conv1d has no float32
    mesh = GenMesh(tp=parallel.tensor, pp=parallel.pipeline, ep=int(parallel.expert), dtype=dtype)
    synthetic = gen_manifest(load_model(str(folder)), mesh)
    texts = run_ranks(parallel.num_ranks, traced, parallel, str(folder), dtype)
    reals = [decode_rank_manifest(text) for text in texts]
    found = [
        difference
        for real, mine in zip(reals, synthetic.ranks, strict=True)
        for difference in differences(real, with_names_of(real, mine))
    ]
    assert not found, "\n".join(found[:60])

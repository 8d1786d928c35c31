"""Every family and layout: what vLLM's loader does, described exactly; two refits equal a fresh load, bit for bit."""

import pytest

from refit.gen_side.generator import GenParallel
from tests.gen_side.checkpoints import index_coded
from tests.gen_side.exact import exact
from tests.gen_side.families import make_family
from tests.gen_side.farm import run_ranks

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

TP1, TP2, TP4 = GenParallel(), GenParallel(tensor=2), GenParallel(tensor=4)
PP2, TP2_PP2 = GenParallel(pipeline=2), GenParallel(tensor=2, pipeline=2)
EP2, EP4 = GenParallel(tensor=2, expert=True), GenParallel(tensor=4, expert=True)

# Nemotron-H is in the validation matrices, in bf16: on some CPUs vLLM has no float32 convolution.
CASES = {
    "qwen2-bias-tp1": ("qwen2-bias", TP1),
    "qwen2-bias-tp2": ("qwen2-bias", TP2),
    "qwen2-bias-tp4-two-kv-heads": ("qwen2-bias", TP4),
    "qwen2-tied-tp2": ("qwen2-tied", TP2),
    "qwen3-pp2": ("qwen3", PP2),
    "qwen3-tied-pp2": ("qwen3-tied", PP2),
    "qwen3-tied-tp2-pp2": ("qwen3-tied", TP2_PP2),
    "llama-tp2": ("llama", TP2),
    "llama-odd-vocabulary-tp4": ("llama-odd-vocabulary", TP4),
    "qwen3-moe-ep2": ("qwen3-moe", EP2),
    "qwen3-moe-ep4": ("qwen3-moe", EP4),
    "qwen3-moe-tp2-pp2": ("qwen3-moe", TP2_PP2),
    "qwen2-moe-tp2": ("qwen2-moe", TP2),
    "mixtral-tp2": ("mixtral", TP2),
    "deepseek-v3-tp1": ("deepseek-v3", TP1),
    "deepseek-v3-tp2": ("deepseek-v3", TP2),
    "deepseek-v3-ep2": ("deepseek-v3", EP2),
    "deepseek-v3-pp2": ("deepseek-v3", PP2),
    "glm4-moe-tp2": ("glm4-moe", TP2),
    "gpt-oss-tp2": ("gpt-oss", TP2),
    "gemma2-tp2": ("gemma2", TP2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            start = make_family(family, folder / "start")
            made[family] = (start, index_coded(start, folder / "coded"))
        return made[family]

    return of


@pytest.mark.parametrize("case", CASES)
def test_refits_of_every_family_and_layout_equal_a_fresh_load(case, folders):
    family, parallel = CASES[case]
    start, coded = folders(family)
    for found in run_ranks(parallel.num_ranks, exact, parallel, "float32", start, coded):
        print(case, found["num_holdings"], found["kinds"], found["misc"], found["aliases"], found["partial"])
        assert found["staged"] is None
        assert found["wrong"] == []
        assert found["packed_ahead"], "on a CPU linear layers are packed ahead"
        assert found["changed"] == ()

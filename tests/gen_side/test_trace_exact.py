"""The trace of vLLM's loader, against what vLLM's loader really does, on real models in many layouts."""

import pytest

from refit.gen_side.generator import GenParallel
from tests.gen_side.exact import exact
from tests.gen_side.farm import run_ranks

pytestmark = [pytest.mark.vllm, pytest.mark.slow]  # the small validation matrix covers it in every run

LAYOUTS = {
    "dense-tp1": ("tiny-qwen3", GenParallel(), {}),
    "dense-tp2": ("tiny-qwen3", GenParallel(tensor=2), {}),
    "dense-tp4-two-kv-heads": ("tiny-qwen3", GenParallel(tensor=4), {}),
    "dense-tied-tp2": ("tiny-qwen3", GenParallel(tensor=2), {"tie_word_embeddings": True}),
    "moe-tp1": ("tiny-qwen3-moe", GenParallel(), {}),
    "moe-tp2": ("tiny-qwen3-moe", GenParallel(tensor=2), {}),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_staging_by_holdings_equals_the_loader_and_two_refits_equal_a_fresh_load(case, checkpoints):
    model, parallel, overrides = LAYOUTS[case]
    start, coded = checkpoints(model, **overrides)
    ranks = run_ranks(parallel.num_ranks, exact, parallel, "float32", start, coded)
    for found in ranks:
        assert found["staged"] is None
        assert found["wrong"] == []
        assert found["changed"] == ()
        assert found["misc"] == []
        late = [name for name in found["processed"] if name not in found["ready"]]
        assert all(name.endswith(".experts.routed_experts") for name in late), late
        assert bool(late) == model.endswith("moe"), "a commit of dense models only copies"

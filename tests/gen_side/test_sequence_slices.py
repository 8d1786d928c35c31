"""The slices of the plan are those that vLLM cuts: its own function, on two tensor-parallel ranks."""

import pytest
import torch

from refit.gen_side.bare import join_ranks
from refit.gen_side.generator import GenParallel
from refit.plan.sequence import SequenceCut
from refit.train_side.tiny_models import make_tiny_model
from tests.gen_side.farm import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.processes, pytest.mark.timeout(600)]
TENSOR = 2
LENGTHS = range(1, 4 * TENSOR + 1)


def chunks_of(rank, address, folder):
    """By length, the rows that vLLM leaves a rank of a sequence 1, 2, ...: 0 is padding."""
    join_ranks(folder, GenParallel(tensor=TENSOR), "float32", rank, address)
    from vllm.model_executor.models.utils import sequence_parallel_chunk_impl

    rows = {length: torch.arange(1.0, length + 1)[:, None] for length in LENGTHS}
    return {length: sequence_parallel_chunk_impl(each)[:, 0].int().tolist() for length, each in rows.items()}


def test_vllm_gives_each_rank_the_rows_that_the_plan_says(tmp_path):
    folder = make_tiny_model("tiny-qwen3", tmp_path / "model")
    found = run_ranks(TENSOR, chunks_of, folder)
    for length in LENGTHS:
        cut = SequenceCut(length, TENSOR)
        for rank in range(TENSOR):
            wanted = [row + 1 if row < length else 0 for row in cut.rows(rank)]
            assert found[rank][length] == wanted, (length, rank)

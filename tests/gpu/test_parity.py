"""The parity harness on GPUs, where vLLM's sequence-parallel pass runs: the same comparison as on a CPU.

One GPU per worker of the engine, and one for the trainer: NCCL takes no two ranks of a group on one device.
"""

import pytest
import torch

from refit.gen_side.generator import Generator, GenOptions, GenParallel
from tests.gen_side.checkpoints import tensors_of
from tests.gen_side.parity import BUILD_S, answers_of, make_lesson, require_parity, two_refits

pytestmark = [pytest.mark.vllm, pytest.mark.processes, pytest.mark.timeout(1200)]

LAYOUTS = {
    "tp2 sp": (GenParallel(tensor=2), True),
    "pp2": (GenParallel(pipeline=2), False),
    "pp2 tp2": (GenParallel(tensor=2, pipeline=2), False),
    "pp2 tp2 sp": (GenParallel(tensor=2, pipeline=2), True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_equal_those_of_one_rank_within_the_noise_after_two_refits(layout, tmp_path):
    parallel, sequence_parallel = LAYOUTS[layout]
    num_devices = parallel.num_ranks + 1
    if torch.cuda.device_count() < num_devices:
        pytest.skip(f"{num_devices} GPUs are needed, {torch.cuda.device_count()} are here")
    lesson = make_lesson(tmp_path, "tiny-qwen3", "bf16", parallel.tensor)
    options = GenOptions(
        call_timeout_s=120,
        enforce_eager=not sequence_parallel,
        sequence_parallel=sequence_parallel,
        sequence_min_tokens=2,  # a tiny model is far below the size from which vLLM uses the pass by itself
        prompt_embeds=not sequence_parallel,
    )
    generator = Generator.build(lesson.start, parallel, options, BUILD_S)
    try:
        live = generator.describe()
        assert live.sequence_parallel == sequence_parallel, live.sequence_off
        trainer = torch.device("cuda", parallel.num_ranks)
        for index, found in two_refits(generator, parallel, lesson, first_version=1, device=trainer):
            require_parity(found, lesson, parallel, index)
            if not live.prompt_embeds:
                continue
            table = tensors_of(lesson.folders[index])["model.embed_tokens.weight"]
            embeddings = [table[list(prompt)] for prompt in lesson.prompts]
            assert answers_of(generator, embeddings) == answers_of(generator, lesson.prompts)
    finally:
        generator.close()

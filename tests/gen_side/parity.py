"""The parity harness: after each of two refits an engine's log-probabilities against those of fresh ones of one rank.

The same on a CPU and on GPUs; only layouts, dtypes and devices differ. Pipeline stages change no sum, so that they must
change no bit where kernels treat each row of a prefill by itself (CPUs' do, as `Noise.prefill` shows). Tensor
parallelism adds up in parts: the *twin* of an engine is one of one rank that takes the same partial sums by the same
kernels (`TwoParts`).
"""

import functools
from dataclasses import dataclass

import torch

from refit.gen_side.generator import Generator, GenOptions, GenParallel
from refit.train_side.tiny_models import make_tiny_model
from refit.validation.parity import LOGPROB_LIMIT, compare, largest_delta, noise_floor, prompts_for
from tests.gen_side.checkpoints import shifted, tensors_of
from tests.gen_side.rounds import Rounds

BUILD_S = 400.0
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
VOCABULARY = 256


@dataclass(frozen=True)
class Lesson:
    """A start checkpoint, two versions after it, and what a fresh engine of one rank says about each of these.

    `noises` say how far that engine is from itself in batches of other shapes, for each version.
    """

    precision: str
    start: object
    folders: tuple
    prompts: tuple
    scores: tuple
    noises: tuple

    @functools.cached_property
    def twins(self):
        """(scores of the twin of two tensor-parallel ranks, its noise) for each version."""
        measure = functools.partial(noise_floor, prompts=self.prompts)
        return [one_rank(each, self.precision, measure, adds_up_in_parts=True) for each in self.folders]

    @functools.cached_property
    def limit(self):
        """For engines without a twin. In bf16 both may be as far off, on either side, as one rank is from fp32."""
        if self.precision == "fp32":
            return LOGPROB_LIMIT["fp32"]
        exact = [one_rank(each, "fp32", lambda engine: engine.score(self.prompts)) for each in self.folders]
        return 2 * max(largest_delta(*each) for each in zip(self.scores, exact, strict=True))


def make_lesson(folder, model, precision, tensor):
    start = make_tiny_model(model, folder / "start", dtype=DTYPES[precision])
    folders = tuple(shifted(start, folder / f"changed{seed}", seed=seed) for seed in (1, 2))
    prompts = prompts_for(tensor, VOCABULARY)
    measure = functools.partial(noise_floor, prompts=prompts)
    scores, noises = zip(*(one_rank(each, precision, measure) for each in folders), strict=True)
    return Lesson(precision, start, folders, prompts, scores, noises)


def one_rank(folder, precision, measure, adds_up_in_parts=False):
    """What `measure` says of a fresh engine of one rank."""
    fresh = Generator.build(folder, GenParallel(), GenOptions(dtype=DTYPES[precision]), BUILD_S)
    try:
        if adds_up_in_parts:
            TwoParts.install(fresh, tensors_of(folder))
        return measure(fresh)
    finally:
        fresh.close()


class TwoParts:
    """A row-parallel layer on one rank that computes what two ranks would, half of the columns each, and adds it up."""

    def __init__(self, weight):
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        self.halves = []
        for part in weight.chunk(2, dim=1):
            half = torch.nn.Module()
            half.weight = torch.nn.Parameter(part.contiguous(), requires_grad=False)
            dispatch_cpu_unquantized_gemm(half, remove_weight=False)
            self.halves.append(half)

    def apply(self, layer, x, bias):
        assert bias is None, f"{layer} has a bias"
        first, second = (
            half.cpu_linear(part.contiguous(), half.weight, None)
            for half, part in zip(self.halves, x.chunk(2, dim=-1), strict=True)
        )
        return added_up(first, second)

    @classmethod
    def install(cls, generator, tensors):
        from vllm.model_executor.layers.linear import RowParallelLinear

        model = generator._llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
        found = [(n, m) for n, m in model.named_modules() if isinstance(m, RowParallelLinear)]
        assert len(found) == 2 * len(model.model.layers), "the attention's output and down, of each layer"
        for name, module in found:
            module.quant_method = cls(tensors[f"{name}.weight"])


def added_up(first, second):
    """As vLLM 0.31 adds up between two ranks on a CPU.

    Its kernels for AVX-512 without instructions for bfloat16 cut off the bits that do not fit, all others round.
    """
    total = first.float() + second.float()
    if (
        first.dtype == torch.bfloat16
        and torch.cpu._is_avx512_supported()
        and not torch.cpu._is_avx512_bf16_supported()
    ):
        total = (total.view(torch.int32) & -(1 << 16)).view(torch.float32)
    return total.to(first.dtype)


def answers_of(generator, prompts):
    """(token, its logprob) that follows each prompt, greedily: also for prompts that are embeddings."""
    return [(s.tokens[0], s.logprobs[0]) for s in generator.generate(prompts, 1, 1, 0.0, 0)]


def two_refits(generator, parallel, lesson, first_version, device=None):
    """Yield (version's index, scores) after each refit; raises where one is not committed."""
    with Rounds(generator, tensors_of(lesson.start), parallel.num_ranks, device=device) as rounds:
        for index, folder in enumerate(lesson.folders):
            assert rounds.refit(first_version + index, tensors_of(folder))
            yield index, generator.score(lesson.prompts)


def require_parity(found, lesson, parallel, index):
    """Print what was measured; fail beyond the limit."""
    parity = compare(lesson.scores[index], found, lesson.noises[index], parallel.tensor)
    print(f"parity | {parallel} {lesson.precision} | refit {index + 1} | one rank to itself: {parity.noise}; "
          f"limit {lesson.limit:.2e} | length divides: {parity.divides} | does not: {parity.rest}")  # fmt: skip
    assert parity.gap.value <= lesson.limit, parity


def require_twin(found, lesson, parallel, index):
    """No further from the engine of one rank that takes the same sums than that one is from itself in a prefill.

    How far it is from one rank that adds up at once is printed beside that rank's noise, and not judged.
    """
    noise = lesson.noises[index]
    scores, own = (lesson.scores[index], noise) if parallel.tensor == 1 else lesson.twins[index]
    parity = compare(scores, found, own, parallel.tensor)
    plain = largest_delta(lesson.scores[index], found)
    where = "within" if plain <= noise.largest else "beyond"
    print(f"twin | {parallel} {lesson.precision} | refit {index + 1} | gap {parity.gap}; noise: {own} | "
          f"gap to one rank {plain:.2e}, {where} its noise: {noise}")  # fmt: skip
    assert parity.gap.value <= own.prefill, parity

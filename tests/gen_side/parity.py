"""The parity harness: after each of two refits an engine's log-probabilities against those of a fresh one of one rank.

The same on a CPU and on GPUs; only layouts, dtypes and devices differ.
"""

from dataclasses import dataclass

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

    `noise` is how far that engine is from itself in batches of other shapes, `limit` how far another layout may be from
    it: in bf16 twice as far as it is from the same weights in fp32, since both may be so far off, on either side.
    """

    precision: str
    start: object
    folders: tuple
    prompts: tuple
    scores: tuple
    noise: float
    limit: float


def make_lesson(folder, model, precision, tensor):
    start = make_tiny_model(model, folder / "start", dtype=DTYPES[precision])
    folders = tuple(shifted(start, folder / f"changed{seed}", seed=seed) for seed in (1, 2))
    prompts = prompts_for(tensor, VOCABULARY)
    scores, noises, roundings = [], [], []
    for each in folders:
        found, noise = one_rank(each, precision, lambda engine: noise_floor(engine, prompts))
        scores.append(found)
        noises.append(noise)
        if precision == "bf16":
            exact = one_rank(each, "fp32", lambda engine: engine.score(prompts))
            roundings.append(largest_delta(found, exact))
    limit = 2 * max(roundings) if roundings else LOGPROB_LIMIT["fp32"]
    return Lesson(precision, start, folders, prompts, tuple(scores), max(noises), limit)


def one_rank(folder, precision, measure):
    """What `measure` says of a fresh engine of one rank."""
    fresh = Generator.build(folder, GenParallel(), GenOptions(dtype=DTYPES[precision]), BUILD_S)
    try:
        return measure(fresh)
    finally:
        fresh.close()


def answers_of(generator, prompts):
    """(token, its logprob) that follows each prompt, greedily: also for prompts that are embeddings."""
    return [(s.tokens[0], s.logprobs[0]) for s in generator.generate(prompts, 1, 1, 0.0, 0)]


def two_refits(generator, parallel, lesson, first_version, device=None):
    """Yield (version's index, Parity) after each refit; raises where one is not committed."""
    with Rounds(generator, tensors_of(lesson.start), parallel.num_ranks, device=device) as rounds:
        for index, folder in enumerate(lesson.folders):
            assert rounds.refit(first_version + index, tensors_of(folder))
            found = generator.score(lesson.prompts)
            yield index, compare(lesson.scores[index], found, lesson.noise, parallel.tensor)


def require_parity(parity, lesson, name, index):
    """Print what was measured; fail beyond the limit."""
    print(f"parity | {name} {lesson.precision} | refit {index + 1} | one rank to itself {parity.noise:.2e}, "
          f"limit {lesson.limit:.2e} | length divides: {parity.divides} | does not: {parity.rest}")  # fmt: skip
    assert parity.gap.value <= lesson.limit, parity

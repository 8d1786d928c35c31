"""A refit of a real engine in the middle of its answers: which version sampled which token, by each pause policy."""

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from refit.gen_side.generator import Generator, GenOptions, GenParallel
from refit.train_side.tiny_models import make_tiny_model
from tests.gen_side.checkpoints import shifted, tensors_of
from tests.gen_side.rounds import Rounds

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PROMPTS = [[1, 2, 3, 4, 5], [200, 100, 50]]
LONG = 40
WAIT_S = 60.0
STEP_S = 0.05  # slow enough for a refit to come amid the answers


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pause")
    start = make_tiny_model("tiny-qwen3", folder / "start")
    changed = shifted(start, folder / "changed", seed=1)
    generator = Generator.build(start, GenParallel(), GenOptions(), 400.0)
    generator._stop_tokens = ()
    with Rounds(generator, tensors_of(start), 1) as rounds:
        yield generator, rounds, tensors_of(start), tensors_of(changed)
    generator.close()


def refit_amid_answers(case, pause, kv_cache, version):
    """Start greedy answers under `version`, refit to the next one amid them. Returns the samples and the old weights'
    own answers."""
    generator, rounds, start, changed = case
    assert rounds.refit(version, start)
    before = generator.generate(PROMPTS, 1, LONG, 0.0, 0)
    generator._options = dataclasses.replace(generator._options, pause=pause, kv_cache=kv_cache)
    step = generator._requests._step
    with ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator._requests, "_step", lambda: (step(), time.sleep(STEP_S)))
        answers = pool.submit(generator.generate, PROMPTS, 1, LONG, 0.0, 0)
        deadline_s = time.monotonic() + WAIT_S
        while len(generator._requests._answers) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.001)
        assert rounds.refit(version + 1, changed)
        return answers.result(WAIT_S), before


def test_kept_requests_go_on_and_each_token_carries_the_version_that_sampled_it(case):
    generator = case[0]
    started_s = time.monotonic()
    samples, before = refit_amid_answers(case, "keep", "clear", 10)
    assert 0.0 < generator.pause_s < time.monotonic() - started_s
    for prompt, sample, old in zip(PROMPTS, samples, before, strict=True):
        (first, num_old), (second, num_new) = sample.spans
        assert (first, second) == (10, 11) and num_old + num_new == len(sample.tokens) == LONG
        assert sample.tokens[:num_old] == old.tokens[:num_old], "sampled by the old weights"
        (again,) = generator.generate([[*prompt, *sample.tokens[:num_old]]], 1, num_new, 0.0, 0)
        assert again.spans == ((11, num_new),)
        assert again.tokens == sample.tokens[num_old:], "sampled by the new weights, keys and values anew"
        assert sample.tokens != old.tokens


@pytest.mark.slow
def test_kept_requests_can_keep_the_keys_and_values_of_the_old_weights(case):
    samples, _ = refit_amid_answers(case, "keep", "keep", 20)
    assert [[version for version, _ in sample.spans] for sample in samples] == [[20, 21]] * 2


@pytest.mark.slow
def test_awaited_requests_end_under_the_old_version(case):
    samples, before = refit_amid_answers(case, "wait", "clear", 30)
    assert [sample.spans for sample in samples] == [((30, LONG),)] * 2
    assert [sample.tokens for sample in samples] == [old.tokens for old in before]


class LateTurn:
    """A turn whose holder is slow to go on when he has given it back, as any thread may be."""

    def __init__(self, turn):
        self.acquire, self.release = turn.acquire, turn.release

    def __enter__(self):
        self.acquire()

    def __exit__(self, *_):
        self.release()
        time.sleep(0.02)


@pytest.mark.slow
def test_aborted_requests_are_asked_again_under_the_new_version(case, monkeypatch):
    generator = case[0]
    monkeypatch.setattr(generator._requests, "_turn", LateTurn(generator._requests._turn))
    samples, before = refit_amid_answers(case, "abort", "clear", 40)
    assert [sample.spans for sample in samples] == [((41, LONG),)] * 2
    again = generator.generate(PROMPTS, 1, LONG, 0.0, 0)
    assert [sample.tokens for sample in samples] == [new.tokens for new in again]
    assert [sample.tokens for sample in samples] != [old.tokens for old in before]

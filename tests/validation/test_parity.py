"""How two engines are compared: every token counts, and nothing that is not a number passes."""

import math
from dataclasses import dataclass

import pytest

from refit.validation.parity import CROWD, Noise, compare, decoded, largest_delta, noise_floor, prompts_for

NONE = Noise(0.0, 0.0, 0.0)


class Table:
    """Scores by token, and answers of tokens that count up; what is in a batch of some shape may be a little off."""

    def __init__(self, alone=0.0, crowded=0.0, decode=0.0):
        self.alone, self.crowded, self.decode = alone, crowded, decode
        self.asked = []
        self.answered = []

    def score(self, prompts):
        self.asked.append(tuple(prompts))
        shift = self.alone if len(prompts) == 1 else self.crowded if len(prompts) > 100 else 0.0
        return [[-0.5 * token + shift for token in prompt[1:]] for prompt in prompts]

    def generate(self, prompts, num_samples, max_tokens, temperature, seed):
        ((start,),) = prompts
        self.answered.append((num_samples, max_tokens, temperature, seed))
        tokens = tuple(range(start, start + max_tokens))
        return [Answer(tokens, tuple(-0.5 * token + self.decode for token in tokens))]


@dataclass(frozen=True)
class Answer:
    tokens: tuple
    logprobs: tuple


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_logprob_that_is_not_a_number_is_as_far_away_as_can_be(place):
    wanted, found = [[-1.0, -2.0], [-3.0]], [[-1.0, -2.25], [-3.0]]
    assert largest_delta(wanted, found) == 0.25
    found[place // 2][place % 2] = math.nan
    assert largest_delta(wanted, found) == math.inf
    assert compare(wanted, found, NONE, 2).gap.value == math.inf


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_the_prompts_have_lengths_that_the_tensor_parallel_size_divides_and_others(tensor):
    lengths = {len(prompt) for prompt in prompts_for(tensor, 256)}
    assert {length % tensor for length in lengths} == set(range(tensor))
    assert set(range(2, 4 * tensor + 1)) <= lengths
    assert prompts_for(tensor, 256) == prompts_for(tensor, 256) != prompts_for(tensor, 256, seed=1)


def test_the_noise_of_an_engine_is_what_other_batches_change_in_its_own_scores():
    prompts = prompts_for(2, 256)
    table = Table(alone=0.125, crowded=0.25, decode=0.5)
    scores, noise = noise_floor(table, prompts)
    assert noise == Noise(0.125, 0.25, 0.5) and noise.largest == 0.5 and scores == Table().score(prompts)
    assert {len(batch) for batch in table.asked} == {1, 2, len(prompts), CROWD * len(prompts)}
    assert noise_floor(Table(), prompts)[1] == NONE


def test_as_many_tokens_are_decoded_at_the_same_places_as_the_prompts_have_each_request_alone():
    prompts = prompts_for(2, 256)
    table = Table()
    prefilled, stepwise = decoded(table, prompts)
    assert [len(scores) for scores in stepwise] == [len(prompt) - 1 for prompt in prompts]
    assert prefilled == stepwise and [asked[:3] for asked in table.answered] == [
        (1, len(prompt) - 1, 1.0) for prompt in prompts
    ]
    assert len({seed for *_, seed in table.answered}) == len(prompts), "no two draw alike"
    (batch,) = table.asked
    assert [prompt[0] for prompt in batch] == [prompt[0] for prompt in prompts]


@pytest.mark.parametrize(("length", "divides"), [(8, True), (7, False)])
def test_the_gap_is_found_in_any_token_and_named_by_its_place_and_rank(length, divides):
    prompts = prompts_for(2, 256)
    wanted, found = Table().score(prompts), Table().score(prompts)
    prompt = next(at for at, one in enumerate(prompts) if len(one) == length)
    found[prompt][length - 2] += 1e-3  # the last token's, which the last row computes
    parity = compare(wanted, found, NONE, 2)
    assert parity.gap == (parity.divides if divides else parity.rest)
    assert (parity.gap.prompt, parity.gap.token, parity.gap.rank) == (prompt, length - 1, 1)
    assert parity.gap.value == pytest.approx(1e-3)
    other = parity.rest if divides else parity.divides
    assert other.value == 0.0


def test_scores_of_other_shapes_are_no_comparison():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        compare([[-1.0, -2.0], [-1.0]], [[-1.0], [-1.0]], NONE, 2)
    with pytest.raises(ValueError, match="1 scores for 2 prompts"):
        compare([[-1.0], [-1.0, -1.0]], [[-1.0]], NONE, 2)

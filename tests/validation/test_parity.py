"""How two engines are compared: every token counts, and nothing that is not a number passes."""

import math

import pytest

from refit.validation.parity import compare, largest_delta, noise_floor, prompts_for


class Table:
    """Scores by prompt; `shift` is added wherever a batch holds one prompt only."""

    def __init__(self, shift=0.0):
        self.shift = shift
        self.asked = []

    def score(self, prompts):
        self.asked.append(tuple(prompts))
        shift = self.shift if len(prompts) == 1 else 0.0
        return [[-0.5 * token + shift for token in prompt[1:]] for prompt in prompts]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_logprob_that_is_not_a_number_is_as_far_away_as_can_be(place):
    wanted, found = [[-1.0, -2.0], [-3.0]], [[-1.0, -2.25], [-3.0]]
    assert largest_delta(wanted, found) == 0.25
    found[place // 2][place % 2] = math.nan
    assert largest_delta(wanted, found) == math.inf
    assert compare(wanted, found, 0.0, 2).gap.value == math.inf


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_the_prompts_have_lengths_that_the_tensor_parallel_size_divides_and_others(tensor):
    lengths = {len(prompt) for prompt in prompts_for(tensor, 256)}
    assert {length % tensor for length in lengths} == set(range(tensor))
    assert set(range(2, 4 * tensor + 1)) <= lengths
    assert prompts_for(tensor, 256) == prompts_for(tensor, 256) != prompts_for(tensor, 256, seed=1)


def test_the_noise_of_an_engine_is_what_other_batches_change_in_its_own_scores():
    prompts = prompts_for(2, 256)
    table = Table(shift=0.125)
    scores, noise = noise_floor(table, prompts)
    assert noise == 0.125 and scores == Table().score(prompts)
    assert {len(batch) for batch in table.asked} == {1, 2, len(prompts)}
    assert noise_floor(Table(), prompts)[1] == 0.0


@pytest.mark.parametrize(("length", "divides"), [(8, True), (7, False)])
def test_the_gap_is_found_in_any_token_and_named_by_its_place_and_rank(length, divides):
    prompts = prompts_for(2, 256)
    wanted, found = Table().score(prompts), Table().score(prompts)
    prompt = next(at for at, one in enumerate(prompts) if len(one) == length)
    found[prompt][length - 2] += 1e-3  # the last token's, which the last row computes
    parity = compare(wanted, found, 0.0, 2)
    assert parity.gap == (parity.divides if divides else parity.rest)
    assert (parity.gap.prompt, parity.gap.token, parity.gap.rank) == (prompt, length - 1, 1)
    assert parity.gap.value == pytest.approx(1e-3)
    other = parity.rest if divides else parity.divides
    assert other.value == 0.0


def test_scores_of_other_shapes_are_no_comparison():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        compare([[-1.0, -2.0], [-1.0]], [[-1.0], [-1.0]], 0.0, 2)
    with pytest.raises(ValueError, match="1 scores for 2 prompts"):
        compare([[-1.0], [-1.0, -1.0]], [[-1.0]], 0.0, 2)

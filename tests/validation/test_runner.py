"""What a case is judged by."""

import math

import pytest

from refit.validation.runner import _largest_delta


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_logprob_that_is_not_a_number_is_as_far_away_as_can_be(place):
    wanted, found = [[-1.0, -2.0], [-3.0]], [[-1.0, -2.25], [-3.0]]
    assert _largest_delta(wanted, found) == 0.25
    found[place // 2][place % 2] = math.nan
    assert _largest_delta(wanted, found) == math.inf

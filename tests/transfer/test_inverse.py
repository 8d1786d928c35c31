"""What a loader made a function of, computed back and proved by computing it again."""

import pytest
import torch

from refit.transfer.inverse import RESOLUTION, replay, undo

STEPS = ("exp", "neg")  # Mamba's A = -exp(A_log)


def sample(dtype):
    random = torch.Generator().manual_seed(0)
    wide = torch.randn(4096, generator=random) * 4
    return torch.cat((wide, wide * 2.0**-6, torch.log(torch.arange(1.0, 17.0)))).to(dtype).float()


def test_values_of_bfloat16_come_back_bit_for_bit():
    values = sample(torch.bfloat16)
    values = values[values.abs() > 2.0**-13]
    found = undo(STEPS, replay(STEPS, values))
    assert len(values) > 8000 and torch.equal(found, values)


def test_other_values_come_back_as_near_as_what_is_stored_tells_and_load_as_it():
    values = torch.cat((sample(torch.float32), torch.linspace(-1e-6, 1e-6, 101), torch.zeros(1)))
    stored = replay(STEPS, values)
    found = undo(STEPS, stored)
    assert torch.equal(replay(STEPS, found), stored)
    assert not torch.equal(found, values), "float32 keeps less of small values behind an exponential"
    assert ((found.double() - values.double()).abs() <= RESOLUTION).all()


@pytest.mark.parametrize("stored", [1.0, float("nan"), float("-inf"), -0.0])
def test_what_no_finite_value_or_any_out_of_range_leads_to_is_not_made_up(stored):
    assert undo(STEPS, torch.tensor([-2.0, stored])) is None


def test_one_flipped_bit_of_what_is_stored_shows_in_what_comes_back_or_cannot_be_computed_back():
    stored = replay(STEPS, sample(torch.bfloat16))
    for place in range(0, len(stored), 97):
        flipped = stored.clone()
        flipped.view(torch.int32)[place] ^= 1
        found = undo(STEPS, flipped)
        assert found is None or not torch.equal(found, undo(STEPS, stored))

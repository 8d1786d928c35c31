"""A delta turns one state of a parcel into the next, bit for bit, in fewer bytes; nothing else can be read as one."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.transfer.delta.codec import BLOCK_ITEMS, HEADER, ITEM_BYTES, decode, encode
from refit.transfer.errors import TransportError


def as_array(tensor):
    return tensor.view(torch.uint8).numpy()


def changed(base, places, item_bytes):
    """The base with the lowest bit of these elements flipped."""
    new = base.copy()
    new[: new.size // item_bytes * item_bytes].view(f"u{item_bytes}")[places] ^= 1
    return new


def applied(base, new, item_bytes):
    """What a receiver makes of the base with what a sender made of both."""
    told = encode(new, base, item_bytes)
    if told is None:
        return new, new.size
    target = base.copy()
    decode(told, target, item_bytes)
    return target, told.size


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(ITEM_BYTES),
    st.sampled_from([0, 1, 2, 7, 100, BLOCK_ITEMS - 1, BLOCK_ITEMS, BLOCK_ITEMS + 1, 3 * BLOCK_ITEMS + 5]),
    st.sampled_from([0.0, 1e-4, 1e-3, 0.01, 0.1, 0.3, 0.7, 1.0]),
    st.integers(0, 7),
    st.integers(0, 2**32 - 1),
)
def test_a_delta_of_any_change_gives_the_new_bits_and_is_never_longer(
    item_bytes, num_items, share, odd, seed
):
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, num_items * item_bytes + odd % item_bytes, dtype=np.uint8)
    new = changed(base, rng.random(num_items) < share, item_bytes)
    if odd % item_bytes and share:
        new[-1] ^= 1
    found, num_bytes = applied(base, new, item_bytes)
    assert np.array_equal(found, new)
    assert num_bytes <= new.size and (num_bytes == 0 or share > 0 or new.size == 0)


@pytest.mark.parametrize("place", [0, BLOCK_ITEMS - 1, BLOCK_ITEMS, 3 * BLOCK_ITEMS + 4])
def test_one_changed_element_costs_the_headers_and_at_most_two_bytes_and_itself(place):
    base = np.zeros(2 * (3 * BLOCK_ITEMS + 5), dtype=np.uint8)
    found, num_bytes = applied(base, changed(base, [place], 2), 2)
    assert found[2 * place] == 1 and found.sum() == 1
    assert num_bytes <= 4 * HEADER.itemsize + 2 + 2


@pytest.mark.parametrize(("share", "most"), [(0.001, 0.0025), (0.01, 0.017), (0.1, 0.16), (0.3, 0.37)])
def test_changes_of_bfloat16_cost_little_more_than_their_values(share, most):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, 16 * BLOCK_ITEMS, dtype=np.uint8)
    new = changed(base, rng.random(base.size // 2) < share, 2)
    assert applied(base, new, 2)[1] <= most * new.size


def test_bits_are_compared_and_not_values():
    nan = torch.tensor([0x7FC0, 0x7FC1, 0x0000, 0x3F80] * 64, dtype=torch.int16).view(torch.bfloat16)
    assert nan.isnan().any()
    base, same = as_array(nan), as_array(nan.clone())
    assert encode(same, base, 2).size == 0
    other = nan.clone()
    other.view(torch.int16)[0], other[2] = 0x7FC5, -0.0  # another NaN, and a zero that equals the old one
    found, num_bytes = applied(base, as_array(other), 2)
    assert np.array_equal(found, as_array(other)) and 0 < num_bytes < 40


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.uint8, torch.bfloat16, torch.float32, torch.float64]
)
def test_every_item_size_has_deltas(dtype):
    base = torch.zeros(1000, dtype=torch.uint8).view(dtype)
    new = base.clone()
    new.view(torch.uint8)[[0, 503, 999]] = 77
    found, num_bytes = applied(as_array(base), as_array(new), dtype.itemsize)
    assert np.array_equal(found, as_array(new)) and num_bytes < 60


def a_delta():
    base = np.zeros(2 * (BLOCK_ITEMS + 3), dtype=np.uint8)
    return base, encode(changed(base, [5, 9, BLOCK_ITEMS + 1], 2), base, 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [("kind", 9), ("kind", 3), ("kind", 4), ("num_values", 1), ("num_values", 1 << 31), ("places_bytes", 3)],
)
def test_a_header_that_does_not_fit_is_refused(field, value):
    base, told = a_delta()
    told[: 2 * HEADER.itemsize].view(HEADER)[field][0] = value
    with pytest.raises(TransportError, match="a delta of 27 bytes for a parcel of 131078 cannot be read"):
        decode(told, base, 2)


def test_a_place_beyond_the_last_block_is_refused_and_nothing_outside_is_written():
    base, told = a_delta()
    told[2 * HEADER.itemsize + 2] = (
        3  # the gap before the only change of the second block, which has three elements
    )
    with pytest.raises(TransportError, match="its block 1 is not one of kind"):
        decode(told, base, 2)
    assert not base[2 * BLOCK_ITEMS :].any()


def test_a_delta_that_is_cut_off_is_refused():
    base, told = a_delta()
    for size in (1, HEADER.itemsize, told.size - 1):
        with pytest.raises(TransportError, match="cannot be read"):
            decode(told[:size].copy(), base, 2)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 90), st.sampled_from(ITEM_BYTES))
def test_any_bytes_are_either_refused_or_applied_inside_the_parcel(message, size, item_bytes):
    memory = np.zeros(size + 16, dtype=np.uint8)
    target = memory[8 : 8 + size]
    with contextlib.suppress(TransportError):
        decode(np.frombuffer(message, dtype=np.uint8), target, item_bytes)
    assert not memory[:8].any() and not memory[8 + size :].any()

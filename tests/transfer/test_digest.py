"""Properties of the digest, against a definition in plain Python integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.plan import PlanError, Region
from refit.transfer import digest as digest_module
from refit.transfer.digest import MASK, digest, row_products, whole_digest
from refit.transfer.memory import as_bits

DTYPES = (
    torch.uint8,
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int32,
    torch.int64,
)


def splitmix(dim: int, position: int) -> int:
    z = (position * 0x9E3779B97F4A7C15 + (dim + 1) * 0xD1B54A32D192ED03) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return (z ^ (z >> 31)) | 1


def defined_digest(tensor: torch.Tensor, region: Region) -> int:
    """The formula of the module's docstring, element by element."""
    item_bits = 8 * tensor.element_size()
    per_word = 64 // item_bits
    total = 0
    bits = as_bits(tensor)
    box = [range(start, stop) for start, stop in zip(region.starts, region.stops, strict=True)]
    for index in torch.cartesian_prod(*map(torch.tensor, box)).reshape(-1, len(box)).tolist():
        local = tuple(i - start for i, start in zip(index, region.starts, strict=True))
        value = int(bits[local].item()) & ((1 << item_bits) - 1)
        shift = item_bits * (index[-1] % per_word)
        weight = splitmix(len(box) - 1, index[-1] // per_word)
        for dim, i in enumerate(index[:-1]):
            weight *= splitmix(dim, i)
        total += (fold(value << shift) + fold(1 << shift)) * weight
    return total & MASK


def fold(word: int) -> int:
    signed = word - (1 << 64) if word >> 63 else word
    return signed + (signed >> 32)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    item_bytes = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, item_bytes), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)


def sub_region(data: st.DataObject, shape: tuple[int, ...]) -> Region:
    starts = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    stops = tuple(data.draw(st.integers(start + 1, size)) for start, size in zip(starts, shape, strict=True))
    return Region(starts, stops)


def cut(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    return tensor[tuple(slice(*span) for span in zip(region.starts, region.stops, strict=True))]


@settings(max_examples=60, deadline=None)
@given(shapes, dtypes, seeds, st.data())
def test_digest_equals_its_definition_on_any_box(shape, dtype, seed, data):
    tensor, region = random_tensor(shape, dtype, seed), sub_region(data, shape)
    part = cut(tensor, region)
    assert digest(part, region, shape) == defined_digest(part, region)


@settings(max_examples=80, deadline=None)
@given(shapes, dtypes, seeds, st.data())
def test_digests_of_any_partition_sum_to_the_digest_of_the_whole(shape, dtype, seed, data):
    tensor, region = random_tensor(shape, dtype, seed), sub_region(data, shape)
    whole = Region.whole(shape)
    parts = (region, *whole.subtract(region))
    total = sum(digest(cut(tensor, part), part, shape) for part in parts)
    assert total & MASK == digest(tensor, whole, shape)


@settings(max_examples=80, deadline=None)
@given(shapes, dtypes, seeds, st.data())
def test_digest_does_not_depend_on_strides(shape, dtype, seed, data):
    tensor = random_tensor(shape, dtype, seed)
    order = data.draw(st.permutations(range(len(shape))))
    inverse = sorted(range(len(shape)), key=lambda d: order[d])
    turned = as_bits(tensor).permute(*order).contiguous().permute(*inverse)
    shifted = torch.zeros(tensor.numel() + 3, dtype=as_bits(tensor).dtype)[3:].view(shape)
    shifted.copy_(as_bits(tensor))
    expected = digest(tensor, Region.whole(shape), shape)
    assert digest(turned, Region.whole(shape), shape) == expected
    assert digest(shifted, Region.whole(shape), shape) == expected


@settings(max_examples=80, deadline=None)
@given(shapes, dtypes, seeds, st.data())
def test_one_changed_bit_changes_the_digest(shape, dtype, seed, data):
    tensor = random_tensor(shape, dtype, seed)
    changed = tensor.clone()
    raw = as_bits(changed).reshape(-1).view(torch.uint8)
    raw[data.draw(st.integers(0, raw.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    whole = Region.whole(shape)
    assert digest(tensor, whole, shape) != digest(changed, whole, shape)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=3).map(tuple), dtypes, seeds, st.data())
def test_two_swapped_elements_change_the_digest(shape, dtype, seed, data):
    tensor = random_tensor(shape, dtype, seed)
    flat = as_bits(tensor).reshape(-1)
    first, second = data.draw(st.lists(st.integers(0, flat.numel() - 1), min_size=2, max_size=2, unique=True))
    flat[first] = flat[second] + 1
    before = digest(tensor, Region.whole(shape), shape)
    flat[first], flat[second] = flat[second].clone(), flat[first].clone()
    assert digest(tensor, Region.whole(shape), shape) != before


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bit_flipped_in_two_elements_changes_the_digest_whatever_the_bit_and_the_places(dtype):
    """Without the fold two flipped top bits of words add 2**63 twice, and nothing shows."""
    tensor = random_tensor((4, 16), dtype, 3)
    whole = Region.whole((4, 16))
    before = digest(tensor, whole, (4, 16))
    num_bytes, item_bytes = tensor.nbytes, tensor.element_size()
    for byte in range(item_bytes):
        for bit in (0, 6, 7):
            for second in range(item_bytes, num_bytes, item_bytes):
                changed = tensor.clone()
                raw = as_bits(changed).reshape(-1).view(torch.uint8)
                raw[byte] ^= 1 << bit
                raw[second + byte] ^= 1 << bit
                assert digest(changed, whole, (4, 16)) != before, f"bit {bit} of byte {byte}, and {second}"


def test_flipped_signs_of_every_fourth_element_change_the_digest():
    tensor = random_tensor((8, 64), torch.bfloat16, 4)
    flipped = tensor.clone()
    flipped[:, 3::4] *= -1
    whole = Region.whole((8, 64))
    assert digest(flipped, whole, (8, 64)) != digest(tensor, whole, (8, 64))


def test_a_transposed_matrix_has_another_digest():
    tensor = random_tensor((6, 6), torch.bfloat16, 0)
    whole = Region.whole((6, 6))
    assert digest(tensor, whole, (6, 6)) != digest(tensor.T, whole, (6, 6))


def test_a_missing_box_of_zeros_changes_the_sum():
    zeros = torch.zeros(4, 8, dtype=torch.bfloat16)
    half = Region((0, 0), (2, 8))
    assert digest(zeros, Region.whole((4, 8)), (4, 8)) != digest(zeros[:2], half, (4, 8))


def test_a_tensor_larger_than_a_chunk_is_summed_in_parts(monkeypatch):
    tensor = random_tensor((37, 5, 23), torch.bfloat16, 1)
    whole = Region.whole(tensor.shape)
    at_once = digest(tensor, whole, tensor.shape)
    monkeypatch.setattr(digest_module, "CHUNK_ELEMENTS", 50)
    assert digest(tensor, whole, tensor.shape) == at_once


def test_memory_that_begins_amid_a_word_is_digested_wherever_the_view_begins():
    values = torch.arange(64, dtype=torch.int16)
    wanted = whole_digest(values[:32])
    for skipped in range(4):
        shifted = torch.frombuffer(bytearray(2 * skipped + 128), dtype=torch.int16, offset=2 * skipped)
        shifted.copy_(values)
        assert whole_digest(shifted[:32]) == wanted
        for start in range(4):
            assert whole_digest(shifted[start:].clone()[:32]) == whole_digest(shifted[start : start + 32])


def test_scalars_and_empty_boxes_have_digests():
    scalar, vector = torch.tensor(3), torch.tensor([3])
    assert digest(scalar, Region((), ()), ()) == digest(vector, Region((0,), (1,)), (1,))
    assert digest(torch.empty(0, 4), Region((0, 0), (0, 4)), (3, 4)) == 0


@pytest.mark.parametrize(
    ("region", "shape"),
    [(Region((0, 0), (2, 3)), (4, 4)), (Region((0, 0), (2, 2)), (1, 4)), (Region((0, 0), (2, 2)), (4,))],
)
def test_a_region_that_does_not_fit_is_refused(region, shape):
    with pytest.raises(PlanError, match="region"):
        digest(torch.zeros(2, 2), region, shape)


@pytest.mark.parametrize(("num_rows", "size"), [(1, 5), (70_000, 1), (3, 32768), (2, 40_000), (40_000, 3)])
def test_products_of_folded_rows_are_those_of_whole_tensors_however_rows_are_cut(num_rows, size):
    words = torch.randint(-(2**63), 2**63 - 1, (num_rows, size + 2), dtype=torch.int64)[:, 1 : 1 + size]
    by = torch.randint(-(2**63), 2**63 - 1, (size,), dtype=torch.int64)
    expected = ((words + (words >> 32)) * by).sum(-1)
    assert torch.equal(row_products(words, by), expected)
    assert torch.equal(row_products(words.contiguous(), by), expected)

"""Where an engine's block scales lie in a trainer's, against brute force over every element."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.plan import Holding, Region
from refit.transfer.memory import strided_box
from refit.transfer.precision.formats import PrecisionError
from refit.transfer.precision.fp8 import BLOCK
from refit.transfer.precision.stored import BlockScales

TENSOR, EXPERTS = "a.q_proj.weight", "a.experts.*.up_proj.weight"
SIZES = (1, 64, 100, 128, 192, 256, 300)


@st.composite
def placed(draw, dim):
    """(start in the tensor, number, size of the tensor, start in the local matrix, size of that) along one dim."""
    number, rest = draw(st.sampled_from(SIZES)), draw(st.sampled_from((0, 64, 128)))
    start, first = draw(st.sampled_from((0, 64, 128, 256))), draw(st.sampled_from((0, 28, 64, 128, 384)))
    behind = draw(st.sampled_from((0, 64, 128)))
    return start, number, start + number + rest, first, first + number + behind


def has_one_scale_per_block(rows, columns):
    """By every pair of elements of each of the tensor's blocks: all here, and in one block of the local matrix."""
    for start, number, size, first, _ in (rows, columns):
        for block in range(start // 128, -(-(start + number) // 128)):
            members = range(block * 128, min(block * 128 + 128, size))
            if not all(start <= member < start + number for member in members):
                return False
            if len({(member - start + first) // 128 for member in members}) > 1:
                return False
    return True


@given(rows=placed(0), columns=placed(1), is_padded=st.booleans(), expert=st.sampled_from((None, 3)))
@settings(deadline=None, max_examples=300)
def test_scales_are_found_where_every_block_has_one_and_are_refused_elsewhere(
    rows, columns, is_padded, expert
):
    n, k = rows[4], columns[4]
    num_scales = (-(-n // 128), -(-k // 128))
    memory_shape = (num_scales[0], -(-num_scales[1] // 4) * 4) if is_padded else num_scales
    local = torch.full(memory_shape, -1.0)  # padding, which must never be read
    local[:, : num_scales[1]] = torch.arange(num_scales[0] * num_scales[1]).view(num_scales)
    region = Region((rows[0], columns[0]), (rows[0] + rows[1], columns[0] + columns[1]))
    shape, strides = (rows[2], columns[2]), (k, 1)
    if expert is not None:
        region = Region((expert, *region.starts), (expert + 1, *region.stops))
        shape, strides = (8, *shape), (1, *strides)
    name = TENSOR if expert is None else EXPERTS
    elements = Holding(name, region, "w", rows[3] * k + columns[3], strides)
    scales = BlockScales("w._rowwise_scale_inv", (n, k), memory_shape)
    if not has_one_scale_per_block(rows, columns):
        with pytest.raises(PrecisionError, match="block"):
            scales.of(elements, shape)
        return
    found = scales.of(elements, shape)
    assert found.tensor == f"{name}_scale_inv"
    values = strided_box(local, found.region.shape, found.strides, found.offset)
    for row in range(0, rows[1], 37):
        for column in range(0, columns[1], 41):
            at = (rows[0] + row) // 128, (columns[0] + column) // 128
            inside = tuple(a - b for a, b in zip(at, found.region.starts[-2:], strict=True))
            wanted = local[(rows[3] + row) // 128, (columns[3] + column) // 128]
            assert values.reshape(values.shape[-2:])[inside] == wanted


@pytest.mark.parametrize("memory_shape", [(2, 3), (2, 5), (3, 4), (1, 2), (4, 2)])
def test_scales_of_another_shape_than_the_blocks_or_their_padding_are_refused(memory_shape):
    assert BLOCK == (128, 128)
    with pytest.raises(PrecisionError, match=r"2 x 2 scales, with padding 2 x 4"):
        BlockScales("s", (200, 256), memory_shape)


@pytest.mark.parametrize(
    ("region", "strides"),
    [(Region((0, 0), (256, 128)), (1, 256)), (Region((0, 0, 0), (2, 128, 128)), (1, 128, 1))],
)
def test_a_transposed_matrix_or_a_stack_in_one_param_is_refused(region, strides):
    with pytest.raises(PrecisionError, match="row by row"):
        BlockScales("s", (256, 128), (2, 1)).of(Holding(TENSOR, region, "w", 0, strides), region.stops)

"""Copies of views as boxes of an HF tensor, against brute force over elements."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.gen_side.loader.views import MAX_BOXES, NotABox, View, boxes


def view_of(tensor):
    return View(tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))


@st.composite
def copies(draw):
    """(HF shape, source view, destination view): random views of a dense tensor, the destination any dense order."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    source = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["narrow", "transpose", "split", "flatten", "select", "step"]))
        dim = draw(st.integers(0, max(0, source.dim() - 1)))
        if source.dim() == 0 or 0 in source.shape:
            break
        size = source.shape[dim]
        if kind == "narrow":
            start = draw(st.integers(0, size - 1))
            source = source.narrow(dim, start, draw(st.integers(1, size - start)))
        elif kind == "transpose":
            source = source.transpose(dim, draw(st.integers(0, source.dim() - 1)))
        elif kind == "split" and size % 2 == 0:
            source = source.unflatten(dim, (2, size // 2))
        elif kind == "flatten" and source.is_contiguous():
            source = source.view(-1)
        elif kind == "select":
            source = source.select(dim, draw(st.integers(0, size - 1)))
        elif kind == "step" and size > 1:
            source = source[(slice(None),) * dim + (slice(None, None, 2),)]
    order = draw(st.permutations(range(source.dim())))
    memory = torch.empty([source.shape[d] for d in order] or [1])
    target = memory.permute([order.index(d) for d in range(source.dim())]) if source.dim() else memory[0]
    return tuple(shape), source, target


@settings(max_examples=400, deadline=None)
@given(copies())
def test_boxes_move_exactly_the_elements_that_the_copy_moves(copy):
    shape, source, target = copy
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    size = target.untyped_storage().nbytes() // 4
    expected = torch.full((size,), -1, dtype=torch.int64)
    torch.as_strided(expected, target.shape, target.stride(), target.storage_offset()).copy_(source)
    found = torch.full_like(expected, -1)
    for box in boxes(shape, view_of(source), view_of(target)):
        region = tuple(slice(a, b) for a, b in zip(box.starts, box.stops, strict=True))
        sizes = tuple(b - a for a, b in zip(box.starts, box.stops, strict=True))
        into = torch.as_strided(found, sizes, box.strides, box.offset)
        assert (into == -1).all(), "an element is written twice"
        into.copy_(whole[region])
    assert torch.equal(found, expected)


def test_halves_of_a_fused_projection_are_one_box_each():
    fused = torch.empty(8, 3)
    first, second = fused.chunk(2)
    target = View(0, (4, 3), (3, 1))
    assert [box.starts for box in boxes((8, 3), view_of(first), target)] == [(0, 0)]
    assert [box.starts for box in boxes((8, 3), view_of(second), target)] == [(4, 0)]


def test_interleaved_rows_are_one_box_per_row():
    rows = torch.empty(8, 3)[1::2]
    found = boxes((8, 3), view_of(rows), View(0, (4, 3), (3, 1)))
    assert [(box.starts, box.stops) for box in found] == [((r, 0), (r + 1, 3)) for r in (1, 3, 5, 7)]


def test_a_copy_of_too_many_pieces_is_refused():
    rows = torch.empty(4 * MAX_BOXES, 3)[::2]
    with pytest.raises(NotABox, match="boxes"):
        boxes((4 * MAX_BOXES, 3), view_of(rows), View(0, tuple(rows.shape), (3, 1)))


def test_an_empty_copy_has_no_box():
    assert boxes((4, 3), View(0, (0, 3), (3, 1)), View(0, (0, 3), (3, 1))) == ()

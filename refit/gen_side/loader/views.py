"""Strided views of one HF tensor as boxes of its index space. Pure integer arithmetic.

A loader copies one view of an HF tensor into one view of a parameter. Both views have the same sizes; they
differ in offset and strides. `boxes` turns such a pair into boxes of the HF tensor, each with the strided
memory of the parameter where its elements go.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

MAX_BOXES = 4096
"""More pieces than this for one copy cost more in the plan than a packed broadcast of the tensor."""


class NotABox(ValueError):  # noqa: N818 - a finding about a layout, handled by the caller
    """The copied elements are not a bounded number of boxes of the HF tensor."""


@dataclass(frozen=True, slots=True)
class View:
    """Element (i_0, i_1, ...) of a view lives at flat element offset + sum(i_d * strides_d)."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """HF indices [starts, stops) and, in elements of the parameter, where index i lives:
    offset + sum((i_d - starts_d) * strides_d)."""

    starts: tuple[int, ...]
    stops: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(b - a for a, b in zip(self.starts, self.stops, strict=True))


@dataclass(frozen=True, slots=True)
class _Axis:
    """One dim of both views: `size` steps of `src` elements in the HF tensor, `dst` in the parameter."""

    size: int
    src: int
    dst: int


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides of a dense tensor, in elements."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


@lru_cache(maxsize=1 << 16)  # layers repeat: 60 layers of 256 experts have 2,000 distinct copies
def boxes(shape: tuple[int, ...], src: View, dst: View) -> tuple[Box, ...]:
    """Boxes of a dense HF tensor of `shape` that a copy of view `src` into view `dst` fills.

    `src` counts elements of the HF tensor, `dst` elements of the parameter; their sizes are equal. Raises
    NotABox when the elements do not fall into at most MAX_BOXES boxes.
    """
    if src.sizes != dst.sizes:
        raise NotABox(f"a copy of sizes {src.sizes} into sizes {dst.sizes} is not element by element")
    if 0 in src.sizes:
        return ()
    dense = contiguous_strides(shape)
    start = _unravel(src.offset, shape, dense)
    by_dim: list[list[_Axis]] = [[] for _ in shape]
    loops: list[_Axis] = []
    for size, s, t in zip(src.sizes, src.strides, dst.strides, strict=True):
        if size > 1:
            _place(_Axis(size, s, t), shape, dense, start, by_dim, loops)
    extents: list[tuple[int, int]] = []
    for dim, axes in enumerate(by_dim):
        extents.append(_merge(axes, dense[dim], loops))
    return _enumerate(shape, dense, src.offset, dst.offset, extents, loops)


def _unravel(flat: int, shape: tuple[int, ...], dense: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(flat // stride % size for size, stride in zip(shape, dense, strict=True))


def _place(
    axis: _Axis,
    shape: tuple[int, ...],
    dense: tuple[int, ...],
    start: tuple[int, ...],
    by_dim: list[list[_Axis]],
    loops: list[_Axis],
) -> None:
    """File one axis under the HF dim it walks, cutting it where it walks over several."""
    dim = next((d for d, stride in enumerate(dense) if stride <= axis.src and shape[d] > 1), None)
    if dim is None or axis.src == 0 or axis.src % dense[dim]:
        loops.append(axis)
        return
    step = axis.src // dense[dim]
    if start[dim] + (axis.size - 1) * step < shape[dim]:
        by_dim[dim].append(axis)
        return
    inner = shape[dim] // step
    if shape[dim] % step or axis.size % inner or start[dim] >= step or inner < 2:
        loops.append(axis)
        return
    by_dim[dim].append(_Axis(inner, axis.src, axis.dst))
    outer = _Axis(axis.size // inner, dense[dim] * shape[dim], axis.dst * inner)
    _place(outer, shape, dense, start, by_dim, loops)


def _merge(axes: list[_Axis], unit: int, loops: list[_Axis]) -> tuple[int, int]:
    """(extent, parameter stride) of one HF dim; what does not join one unit-step run becomes a loop."""
    size, dst = 1, 0
    for axis in sorted(axes, key=lambda a: a.src):
        if size == 1 and axis.src == unit:
            size, dst = axis.size, axis.dst
        elif size > 1 and axis.src == unit * size and axis.dst == dst * size:
            size *= axis.size
        else:
            loops.append(axis)
    return size, dst


def _enumerate(
    shape: tuple[int, ...],
    dense: tuple[int, ...],
    src_offset: int,
    dst_offset: int,
    extents: list[tuple[int, int]],
    loops: list[_Axis],
) -> tuple[Box, ...]:
    count = math.prod(axis.size for axis in loops)
    if count > MAX_BOXES:
        raise NotABox(f"the copy falls into {count} boxes, more than {MAX_BOXES}")
    found = []
    for index in itertools.product(*(range(axis.size) for axis in loops)):
        src = src_offset + sum(i * axis.src for i, axis in zip(index, loops, strict=True))
        dst = dst_offset + sum(i * axis.dst for i, axis in zip(index, loops, strict=True))
        starts = _unravel(src, shape, dense)
        stops = tuple(b + n for b, (n, _) in zip(starts, extents, strict=True))
        if any(stop > size for stop, size in zip(stops, shape, strict=True)):
            raise NotABox(f"indices {starts}..{stops} leave the tensor of shape {shape}")
        found.append(Box(starts, stops, dst, tuple(stride for _, stride in extents)))
    return tuple(found)

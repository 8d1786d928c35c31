"""What the kernels must do, with torch views: any device, no launch table, one view per box."""

from collections.abc import Sequence

import torch
from torch import Tensor

from refit.plan import Region
from refit.transfer.digest import MASK, digest
from refit.transfer.kernels.table import Box
from refit.transfer.memory import copy_cast, strided_box


def pack(boxes: Sequence[Box], params: Sequence[Tensor], payload: Tensor) -> None:
    """Fill the bucket `payload` (uint8, one dim) from the params, cast to the wire dtype. Gaps are left alone."""
    for box in boxes:
        copy_cast(packed_box(box, payload), param_box(box, params))


def unpack(boxes: Sequence[Box], params: Sequence[Tensor], payload: Tensor) -> None:
    """Fill the boxes of the params from the bucket."""
    for box in boxes:
        copy_cast(param_box(box, params), packed_box(box, payload))


def add_digests(boxes: Sequence[Box], views: Sequence[Tensor], sums: Tensor) -> None:
    """Add the digest of each view to the sum of its box; `sums` holds wrapped int64."""
    for box, view in zip(boxes, views, strict=True):
        stops = tuple(start + size for start, size in zip(box.starts, box.shape, strict=True))
        value = (int(sums[box.sum_index]) + digest(view, Region(box.starts, stops), stops)) & MASK
        sums[box.sum_index] = value - (1 << 64) if value >> 63 else value


def param_box(box: Box, params: Sequence[Tensor]) -> Tensor:
    """The box in its param, as a view."""
    return strided_box(params[box.param], box.shape, box.strides, box.offset)


def packed_box(box: Box, payload: Tensor) -> Tensor:
    """The box in the bucket, as a view of the wire dtype."""
    num_bytes = torch.Size(box.shape).numel() * box.wire.itemsize
    return payload[box.start_byte : box.start_byte + num_bytes].view(box.wire).view(box.shape)

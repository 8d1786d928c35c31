"""What the bulk path calls on CUDA: tables of one parcel, made once per plan, and one launch per copy or digest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refit.plan import Segment
from refit.transfer.kernels import triton_bucket
from refit.transfer.kernels.table import WIDE_BYTES, Box, DigestTable, Table, copy_table, digest_table


@dataclass(frozen=True, slots=True)
class Params:
    """The params of a stage by name: their numbers in the list of base addresses, and their dtypes."""

    numbers: Mapping[str, int]
    dtypes: Mapping[str, torch.dtype]


@dataclass(frozen=True, slots=True)
class ParcelKernels:
    """Tables of one parcel. Without `copies` the parcel is its only segment's own memory, and nothing is packed."""

    copies: Table | None
    digests: DigestTable

    @classmethod
    def of(
        cls,
        segments: Sequence[Segment],
        first_byte: int,
        params: Params,
        sums: Sequence[int],
        device: torch.device,
        *,
        is_direct: bool,
    ) -> "ParcelKernels":
        """`segments` lie in the parcel at their start_byte less `first_byte`; sums[i] is the sum of segments[i]."""
        boxes = [
            Box.of(
                segment,
                params.numbers[segment.param],
                params.dtypes[segment.param],
                segment.start_byte - first_byte,
                index,
            )
            for segment, index in zip(segments, sums, strict=True)
        ]
        digests = digest_table(boxes, device, of_bucket=not is_direct)
        return cls(None if is_direct else copy_table(boxes, device), digests)

    def copy(self, bases: Tensor, payload: Tensor, is_pack: bool) -> None:
        """Fill the payload from the params, or the params from it, on the current stream."""
        if self.copies is not None:
            (triton_bucket.pack if is_pack else triton_bucket.unpack)(self.copies, bases, payload)

    def add_digests(self, bases: Tensor, payload: Tensor, sums: Tensor) -> None:
        """Add the digest of each segment, as the payload holds it, to its sum (wrapped int64 on the device)."""
        triton_bucket.add_digests(self.digests, bases, payload, sums)


def bases_of(addresses: Tensor, device: torch.device) -> Tensor | None:
    """Addresses of params, on the device; None if one is not 16-byte aligned, as a view into another may be.

    The caller then copies with torch, which takes any alignment.
    """
    if bool((addresses % WIDE_BYTES).any()):
        return None
    return addresses.to(device)

"""Pack, unpack and digest of a bucket in one Triton launch each. Importing it needs the package `triton`.

Written for CUDA and tested, bit for bit against `reference`, under Triton's interpreter (TRITON_INTERPRET=1) on a CPU;
it has not been run on a GPU. Every param in a table is reached by address, so the caller keeps the tensors alive.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from refit.plan import PlanError
from refit.transfer.kernels.programs import copy_kernel, digest_kernel
from refit.transfer.kernels.table import (
    COPY_BLOCK,
    DIGEST_BLOCK,
    DIGEST_STEPS,
    WIDE_BYTES,
    DigestTable,
    Table,
)

NUM_WARPS = 4


def base_addresses(params: Sequence[Tensor], device: torch.device) -> Tensor:
    """Where each param begins, for tables compiled with 16-byte alignment. Raises PlanError for one that is not."""
    addresses = [param.data_ptr() for param in params]
    for number, address in enumerate(addresses):
        if address % WIDE_BYTES:
            raise PlanError(
                f"param {number} begins at address {address:#x}, which is not a multiple of {WIDE_BYTES}; "
                "compile its tables with a smaller alignment_bytes"
            )
    return torch.tensor(addresses, dtype=torch.int64).to(device)


def pack(table: Table, bases: Tensor, payload: Tensor) -> None:
    """Fill the bucket from the params."""
    _copy(table, bases, payload, is_pack=True)


def unpack(table: Table, bases: Tensor, payload: Tensor) -> None:
    """Fill the boxes of the params from the bucket."""
    _copy(table, bases, payload, is_pack=False)


def add_digests(digests: DigestTable, bases: Tensor, payload: Tensor, sums: Tensor) -> None:
    """Add the digest of every box to its sum (wrapped int64)."""
    table = digests.table
    if table.num_tiles:
        digest_kernel[(table.num_tiles,)](
            bases,
            payload,
            table.rows,
            table.tile_rows,
            digests.weights,
            sums,
            FIELDS=table.rows.shape[1],
            BLOCK=DIGEST_BLOCK,
            STEPS=DIGEST_STEPS,
            num_warps=NUM_WARPS,
        )


def _copy(table: Table, bases: Tensor, payload: Tensor, is_pack: bool) -> None:
    if table.num_tiles:
        copy_kernel[(table.num_tiles,)](
            bases,
            payload,
            table.rows,
            table.tile_rows,
            IS_PACK=is_pack,
            FIELDS=table.rows.shape[1],
            BLOCK=COPY_BLOCK,
            num_warps=NUM_WARPS,
        )

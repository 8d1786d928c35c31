"""FP8 e4m3 in blocks of 128 x 128 with an fp32 scale each, as vLLM 0.31 stores it (`weight`, `weight_scale_inv`).

scale_inv = max(largest magnitude in the block, 1e-4) / 448; element = round(x * (1 / scale_inv)). Both in fp32, in this
order: it decides the last bit, and is the order of vLLM's own quantizer (`vllm.utils.deep_gemm.per_block_cast_to_fp8`).
The last blocks of a row or column may be ragged; what is missing counts as zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from refit.transfer.precision.blocks import block_maxima, blocked, unblocked
from refit.transfer.precision.formats import WEIGHT, Cell, Format, Part

BLOCK: Cell = (128, 128)
FP8_BLOCK = Format(
    name="fp8",
    parts=(Part(WEIGHT, "float8_e4m3fn", (1, 1)), Part("weight_scale_inv", "float32", BLOCK)),
    shared=BLOCK,
    unit=(1, 1),
)
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_SMALLEST_MAXIMUM = 1e-4


class Fp8Block:
    """The codec. A piece is any box [..., n, k] of a matrix; `at` is the (row, column) where it begins."""

    format = FP8_BLOCK

    def maxima(self, piece: Tensor, at: Cell) -> Tensor:
        """Largest magnitudes, fp32, of the blocks that the piece touches, as far as it holds them."""
        return block_maxima(piece, at, BLOCK)

    def encode(self, piece: Tensor, at: Cell, maxima: Tensor) -> tuple[Tensor, ...]:
        """(elements [..., n, k], scales of the touched blocks), given the agreed `maxima` of those blocks."""
        scale = maxima.clamp(min=_SMALLEST_MAXIMUM) / _LARGEST
        cells = blocked(piece, at, BLOCK)
        scaled = cells * (1.0 / scale)[..., :, None, :, None]
        return unblocked(scaled.to(torch.float8_e4m3fn), at, piece.shape), scale

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The matrix that a whole quantized matrix stands for."""
        data, scale = parts
        cells = blocked(data, (0, 0), BLOCK).float() * scale[..., :, None, :, None]
        return unblocked(cells, (0, 0), data.shape).to(dtype)

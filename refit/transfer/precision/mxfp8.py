"""MXFP8: e4m3 elements in groups of 32 along a row, one power-of-two scale (E8M0, a biased exponent) per group.

exponent = ceil(log2(largest magnitude / 448)), stored + 127 in a byte; element = round(x / 2**exponent). That is what
vLLM 0.31 does to weights (`mxfp8_e4m3_quantize`), bit for bit. vLLM loads scales in rows (`weight_scale`, uint8) and
swizzles them afterwards in its own processing, so that rows are what a refit carries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from refit.transfer.precision.blocks import block_maxima, blocked, unblocked
from refit.transfer.precision.formats import WEIGHT, Cell, Format, Part

GROUP: Cell = (1, 32)
MXFP8 = Format(
    name="mxfp8",
    parts=(Part(WEIGHT, "float8_e4m3fn", (1, 1)), Part("weight_scale", "uint8", GROUP)),
    shared=GROUP,
    unit=GROUP,
)
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_TINY = torch.finfo(torch.float32).tiny
_BIAS = 127
_LARGEST_EXPONENT = 254


class Mxfp8:
    """The codec; pieces as in `Fp8Block`, but made of whole groups."""

    format = MXFP8

    def maxima(self, piece: Tensor, at: Cell) -> Tensor:
        """Largest magnitude of each group, fp32."""
        return block_maxima(piece, at, GROUP)

    def encode(self, piece: Tensor, at: Cell, maxima: Tensor) -> tuple[Tensor, ...]:
        """(elements [..., n, k], biased exponents [..., n, k / 32])."""
        exponent = torch.ceil(torch.log2(maxima.clamp(min=_TINY) / _LARGEST)) + _BIAS
        exponent = exponent.clamp(0, _LARGEST_EXPONENT)
        scaled = blocked(piece, at, GROUP).float() / torch.exp2(exponent - _BIAS)[..., :, None, :, None]
        return unblocked(scaled.to(torch.float8_e4m3fn), at, piece.shape), exponent.to(torch.uint8)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The matrix that a whole quantized matrix stands for; in float64, since 448 * 2**120 exceeds float32."""
        data, exponent = parts
        scale = torch.exp2(exponent.double() - _BIAS)
        cells = blocked(data, (0, 0), GROUP).double() * scale[..., :, None, :, None]
        return unblocked(cells, (0, 0), data.shape).to(dtype)

"""NVFP4: e2m1 elements, two to a byte (the even column in the low half), in groups of 16 along a row.

Two levels of scales: one fp32 per matrix (`weight_scale_2` = largest magnitude / (6 * 448)), and an e4m3 per group
(`weight_scale`), in units of the first. The arithmetic is that of vLLM's reference quantizer (`ref_nvfp4_quant`); the
GPU kernels' approximate reciprocals may differ from it in the last bit of a group's scale.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from refit.transfer.precision.blocks import block_maxima, blocked, unblocked
from refit.transfer.precision.formats import WEIGHT, WHOLE, Cell, Format, Part

GROUP: Cell = (1, 16)
NVFP4 = Format(
    name="nvfp4",
    parts=(
        Part(WEIGHT, "uint8", (1, 2)),
        Part("weight_scale", "float8_e4m3fn", GROUP),
        Part("weight_scale_2", "float32", WHOLE),
    ),
    shared=WHOLE,
    unit=GROUP,
)
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the low three bits of an element stand for; the fourth is the sign."""
_LARGEST_E2M1 = MAGNITUDES[-1]
_LARGEST_E4M3 = torch.finfo(torch.float8_e4m3fn).max
_SMALLEST_MAXIMUM = 1e-8
_ALMOST_ZERO = 1e-8
_BORDERS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_GOES_DOWN = (True, False, True, False, True, False, True)  # ties go to the even code


class Nvfp4:
    """The codec; pieces as in `Fp8Block`, but made of whole groups. The maxima are one per matrix."""

    format = NVFP4

    def maxima(self, piece: Tensor, at: Cell) -> Tensor:  # noqa: ARG002 - where it lies does not matter
        """[...] fp32: the largest magnitude of the piece, one number per matrix."""
        return piece.abs().float().amax(dim=(-2, -1))

    def encode(self, piece: Tensor, at: Cell, maxima: Tensor) -> tuple[Tensor, ...]:
        """(pairs of elements [..., n, k / 2], group scales [..., n, k / 16], scale of the matrix [...])."""
        unit = (_LARGEST_E2M1 * _LARGEST_E4M3) / maxima.clamp(min=_SMALLEST_MAXIMUM)
        unit_per_group = unit[..., None, None]
        group = unit_per_group * (block_maxima(piece, at, GROUP) * (1 / _LARGEST_E2M1))
        scale = group.clamp(max=_LARGEST_E4M3).to(torch.float8_e4m3fn)
        factor = _reciprocal(scale.float() * _reciprocal(unit_per_group))
        scaled = blocked(piece, at, GROUP).float() * factor[..., :, None, :, None]
        codes = _codes(unblocked(scaled, at, piece.shape))
        return codes[..., 0::2] | codes[..., 1::2] << 4, scale, 1.0 / unit

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The matrix that a whole quantized matrix stands for."""
        pairs, scale, scale_2 = parts
        values = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], device=pairs.device)
        codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)
        step = scale.float() * scale_2[..., None, None]
        cells = blocked(values[codes.long()], (0, 0), GROUP) * step[..., :, None, :, None]
        return unblocked(cells, (0, 0), codes.shape).to(dtype)


def _codes(scaled: Tensor) -> Tensor:
    """The nearest e2m1 code of each value, uint8; beyond 6 it is 6."""
    size = scaled.abs()
    codes = torch.zeros(scaled.shape, dtype=torch.uint8, device=scaled.device)
    for border, goes_down in zip(_BORDERS, _GOES_DOWN, strict=True):
        codes += (size > border) if goes_down else (size >= border)
    return codes | (scaled < 0).to(torch.uint8) << 3


def _reciprocal(x: Tensor) -> Tensor:
    """1 / x; for 0 a tiny number, with which a group whose scale rounds to zero becomes zeros that keep their signs."""
    return torch.where(x == 0, _ALMOST_ZERO, 1.0 / x)

"""The codecs by name, and whole matrices through them."""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from refit.transfer.precision.formats import Cell, Format, PrecisionError
from refit.transfer.precision.fp8 import Fp8Block
from refit.transfer.precision.mxfp8 import Mxfp8
from refit.transfer.precision.nvfp4 import Nvfp4


class Codec(Protocol):
    """What every format can do with a piece [..., n, k] of a matrix that begins at (row, column) `at`."""

    @property
    def format(self) -> Format: ...

    def maxima(self, piece: Tensor, at: Cell) -> Tensor: ...

    def encode(self, piece: Tensor, at: Cell, maxima: Tensor) -> tuple[Tensor, ...]: ...

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor: ...


CODECS: MappingProxyType[str, Codec] = MappingProxyType(
    {codec.format.name: codec for codec in (Fp8Block(), Mxfp8(), Nvfp4())}
)


def codec_of(name: str) -> Codec:
    """The codec of a format. Raises PrecisionError for a name that none has."""
    if name not in CODECS:
        raise PrecisionError(f"no format is called {name!r}; there are {', '.join(CODECS)}")
    return CODECS[name]


def quantize(name: str, matrix: Tensor) -> tuple[Tensor, ...]:
    """The parts of a whole matrix [..., N, K], in the order of the format."""
    codec = codec_of(name)
    return codec.encode(matrix, (0, 0), codec.maxima(matrix, (0, 0)))


def dequantize(name: str, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The matrix that the parts stand for."""
    return codec_of(name).decode(parts, dtype)

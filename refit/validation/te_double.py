"""A test double for the one thing of Transformer Engine that a refit reads: a parameter stored in FP8 blocks.

Transformer Engine itself needs a GPU. `BlockParamDouble` has the attributes of its `Float8BlockwiseQTensor`, padded
rows of scales included; where that decodes itself, the double has the bf16 values that it was made from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from refit.transfer.precision.codecs import quantize
from refit.transfer.precision.fp8 import BLOCK
from refit.transfer.precision.stored import PADDED_TO

LINEAR = re.compile(r".*\.linear_(qkv|proj|fc1|fc2)\.weight")
"""The matrices that Transformer Engine would store so: not embeddings, routers, norms and the output layer."""


class BlockParamDouble(torch.nn.Parameter):
    """Made from a bf16 parameter; `quantize_` after each change of its values."""

    _rowwise_data: Tensor
    _rowwise_scale_inv: Tensor

    @classmethod
    def of(cls, param: torch.nn.Parameter) -> BlockParamDouble:
        made = cls(param.data, requires_grad=param.requires_grad)
        made.__dict__.update(param.__dict__)  # Megatron's marks of how it is cut
        made.quantize_()
        return made

    def quantize_(self) -> None:
        """As Transformer Engine's optimizer step does: elements and scales anew, padding full of rubbish."""
        elements, scales = quantize("fp8", self.detach().as_subclass(Tensor))
        padded = torch.full((scales.shape[0], -(-scales.shape[1] // PADDED_TO) * PADDED_TO), torch.nan)
        padded[:, : scales.shape[1]] = scales
        self._rowwise_data, self._rowwise_scale_inv = elements.view(torch.uint8), padded

    def get_metadata(self) -> dict[str, Any]:
        """The entries that Bridge reads, too."""
        return {
            "rowwise_data": self._rowwise_data,
            "rowwise_scale_inv": self._rowwise_scale_inv,
            "quantizer": SimpleNamespace(block_len=BLOCK[0]),
            "is_2D_scaled": True,
        }


def store_in_blocks(chunks: Iterable[torch.nn.Module]) -> None:
    """Replace the linear layers' matrices of a Megatron model, on this rank, by doubles of the same values."""
    for chunk in chunks:
        for name, param in tuple(chunk.named_parameters()):
            if LINEAR.fullmatch(name):
                owner, _, last = name.rpartition(".")
                setattr(chunk.get_submodule(owner), last, BlockParamDouble.of(param))


def quantize_anew(params: Iterable[Tensor]) -> None:
    """After the values of some parameters changed."""
    for param in params:
        if isinstance(param, BlockParamDouble):
            param.quantize_()

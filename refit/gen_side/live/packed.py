"""Reading the weights that the kernels really use, also where vLLM has packed them away (vLLM 0.31, CPU).

On the CPU a linear layer may hand its weight to oneDNN and keep a parameter of shape [0]; a language-model head
keeps the parameter and computes with a packed copy. The packed weight is read back by multiplying with unit
vectors: `x_k @ W^T` is column k of W exactly (one product by 1, the rest by 0), but for the sign of a zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

UNIT_ROWS = 256
MAX_READ_MACS = 1 << 36
"""A packed weight that needs more multiply-adds than this to read (34 s at 2 GMAC/s) is left unread."""


def is_packed_away(module: torch.nn.Module) -> bool:
    """True if the layer computes with memory that its `weight` parameter no longer shows."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.numel() == 0 and hasattr(module, "cpu_linear")


def has_packed_copy(module: torch.nn.Module) -> bool:
    """True for a head that keeps its weight and may compute with a packed copy of it."""
    return isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear")


def packed_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name of the weight, module) of every layer that computes with packed memory."""
    for name, module in model.named_modules():
        if is_packed_away(module) or has_packed_copy(module):
            yield f"{name}.weight", module


def read_packed(module: torch.nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
    """The weight [N, K] that the layer multiplies with; zeros come back as +0. None above MAX_READ_MACS."""
    num_rows, num_columns = shape
    if num_rows * num_columns * num_columns > MAX_READ_MACS:
        return None
    found = torch.empty(shape, dtype=dtype)
    weight = module._parameters["weight"]
    with torch.no_grad():
        for start in range(0, num_columns, UNIT_ROWS):
            stop = min(start + UNIT_ROWS, num_columns)
            unit = torch.zeros(stop - start, num_columns, dtype=dtype)
            unit[torch.arange(stop - start), torch.arange(start, stop)] = 1
            found[:, start:stop] = module.cpu_linear(unit, weight, None).t()
    return found

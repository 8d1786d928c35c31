"""Packing weights ahead of a commit, beside the live model, where vLLM packs at all (vLLM 0.31, CPU).

On the CPU vLLM hands each linear weight to a library that packs it into memory of its own: three quarters of a commit.
That needs the staged tensors only, so it is done on a twin of the module while the old version serves; the commit then
takes the twin's result over (`switch`). Elsewhere the processing of plain weights is empty, and nothing is done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform

PACKED = "cpu_linear"


def may_pack_ahead(module: torch.nn.Module, staged: Mapping[str, torch.Tensor]) -> bool:
    """True where vLLM's processing reads the module's own weight and bias and sets `cpu_linear`, and nothing else."""
    method = getattr(module, "quant_method", None)  # only some modules have one
    if not current_platform.is_cpu() or type(method) not in (
        UnquantizedLinearMethod,
        UnquantizedEmbeddingMethod,
    ):
        return False
    is_matrix = "weight" in staged and staged["weight"].ndim == 2  # convolutions are packed in another way
    return is_matrix and hasattr(module, PACKED) and not hasattr(module, "_cpu_skip_gemm_dispatch")


def pack_ahead(module: torch.nn.Module, staged: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A twin of `module` with the `staged` tensors, processed by vLLM's own code. The module is not touched."""
    twin = torch.nn.Module()
    for name, tensor in staged.items():
        if isinstance(tensor, torch.nn.Parameter):
            twin.register_parameter(name, tensor)
        else:
            twin.register_buffer(name, tensor)
    method: Any = module.quant_method
    with torch.no_grad():
        method.process_weights_after_loading(twin)
    return twin

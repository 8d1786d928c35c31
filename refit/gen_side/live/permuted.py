"""Expert weights that a CPU kernel keeps permuted in memory of the same shape, back in the loader's order (vLLM 0.31).

vLLM's own prepacking moves elements and computes nothing. So it is run once on a matrix whose elements are numbered,
which says where each element of such a matrix lies; the live memory is then read through that table.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

FIRST, SECOND = "w13_weight", "w2_weight"
TAG_BITS = 15
"""Bits of a number that one element carries: no pattern of them is a NaN in 16 bits."""


def is_prepacked(module: torch.nn.Module, name: str) -> bool:
    """True if this parameter of the module is one that vLLM's CPU kernel for experts has permuted."""
    if name not in (FIRST, SECOND) or not isinstance(module, RoutedExperts):
        return False
    kernel = getattr(module.quant_method, "moe_kernel", None)  # methods without a kernel keep what was loaded
    experts = None if kernel is None else kernel.fused_experts
    return isinstance(experts, CPUUnquantizedExperts) and not experts._use_zentorch


def unpacked(module: RoutedExperts, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The parameter as it was loaded, [experts, ...] of `shape`: permutation undone, added columns or rows left out."""
    live = module._parameters[name].detach()
    place = _places(tuple(live.shape[1:]), live.dtype, module.quant_method.moe_kernel.fused_experts.isa)
    whole = live.reshape(live.shape[0], -1)[:, place].reshape(live.shape)
    if tuple(live.shape) == shape:
        return whole
    if name == SECOND:
        return whole[:, :, : shape[2]].contiguous()
    half, padded = shape[1] // 2, live.shape[1] // 2
    return torch.cat((whole[:, :half], whole[:, padded : padded + half]), dim=1)


@lru_cache(maxsize=8)
def _places(shape: tuple[int, int], dtype: torch.dtype, isa: str) -> torch.Tensor:
    """Flat place in the packed matrix of each element of a matrix [N, K], in row-major order."""
    num = shape[0] * shape[1]
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    number = torch.arange(num).reshape(1, *shape)
    packed = torch.zeros(num, dtype=torch.int64)
    for shift in range(0, max(1, num.bit_length()), TAG_BITS):
        tags = ((number >> shift) & ((1 << TAG_BITS) - 1)).to(bits).view(dtype)
        packed += cpu_prepack_moe_weight(tags, isa).view(bits).reshape(-1).to(torch.int64) << shift
    place = torch.empty(num, dtype=torch.int64)
    place[packed] = torch.arange(num)
    if not torch.equal(packed.sort().values, number.reshape(-1)):
        raise RuntimeError(
            f"prepacking a matrix {shape} for {isa} is not a permutation; it cannot be read back"
        )
    return place

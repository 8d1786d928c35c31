"""Mamba-2 layers without mamba_ssm: what Megatron's mixer calls for training, in plain differentiable torch.

The names, arguments and shapes are those of mamba_ssm 2, as Megatron-Core 0.19 calls them. The scan is computed as one
chunk: memory grows with the square of the sequence, which suits tiny models on a CPU and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class GatedNorm(torch.nn.Module):
    """mamba_ssm's `RMSNorm`: each group of `group_size` features is normed by itself. The gate is in the scan."""

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float,
        group_size: int,
        norm_before_gate: bool,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        assert not norm_before_gate, "Megatron gates inside the scan, before the norm"
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.eps, self.group_size = eps, group_size

    def forward(self, values: Tensor) -> Tensor:
        groups = values.float().unflatten(-1, (-1, self.group_size))
        normed = functional.rms_norm(groups, (self.group_size,), None, self.eps).flatten(-2)
        return (normed * self.weight.float()).to(values.dtype)


def scan_for_inference(*_: Any, **__: Any) -> Any:
    """mamba_ssm's `mamba_chunk_scan_combined`, which training does not call."""
    raise NotImplementedError(
        "without mamba_ssm, Megatron's Mamba layers can be trained, not used for inference"
    )


def split_conv1d_scan(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,  # noqa: N803  mamba_ssm's names
    D: Tensor,  # noqa: N803
    *,
    chunk_size: int,
    activation: str,
    headdim: int,
    ngroups: int,
    norm_before_gate: bool,
    seq_idx: Tensor | None,
) -> Tensor:
    """[batch, tokens, heads * headdim]: convolution, scan and gate of the rows z, x, B, C, dt of `zxbcdt`.

    `conv1d_weight` is [channels of x, B, C; width]; `dt_bias`, `A` (negative) and `D` have one value per head.
    """
    del chunk_size  # a choice of the kernel's, not of the result
    assert activation in ("silu", "swish") and not norm_before_gate and seq_idx is None
    num_heads = A.numel()
    inner, states = num_heads * headdim, (conv1d_weight.shape[0] - num_heads * headdim) // 2
    z, xbc, dt = zxbcdt.float().split((inner, inner + 2 * states, num_heads), -1)
    width = conv1d_weight.shape[1]
    bias = None if conv1d_bias is None else conv1d_bias.float()
    padded = functional.pad(xbc.transpose(1, 2), (width - 1, 0))
    weight = conv1d_weight.float().unsqueeze(1)
    mixed = functional.silu(functional.conv1d(padded, weight, bias, groups=weight.shape[0]))
    x, b, c = mixed.to(zxbcdt.dtype).float().transpose(1, 2).split((inner, states, states), -1)
    x = x.unflatten(-1, (num_heads, headdim))
    per_group = num_heads // ngroups
    b, c = (part.unflatten(-1, (ngroups, -1)).repeat_interleave(per_group, 2) for part in (b, c))
    y = scan(x, functional.softplus(dt + dt_bias.float()), A.float(), b, c) + D.float()[:, None] * x
    return (y.flatten(-2) * functional.silu(z)).to(zxbcdt.dtype)


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """y[t] = sum over s <= t of (c[t] . b[s]) exp(a * (dt[s+1] + ... + dt[t])) dt[s] x[s], per head.

    This unrolls the recurrence h[t] = exp(a dt[t]) h[t-1] + dt[t] b[t] x[t], y[t] = c[t] . h[t]. `x` is [batch, tokens,
    heads, head size], `dt` [batch, tokens, heads], `a` [heads], `b` and `c` [batch, tokens, heads, states].
    """
    total = (a * dt).cumsum(1).transpose(1, 2)
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
    weights = torch.einsum("bthn,bshn->bhts", c, b) * decay
    return torch.einsum("bhts,bshp->bthp", weights, dt.unsqueeze(-1) * x)

"""A LoRA layer that needs one collective: base and adapter are added up before it.

Written for megatron-bridge 0.6, to be imported after `cpu_compat.import_bridge()`. Bridge's own layer reduces the base
product and the adapter's apart from each other, and gathers activations for the adapter. Here the factor that Bridge
cuts across the layer's own cut (the A of a column-parallel layer, the B of a row-parallel one) is gathered as a
weight, so that each rank adds its products up:

    column parallel, rank t:   y_t = x W_t' + s (x A') B_t'       one all-reduce of dx, as without LoRA
    row parallel:              y = sum_t (x_t W_t' + s (x_t A_t') B')   one all-reduce of y, as without LoRA

A row bias stays with the caller, who adds it once, after the sum. Names and shapes of all parameters are Bridge's.
"""

from __future__ import annotations

from typing import Any

from megatron.bridge.peft.lora import LoRA
from megatron.bridge.peft.lora_layers import LoRALinear
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn.functional import linear


class SummedLoRA(LoRA):
    """Bridge's LoRA, with the layers of this file around Megatron's own linear layers (not Transformer Engine's)."""

    def transform(self, module: Any, name: str | None = None, prefix: str | None = None) -> Any:
        wrapped = super().transform(module, name, prefix)
        if type(wrapped) is LoRALinear and wrapped is not module:
            if type(wrapped.to_wrap) is ColumnParallelLinear:
                return SummedColumn(wrapped.to_wrap, wrapped.adapter)
            if type(wrapped.to_wrap) is RowParallelLinear:
                return SummedRow(wrapped.to_wrap, wrapped.adapter)
        return wrapped


class _Summed(LoRALinear):
    """`owns_collective`: the base layer had one, which this layer runs in its stead; an expert's dispatcher has it."""

    def __init__(self, to_wrap: Any, adapter: Any) -> None:
        super().__init__(to_wrap, adapter)
        if to_wrap.config.sequence_parallel:
            raise NotImplementedError(
                f"{adapter.base_linear_name}: LoRA with sequence parallelism is not supported"
            )
        self.group = to_wrap.tp_group
        self.owns_collective = not to_wrap.explicit_expert_comm
        to_wrap.explicit_expert_comm = True  # Megatron's own switch for "the caller communicates"

    def delta(self, x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return linear(linear(x, lora_a), lora_b) * (self.adapter.alpha / self.adapter.dim)

    def whole(self, factor: Tensor) -> Tensor:
        """All ranks' rows of a factor; in the backward pass its gradients are summed, and each rank gets its rows."""
        return gather_from_sequence_parallel_region(
            factor, tensor_parallel_output_grad=True, group=self.group
        )


class SummedColumn(_Summed):
    """Around a layer whose output rows are cut: the queries, keys and values, or gate and up."""

    def __init__(self, to_wrap: Any, adapter: Any) -> None:
        super().__init__(to_wrap, adapter)
        if to_wrap.gather_output:
            raise NotImplementedError(
                f"{adapter.base_linear_name} gathers its output: leave it out of the targets"
            )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.owns_collective:
            x = copy_to_tensor_model_parallel_region(x, group=self.group)
        base, bias = self.to_wrap(x, *args, **kwargs)
        if not self._adapter_enabled:
            return base, bias
        lora_a, lora_b = self.whole(self.adapter.linear_in.weight), self.adapter.linear_out.weight
        return base + self.delta(x, lora_a, lora_b), bias


class SummedRow(_Summed):
    """Around a layer whose input columns are cut: the attention's output, or down."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        total, bias = self.to_wrap(x, *args, **kwargs)
        if self._adapter_enabled:
            lora_a, lora_b = self.adapter.linear_in.weight, self.whole(self.adapter.linear_out.weight)
            total = total + self.delta(x, lora_a, lora_b)
        if self.owns_collective:
            total = reduce_from_tensor_model_parallel_region(total, group=self.group)
        return total, bias

"""Megatron's layers without Transformer Engine, for CPUs: specs of GPT, MLA, MTP and Mamba hybrid models.

Written for megatron-core 0.19. The specs are Megatron's own; what they lack on a CPU is added here: an attention
core for MLA's two head sizes, and MTP layers that are not Transformer Engine's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch


def spec_settings(provider: Any) -> dict[str, Any]:
    """The provider fields that make it build local layers."""
    if hasattr(provider, "hybrid_stack_spec"):
        return {"hybrid_stack_spec": hybrid_spec}
    return {"transformer_layer_spec": decoder_spec}


def decoder_spec(config: Any, vp_stage: int | None = None) -> Any:
    """The decoder layers of this rank's stage, of any GPT family."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    if config.multi_latent_attention:
        block.layer_specs = [_with_mla_core(layer) for layer in block.layer_specs]
    return block


def mtp_spec(config: Any, vp_stage: int | None = None) -> Any:
    """The multi-token prediction layers of this rank's stage, or None. Takes the place of Bridge's own."""
    if not config.mtp_num_layers:
        return None
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_layer_specs,
        get_gpt_mtp_block_spec,
    )

    layers = get_gpt_decoder_layer_specs(
        config, use_transformer_engine=False, normalization=config.normalization
    )
    layer = _with_mla_core(layers[-1]) if config.multi_latent_attention else layers[-1]
    return get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False, vp_stage=vp_stage)


def hybrid_spec(config: Any) -> Any:
    """The layers of a Mamba hybrid."""
    from megatron.core.post_training.modelopt.hybrid.model_specs import get_hybrid_stack_modelopt_spec

    return get_hybrid_stack_modelopt_spec(local_core_attention=True, moe_grouped_gemm=config.moe_grouped_gemm)


@contextlib.contextmanager
def without_transformer_engine() -> Iterator[None]:
    """Puts local parts where Bridge and Megatron name Transformer Engine's, whatever the spec says."""
    from megatron.bridge.models import gpt_provider
    from megatron.bridge.peft import utils as peft_utils
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.post_training.modelopt.hybrid import model_specs
    from megatron.core.transformer.moe import moe_layer
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    with (
        mock.patch.multiple(moe_layer, HAVE_TE=True, TELinear=_duplicated_linear()),
        mock.patch.object(gpt_provider, "mtp_block_spec", mtp_spec),
        mock.patch.object(
            peft_utils, "HAVE_TE", False
        ),  # some of its classes are None there, which it takes for one
        mock.patch.object(hybrid_block, "TENorm", WrappedTorchNorm),
        mock.patch.object(model_specs, "Norm", WrappedTorchNorm),
        mock.patch.object(WrappedTorchNorm, "__new__", _torch_norm(WrappedTorchNorm.__new__)),
    ):
        yield


@functools.cache
def _duplicated_linear() -> type:
    """A linear that every TP rank has whole, for latent MoE. Bridge knows it by the name of the class."""
    from megatron.core.post_training.modelopt.layers import Linear

    return type("TELinear", (Linear,), {})


def _torch_norm(plain: Any) -> Any:
    """Megatron's choice of a torch norm, and what that lacks.

    A norm of its own where weights count from one (Gemma, Nemotron), and the mark by which Megatron sums the gradients
    of a weight that each tensor parallel rank sees a part of the sequence with.
    """

    def make(cls: type, config: Any, hidden_size: int, *args: Any, **kwargs: Any) -> Any:
        if config.layernorm_zero_centered_gamma:
            centers = config.normalization == "LayerNorm"
            norm: Any = ZeroCenteredNorm(hidden_size, kwargs.get("eps", 1e-5), centers)
        else:
            with mock.patch.object(config, "sequence_parallel", False):
                norm = plain(cls, config, hidden_size, *args, **kwargs)
        for param in norm.parameters():
            param.sequence_parallel = config.sequence_parallel
        return norm

    return make


class ZeroCenteredNorm(torch.nn.Module):
    """LayerNorm (`centers`, with a bias) or RMSNorm whose factor is 1 + weight."""

    def __init__(self, hidden_size: int, eps: float, centers: bool) -> None:
        super().__init__()
        self.eps, self.size = eps, (hidden_size,)
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size)) if centers else None

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return torch.nn.functional.rms_norm(values, self.size, 1 + self.weight, self.eps)
        return torch.nn.functional.layer_norm(values, self.size, 1 + self.weight, self.bias, self.eps)


def _with_mla_core(layer: Any) -> Any:
    attention = layer.submodules.self_attention
    core = replace(attention.submodules, core_attention=mla_core_attention())
    local = replace(attention, module=mla_attention(), submodules=core)
    return replace(layer, submodules=replace(layer.submodules, self_attention=local))


@functools.cache
def mla_attention() -> type:
    """Megatron's MLA with the gradients of all heads for the keys that carry positions, which all heads share.

    Local layers cut the down projection by tensor parallelism, and Megatron 0.19 gathers its output in a way that gives
    each rank the gradients of its own heads only.
    """
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    class LocalMlaSelfAttention(MLASelfAttention):
        def _qkv_down_projection(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            queries, latent = super()._qkv_down_projection(hidden_states)
            sizes = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
            if latent.size(-1) == sum(sizes):
                return queries, latent
            latent = mappings.gather_from_tensor_model_parallel_region(latent)
            if (
                self.config.sequence_parallel
            ):  # the caller gathers the keys' sequence, and that sums their gradients
                return queries, mappings.scatter_to_sequence_parallel_region(latent)
            content, positions = latent.split(sizes, -1)
            summed = mappings.copy_to_tensor_model_parallel_region(positions)
            return queries, torch.cat((content, summed), -1)

    return LocalMlaSelfAttention


@functools.cache
def mla_core_attention() -> type:
    """Megatron's DotProductAttention for keys and values of different head sizes."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class MlaDotProductAttention(DotProductAttention):
        # MLA builds one core without the sizes first, and throws it away.
        def __init__(self, *args: Any, k_channels: int = 1, v_channels: int = 1, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.hidden_size_per_attention_head = k_channels
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    return MlaDotProductAttention

"""FP8 and MXFP8 checkpoints on a CPU without AMX, where vLLM 0.31 has no kernels for them: for tests and small runs.

Parameters keep the names, dtypes and layouts of vLLM's own methods, whose classes make and load them; only the
arithmetic is here. Weights stay quantized and are decoded at each use, so a refit changes what computes at once. Linear
layers are vLLM's own methods with a kernel of ours; experts need a method of ours, which comes with configurations in
vLLM's own registry that take over blockwise FP8 and MXFP8 checkpoints on such machines. A GPU and a CPU with AMX see
none of it.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.kernels import linear as _KERNELS  # noqa: N812
from vllm.model_executor.kernels.linear import Mxfp8LinearKernel, register_linear_kernel
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import (
    Fp8BlockScaledMMLinearKernel,
)
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod
from vllm.model_executor.layers.quantization.modelopt import ModelOptMxFp8Config, ModelOptMxFp8FusedMoE
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.platforms import current_platform
from vllm.platforms.interface import PlatformEnum

from refit.plan.errors import ConfigError
from refit.transfer.precision.codecs import dequantize
from refit.transfer.precision.fp8 import BLOCK

NAME, MXFP8_NAME = "refit_fp8", "refit_mxfp8"


def has_no_kernels() -> bool:
    """True on the CPUs that this module is for."""
    return current_platform.is_cpu() and not torch.cpu._is_amx_tile_supported()


class DecodingBlockKernel(Fp8BlockScaledMMLinearKernel):
    """`x @ decode(weight, weight_scale_inv)^T`; activations are not quantized."""

    apply_input_quant = False

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:  # noqa: ARG003
        return has_no_kernels(), "it is for CPUs without AMX"

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing: what was loaded is what is used."""

    def apply_weights(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        weight = dequantize("fp8", (layer.weight, layer.weight_scale_inv), x.dtype)
        return torch.nn.functional.linear(x, weight, bias)

    def apply_block_scaled_mm(self, *_: Any, **__: Any) -> torch.Tensor:
        raise NotImplementedError("apply_weights computes by itself")


class DecodingMxfp8Kernel(Mxfp8LinearKernel):
    """`x @ decode(weight, weight_scale)^T`."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:  # noqa: ARG003
        return has_no_kernels(), "it is for CPUs without AMX"

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:  # noqa: ARG003
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing: what was loaded is what is used."""

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight = dequantize("mxfp8", (layer.weight, layer.weight_scale), x.dtype)
        return torch.nn.functional.linear(x, weight, bias)


class DecodingFp8Config(Fp8Config):
    """vLLM's FP8 configuration with experts that a CPU can compute."""

    @classmethod
    def get_name(cls) -> str:
        return NAME

    @classmethod
    def override_quantization_method(
        cls,
        hf_quant_cfg: dict[str, Any],
        user_quant: str | None,  # noqa: ARG003
        hf_config: Any = None,  # noqa: ARG003
    ) -> str | None:
        """Take over blockwise FP8 checkpoints where vLLM itself cannot run them."""
        is_ours = hf_quant_cfg.get("quant_method") == "fp8" and hf_quant_cfg.get("weight_block_size")
        return NAME if is_ours and has_no_kernels() else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Fp8Config:
        if list(config["weight_block_size"]) != list(BLOCK):
            raise ConfigError(
                f"the checkpoint has FP8 blocks of {config['weight_block_size']}; blocks of {list(BLOCK)} are supported"
            )
        return super().from_config(config)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if not isinstance(layer, RoutedExperts) or is_layer_skipped(
            prefix, self.ignored_layers, self.packed_modules_mapping
        ):
            return super().get_quant_method(layer, prefix)
        return DecodingFp8Experts(self, layer)


class DecodingMxfp8Config(ModelOptMxFp8Config):
    """vLLM's MXFP8 configuration with experts that a CPU can compute."""

    def get_name(self) -> str:
        return MXFP8_NAME

    @classmethod
    def override_quantization_method(
        cls,
        hf_quant_cfg: dict[str, Any],
        user_quant: str | None,  # noqa: ARG003
        hf_config: Any = None,  # noqa: ARG003
    ) -> str | None:
        """Take over MXFP8 checkpoints where vLLM itself cannot run them."""
        return MXFP8_NAME if hf_quant_cfg.get("quant_method") == "mxfp8" and has_no_kernels() else None


class DecodingExperts:
    """Each expert that a token asks for is decoded and applied."""

    form: str
    scale_name: str

    @property
    def is_monolithic(self) -> bool:
        return False

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Nothing: what was loaded is what is used."""

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:  # noqa: ARG002
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,  # noqa: ARG002 - the caller adds them
        shared_experts_input: torch.Tensor | None,  # noqa: ARG002
    ) -> torch.Tensor:
        if layer.activation != MoEActivation.SILU or layer.apply_router_weight_on_input:
            raise ConfigError(f"FP8 experts with activation {layer.activation} are not supported on this CPU")
        out = torch.zeros(x.shape, dtype=torch.float32)
        for expert in topk_ids.unique().tolist():
            local = expert if layer.expert_map is None else int(layer.expert_map[expert])
            if local >= 0:  # else another rank's
                rows, choices = (topk_ids == expert).nonzero(as_tuple=True)
                weights = topk_weights[rows, choices, None].float()
                out.index_add_(0, rows, self._expert(layer, local, x[rows]).float() * weights)
        return out.to(x.dtype)

    def _expert(self, layer: RoutedExperts, number: int, x: torch.Tensor) -> torch.Tensor:
        first, second = (
            dequantize(
                self.form,
                (getattr(layer, name)[number], getattr(layer, f"{name}_{self.scale_name}")[number]),
                x.dtype,
            )
            for name in ("w13_weight", "w2_weight")
        )
        gate, up = torch.nn.functional.linear(x, first).chunk(2, dim=-1)
        return torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, second)


class DecodingFp8Experts(DecodingExperts, Fp8MoEMethod):
    """vLLM's parameters and loading of FP8 experts."""

    form, scale_name = "fp8", "scale_inv"

    def __init__(self, quant_config: Fp8Config, layer: RoutedExperts) -> None:
        FusedMoEMethodBase.__init__(self, layer.moe_config)  # not vLLM's, which looks for a kernel
        self.quant_config = quant_config
        self.weight_block_size = quant_config.weight_block_size
        self.block_quant = True
        self.weight_scale_name = "weight_scale_inv"
        self.weight_scale_refine = None
        self.moe_block_shape = self.weight_block_size


class DecodingMxfp8Experts(DecodingExperts, ModelOptMxFp8FusedMoE):
    """vLLM's parameters and loading of MXFP8 experts."""

    form, scale_name = "mxfp8", "scale"

    def __init__(self, quant_config: ModelOptMxFp8Config, moe_config: Any) -> None:
        FusedMoEMethodBase.__init__(self, moe_config)  # not vLLM's, which looks for a kernel
        self.weight_block_size = [1, 32]
        self.quant_config = quant_config


DecodingMxfp8Config.FusedMoEMethodCls = DecodingMxfp8Experts


def register() -> None:
    """Make vLLM know all of it. Only after kernels of vLLM's own, so that those are preferred where they run."""
    _KERNELS._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU].append(DecodingBlockKernel)
    register_linear_kernel(DecodingMxfp8Kernel, PlatformEnum.CPU, "mxfp8")
    register_quantization_config(NAME)(DecodingFp8Config)
    register_quantization_config(MXFP8_NAME)(DecodingMxfp8Config)

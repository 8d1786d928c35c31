"""How the trainers are laid out and how they train: pure values, checked when made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True, slots=True)
class TrainParallel:
    """Sizes of the trainer's axes. `tensor * gtp * pipeline * data` is the number of trainer ranks.

    `expert`, `expert_tensor` and `expert_gtp` cut the experts over the same ranks: their product divides
    `tensor * gtp * data`. `gtp` cuts each weight's rows once more (generalized tensor parallelism).
    Ranks are ordered as Megatron orders them: tensor fastest, then gtp, data, pipeline slowest.
    `first_stage_layers` / `last_stage_layers` override an even split (None: even). The vocabulary is padded
    to a multiple of `tensor * vocab_multiple` (None: as little as Bridge does).
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    data: int = 1
    virtual_pipeline: int = 1
    expert_tensor: int = 1
    gtp: int = 1
    expert_gtp: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    vocab_multiple: int | None = None

    def __post_init__(self) -> None:
        sizes = {
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "expert": self.expert,
            "data": self.data,
            "virtual_pipeline": self.virtual_pipeline,
            "expert_tensor": self.expert_tensor,
            "gtp": self.gtp,
            "expert_gtp": self.expert_gtp,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"TrainParallel.{name} is {size}: it must be at least 1")
        if self.tensor * self.gtp * self.data % (self.expert * self.expert_tensor * self.expert_gtp):
            raise ValueError(
                f"expert ({self.expert}) * expert_tensor ({self.expert_tensor}) * expert_gtp "
                f"({self.expert_gtp}) does not divide tensor ({self.tensor}) * gtp ({self.gtp}) * data "
                f"({self.data}): raise data or lower expert"
            )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(f"virtual_pipeline {self.virtual_pipeline} needs pipeline > 1, which is 1")

    @property
    def world_size(self) -> int:
        return self.tensor * self.gtp * self.pipeline * self.data


LORA_MODULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "linear_qkv": ("q_proj", "k_proj", "v_proj"),
        "linear_proj": ("o_proj",),
        "linear_fc1": ("gate_proj", "up_proj"),
        "linear_fc2": ("down_proj",),
    }
)
"""Megatron's layers that can have adapters, and what HF calls them in the families that the service knows."""
LORA_TARGETS = tuple(LORA_MODULES)


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """Adapters of rank `rank` and strength `alpha / rank` around the layers that `targets` name, in Megatron's words.

    `refit`: engines get whole weights with the adapters folded in ("merged"), or the adapters alone ("adapter").
    `engine_dtype` is what the engines store, to which folded weights are rounded.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = LORA_TARGETS
    refit: Literal["merged", "adapter"] = "merged"
    engine_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        unknown = sorted(set(self.targets) - set(LORA_TARGETS))
        if self.rank < 1 or self.alpha <= 0 or not self.targets or unknown:
            raise ValueError(
                f"{self}: rank must be at least 1, alpha above 0, and targets some of {', '.join(LORA_TARGETS)}"
            )


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """The optimizer step. `num_microbatches` is per data parallel rank; fillers make up the last ones.

    `kl_coef` weighs the KL to the frozen initial policy, `clip_ratio` is PPO's epsilon, `max_grad_norm` clips
    the global gradient norm (0: no clipping). "bf16": bfloat16 parameters, float32 masters in the optimizer.
    With `lora` only adapters learn, and the reference is the policy without them.
    """

    lr: float = 1e-4
    clip_ratio: float = 0.2
    kl_coef: float = 0.01
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0
    num_microbatches: int = 2
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.95)
    lora: LoraOptions | None = None

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f'TrainOptions.precision is {self.precision!r}: it must be "bf16" or "fp32"')
        if self.num_microbatches < 1:
            raise ValueError(f"TrainOptions.num_microbatches is {self.num_microbatches}: at least 1")
        if self.lr < 0 or self.kl_coef < 0 or not 0 < self.clip_ratio < 1:
            raise ValueError(
                f"TrainOptions: lr {self.lr} and kl_coef {self.kl_coef} must be >= 0, "
                f"clip_ratio {self.clip_ratio} between 0 and 1"
            )

"""What the gate reads from an HF config: the sizes that parallelism cuts, and forms that are not supported.

The parts of the model are the planner's, which describes every family; nothing about a family is repeated here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from refit.plan import ConfigError
from refit.plan.synth.config import model_from_config
from refit.plan.synth.modules import Attention, Experts, LatentDown, Mamba, Mlp, Model, Module, shapes

MODEL_TYPES = ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "deepseek_v3", "nemotron_h")
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
CPU_LATENT_SIZES = (512, 64)
"""Elements per token that MLA caches, without and with a position: the one pair that vLLM's CPU kernel is made for."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Sizes of a model. `widths` and `expert_widths` are (what, size) that tensor parallelism cuts.

    `problems` and `cpu_problems` are (problem, remedy); the latter hold where there is no CUDA.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    num_experts: int
    widths: tuple[tuple[str, int], ...]
    expert_widths: tuple[tuple[str, int], ...]
    is_hybrid: bool
    is_latent: bool
    max_positions: int | None
    num_params: int
    vocab_size: int
    problems: tuple[tuple[str, str], ...]
    cpu_problems: tuple[tuple[str, str], ...]


def read_facts(config: Mapping[str, Any]) -> ModelFacts:
    """Raises ConfigError for a family that is not supported, or a size that the family needs and `config` lacks."""
    if config.get("model_type") not in MODEL_TYPES:
        raise ConfigError(
            f"its model_type {config.get('model_type')!r} is not supported yet; {', '.join(MODEL_TYPES)} are"
        )
    model = model_from_config("the model", config)
    parts = [*model.first, *(part for layer in model.layers for part in layer), *model.last]
    experts = [part for part in parts if isinstance(part, Experts)]
    num_heads = int(config["num_attention_heads"])
    attention = next((part for part in parts if isinstance(part, Attention)), None)
    return ModelFacts(
        num_layers=len(model.layers),
        num_heads=num_heads,
        num_kv_heads=attention.num_kv_heads if attention else num_heads,
        head_size=attention.head_size if attention else int(config.get("v_head_dim", 0)),
        num_experts=experts[0].num_experts if experts else 0,
        widths=tuple(dict.fromkeys(pair for part in parts for pair in _widths(part))),
        expert_widths=tuple(dict.fromkeys(("expert width", part.size) for part in experts)),
        is_hybrid=any(isinstance(part, Mamba) for part in parts),
        is_latent=any(isinstance(part, LatentDown) for part in parts),
        max_positions=config.get("max_position_embeddings"),
        num_params=_num_params(parts),
        vocab_size=int(config["vocab_size"]),
        problems=tuple(_problems(config)),
        cpu_problems=tuple(_cpu_problems(model, config)),
    )


def _widths(part: Module) -> Iterator[tuple[str, int]]:
    match part:
        case Mlp():
            yield "MLP width", part.size
        case Mamba():
            yield "number of Mamba heads", part.num_heads
            yield "number of Mamba groups", part.num_groups
        case _:
            return


def _num_params(parts: list[Module]) -> int:
    """Tied embeddings count once: both are the tensor of that name."""
    tensors = {name: shape for part in parts for name, (shape, _) in shapes(part).items()}
    return sum(map(prod, tensors.values()))


def _problems(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if config.get("quantization_config"):
        yield "the checkpoint is quantized", "Use its bf16 original; quantized refits are not supported yet"
    end = config.get("eos_token_id")
    if not isinstance(end, int) and not (isinstance(end, list) and end):
        yield f"its eos_token_id is {end!r}, so no answer would end", "Name the end token in config.json"


def _cpu_problems(model: Model, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What vLLM 0.31 has no kernel for on a CPU."""
    parts = {type(part): part for layer in model.layers for part in layer}
    attention, experts = parts.get(Attention), parts.get(Experts)
    if isinstance(attention, Attention) and attention.head_size not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        problem = f"its head size {attention.head_size} has no attention kernel in vLLM on a CPU"
        yield problem, f"Use a model with one of {sizes}"
    if LatentDown in parts:
        latent = config["kv_lora_rank"], config["qk_rope_head_dim"]
        if latent != CPU_LATENT_SIZES:
            problem = (
                f"its MLA caches {latent[0]} + {latent[1]} elements, for which vLLM has no kernel on a CPU"
            )
            yield problem, "Use a model with kv_lora_rank 512 and qk_rope_head_dim 64"
    if isinstance(experts, Experts) and not experts.gated:
        problem = "vLLM has no kernel on a CPU for experts without a gate (it refuses is_act_and_mul=False)"
        yield problem, "Use a model without experts, or with gated ones; a validation run refits such engines"

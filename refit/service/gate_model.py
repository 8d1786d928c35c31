"""What the gate reads from an HF config: the sizes that parallelism cuts, and forms that are not supported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MODEL_TYPES = ("qwen2", "qwen3", "qwen3_moe", "llama")
_NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
_REQUIRED = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Sizes of a model. `mlp_widths` are (what, width) that tensor parallelism cuts, `problems` (problem, remedy)."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    num_experts: int
    mlp_widths: tuple[tuple[str, int], ...]
    max_positions: int | None
    num_params: int
    problems: tuple[tuple[str, str], ...]


def read_facts(config: Mapping[str, Any]) -> ModelFacts | None:
    """None if the config lacks a size that every supported family states."""
    if not all(isinstance(config.get(key), int) for key in _REQUIRED):
        return None
    num_heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
    num_kv_heads = config.get("num_key_value_heads") or num_heads  # absent or null: one per attention head
    head_size = config.get("head_dim") or hidden_size // num_heads  # absent or null: what the heads leave
    is_moe = str(config.get("model_type", "")).endswith("_moe")
    num_experts = next((int(config[key]) for key in _NUM_EXPERTS_KEYS if config.get(key)), 0) if is_moe else 0
    width = int(config["moe_intermediate_size"]) if num_experts else int(config["intermediate_size"])
    what = "expert width" if num_experts else "MLP width"
    return ModelFacts(
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        num_experts=num_experts,
        mlp_widths=((what, width),),
        max_positions=config.get("max_position_embeddings"),
        num_params=_num_params(config, num_heads, num_kv_heads, head_size, max(1, num_experts) * width),
        problems=tuple(_problems(config)),
    )


def _num_params(
    config: Mapping[str, Any], num_heads: int, num_kv_heads: int, head_size: int, mlp_width: int
) -> int:
    """Matrices only; one-dimensional weights are lost in the estimate's margin."""
    hidden = int(config["hidden_size"])
    attention = hidden * head_size * 2 * (num_heads + num_kv_heads)
    embeddings = (1 if config.get("tie_word_embeddings") else 2) * int(config["vocab_size"]) * hidden
    return int(config["num_hidden_layers"]) * (attention + 3 * hidden * mlp_width) + embeddings


def _problems(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    if config.get("model_type") not in MODEL_TYPES:
        problem = f"its model_type {config.get('model_type')!r} is not supported yet"
        found.append((problem, f"Use a model of type {', '.join(MODEL_TYPES)}"))
    if config.get("quantization_config"):
        found.append(
            ("the checkpoint is quantized", "Use its bf16 original; quantized refits are not supported yet")
        )
    end = config.get("eos_token_id")
    if not isinstance(end, int) and not (isinstance(end, list) and end):
        found.append(
            (f"its eos_token_id is {end!r}, so no answer would end", "Name the end token in config.json")
        )
    return found

"""Tiny seeded HF checkpoints of real model families, made on the spot: no network, no tokenizer files.

The vocabulary is byte level: token ids 0..255 are bytes, then BOS, EOS and PAD. Its size, 259, is odd, so
every vocabulary that is cut or rounded (trainers under TP, generators that pad to 64) has padding rows.
Head size 32 is the smallest that the CPU generator accepts.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

BOS_TOKEN, EOS_TOKEN, PAD_TOKEN = 256, 257, 258
VOCAB_SIZE = 259

_COMMON: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_TOKEN,
        "eos_token_id": EOS_TOKEN,
        "pad_token_id": PAD_TOKEN,
    }
)


def _qwen3(overrides: Mapping[str, Any]) -> Any:
    from transformers import Qwen3Config

    sizes = {"num_hidden_layers": 4, "intermediate_size": 256, "num_key_value_heads": 2, "head_dim": 32}
    return Qwen3Config(**{**_COMMON, **sizes, **overrides})


def _qwen3_wide(overrides: Mapping[str, Any]) -> Any:
    """The least whose engines store whole FP8 blocks of 128 x 128 on each of two ranks."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 128}
    return _qwen3({**sizes, **overrides})


def _qwen3_peaked(overrides: Mapping[str, Any]) -> Any:
    """One whose frozen head can tell tokens apart: of 0.02 wide, no hidden state gets a logit above 2.6."""
    return _qwen3({"initializer_range": 0.1, **overrides})


def _qwen3_moe(overrides: Mapping[str, Any]) -> Any:
    from transformers import Qwen3MoeConfig

    sizes = {"num_hidden_layers": 4, "intermediate_size": 256, "num_key_value_heads": 2, "head_dim": 32}
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
    }
    return Qwen3MoeConfig(**{**_COMMON, **sizes, **experts, **overrides})


def _qwen25(overrides: Mapping[str, Any]) -> Any:
    from transformers import Qwen2Config  # Qwen2.5 is a Qwen2: biases on q, k, v

    sizes = {"num_hidden_layers": 4, "intermediate_size": 256, "num_key_value_heads": 2}
    return Qwen2Config(**{**_COMMON, **sizes, **overrides})


def _llama(overrides: Mapping[str, Any]) -> Any:
    from transformers import LlamaConfig

    sizes = {"num_hidden_layers": 4, "intermediate_size": 256, "num_key_value_heads": 2, "head_dim": 32}
    return LlamaConfig(**{**_COMMON, **sizes, **overrides})


def _deepseek_v3(overrides: Mapping[str, Any]) -> Any:
    from transformers import DeepseekV3Config

    sizes = {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "intermediate_size": 256,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 512,  # this and the 64 below are the one latent that vLLM's CPU kernel can read
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 64,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "moe_intermediate_size": 64,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "noaux_tc",  # vLLM makes the correction bias only if it is told so
        "num_nextn_predict_layers": 0,
    }
    return DeepseekV3Config(**{**_COMMON, **sizes, **overrides})


def _nemotron_h(overrides: Mapping[str, Any]) -> Any:
    from transformers import NemotronHConfig

    sizes = {
        "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba", "moe"],
        "intermediate_size": 256,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "n_groups": 4,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "chunk_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 128,
    }
    return NemotronHConfig(**{**_COMMON, **sizes, **overrides})


def _nemotron_h_dense(overrides: Mapping[str, Any]) -> Any:
    return _nemotron_h({"layers_block_type": ["mamba", "mlp", "mamba", "attention"], **overrides})


TINY_MODELS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = MappingProxyType(
    {
        "tiny-qwen3": _qwen3,
        "tiny-qwen3-wide": _qwen3_wide,
        "tiny-qwen3-peaked": _qwen3_peaked,
        "tiny-qwen3-moe": _qwen3_moe,
        "tiny-qwen2.5": _qwen25,
        "tiny-llama": _llama,
        "tiny-deepseek-v3": _deepseek_v3,
        "tiny-nemotron-h": _nemotron_h,
        "tiny-nemotron-h-dense": _nemotron_h_dense,
    }
)


def _config(name: str, overrides: Mapping[str, Any]) -> Any:
    import transformers

    if name in TINY_MODELS:
        return TINY_MODELS[name](overrides)
    if not name.endswith("Config") or not hasattr(transformers, name):
        known = ", ".join(TINY_MODELS)
        raise ValueError(
            f"no tiny model is called {name!r}; there are {known}, and transformers' config classes"
        )
    return getattr(transformers, name)(**{**_COMMON, **overrides})


def make_tiny_model(
    name: str,
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Write the checkpoint `name` into `folder` (config.json, model.safetensors) and return the folder.

    Equal arguments give equal bytes. `overrides` are fields of the family's HF config, for example
    `{"tie_word_embeddings": True, "num_hidden_layers": 5}`. One-dimensional weights are drawn around their
    initial value: a norm of ones could be put in the wrong place unseen. `name` is in TINY_MODELS, or a
    config class of transformers such as "MistralConfig". Raises ValueError for any other.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = _config(name, overrides or {})
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for _, param in sorted(model.named_parameters()):
                if param.ndim == 1:
                    param.add_(torch.randn_like(param), alpha=0.02)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    _complete(path, config, seed)
    return path


def _complete(folder: Path, config: Any, seed: int) -> None:
    """What transformers 5.12 writes differently from published checkpoints, or not at all."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = load_file(file)
    if "backbone.embedding.weight" in weights:  # Nemotron-H
        weights["backbone.embeddings.weight"] = weights.pop("backbone.embedding.weight")
    if config.model_type == "deepseek_v3" and config.num_nextn_predict_layers:
        weights |= _mtp_layer(weights, config.num_hidden_layers, seed)
    save_file(weights, file, metadata={"format": "pt"})


def _mtp_layer(weights: Mapping[str, Any], num_layers: int, seed: int) -> dict[str, Any]:
    """DeepSeek's multi-token prediction layer: one more MoE layer, its norms and projection, and copies of the
    embedding and the output layer. Fresh random values in the shapes of the last layer.
    """
    import torch

    generator = torch.Generator().manual_seed(seed + 1)

    def fresh(shape: tuple[int, ...], like: Any) -> Any:
        around = 1.0 if len(shape) == 1 else 0.0
        return (torch.randn(shape, generator=generator) * 0.02 + around).to(like.dtype)

    last, mtp = f"model.layers.{num_layers - 1}.", f"model.layers.{num_layers}."
    layer = {
        n.replace(last, mtp): fresh(w.shape, w) for n, w in sorted(weights.items()) if n.startswith(last)
    }
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    hidden = embedding.shape[1]
    return layer | {
        f"{mtp}enorm.weight": fresh((hidden,), embedding),
        f"{mtp}hnorm.weight": fresh((hidden,), embedding),
        f"{mtp}eh_proj.weight": fresh((hidden, 2 * hidden), embedding),
        f"{mtp}shared_head.norm.weight": fresh((hidden,), embedding),
        f"{mtp}shared_head.head.weight": head.clone(),
        f"{mtp}embed_tokens.weight": embedding.clone(),
    }


def rewrite(source: str | Path, folder: str | Path, make: Callable[[str, Any], Any]) -> tuple[str, ...]:
    """Write the checkpoint `source` into `folder` (which may be the same) with tensor `name` = make(name, old).

    Tensors are visited in name order; those that repeat another one by convention stay its copies. Returns their names.
    """
    from safetensors.torch import load_file, save_file

    from refit.train_side.lowering.copies import find_copies

    source, folder = Path(source), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights: dict[str, Any] = {}
    for file in sorted(source.glob("*.safetensors")):
        weights |= load_file(file)
    weights = {name: make(name, weights[name]).contiguous() for name in sorted(weights)}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    outside_layers = {name for name in shapes if ".layers." not in name}
    for copy, original in find_copies(shapes, outside_layers).items():
        weights[copy] = weights[original].clone()
    for file in source.glob("*.json"):
        if "index" not in file.name and source != folder:
            shutil.copy(file, folder / file.name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return tuple(weights)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m refit.train_side.tiny_models NAME FOLDER")
    print(make_tiny_model(sys.argv[1], sys.argv[2]))

"""From an HF `config.json` (or a shipped model name) to the parts of the model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from refit.plan.errors import ConfigError
from refit.plan.synth.modules import Attention, Experts, LatentDown, Linear, Mamba, Mlp, Model, Module, Vector
from refit.plan.synth.modules import Vocabulary as Vocab


def shipped_models() -> tuple[str, ...]:
    """Names of the model configurations that come with the planner."""
    folder = files("refit.plan") / "models"
    return tuple(
        sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))
    )


def load_model(name_or_dir: str) -> Model:
    """A shipped model by name, or the model of a folder with config.json (or of such a file)."""
    path = Path(name_or_dir)
    if name_or_dir in shipped_models():
        text = (files("refit.plan") / "models" / f"{name_or_dir}.json").read_text()
        return model_from_config(name_or_dir, json.loads(text))
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"model {name_or_dir!r} is neither a folder with config.json nor shipped;"
            f" shipped are {', '.join(shipped_models())}"
        )
    try:
        config = json.loads(file.read_text())
    except ValueError as fault:
        raise ConfigError(f"{file} is not JSON: {fault}") from fault
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds {type(config).__name__}, not the object that an HF config is")
    return model_from_config(path.name, config)


@dataclass(frozen=True, slots=True)
class Config:
    """An HF config as a dictionary, read strictly: a key that a family needs must be there."""

    values: Mapping[str, Any]
    model: str

    def number(self, key: str, *others: str) -> int:
        for name in (key, *others):
            value = self.values.get(name)
            if type(value) is int:
                return value
        raise ConfigError(f"config of {self.model}: {key} is {self.values.get(key)!r}; an integer is needed")

    def optional(self, key: str, default: int) -> int:
        return default if self.values.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"config of {self.model}: {key} is {value!r}; true or false is needed")
        return value


def model_from_config(name: str, values: Mapping[str, Any]) -> Model:
    """The parts of a model by its `model_type`. Raises ConfigError for a family that is not described here."""
    config = Config(values, name)
    family = values.get("model_type")
    match family:
        case "qwen2" | "qwen3" | "llama" | "mistral":
            layers = tuple(
                _dense_layer(config, layer, family) for layer in range(config.number("num_hidden_layers"))
            )
        case "qwen3_moe":
            layers = tuple(_moe_layer(config, layer) for layer in range(config.number("num_hidden_layers")))
        case "deepseek_v3" | "kimi_k2":
            layers = tuple(
                _latent_layer(config, layer) for layer in range(config.number("num_hidden_layers"))
            )
        case "nemotron_h":
            return _nemotron(config)
        case _:
            raise ConfigError(
                f"config of {name}: model_type {family!r} is not described; known are qwen2, qwen3, qwen3_moe,"
                " llama, mistral, deepseek_v3, kimi_k2, nemotron_h"
            )
    return _wrap(config, layers, "model.embed_tokens", "model.norm.weight", "decoder.final_layernorm.weight")


def _wrap(
    config: Config, layers: tuple[tuple[Module, ...], ...], embed: str, norm: str, train_norm: str
) -> Model:
    hidden, rows = config.number("hidden_size"), config.number("vocab_size")
    tied = config.flag("tie_word_embeddings")
    output = Vocab(embed if tied else "lm_head", "output_layer", rows, hidden)
    return Model(
        config.model,
        (Vocab(embed, "embedding.word_embeddings", rows, hidden),),
        layers,
        (Vector(norm, train_norm, hidden), output),
        tied,
    )


def _norm(name: str, train: str, size: int) -> Vector:
    return Vector(f"{name}.weight", f"{train}.weight", size)


def _attention(config: Config, head: str, bias: bool, out_bias: bool = False) -> tuple[Module, ...]:
    hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
    head_size = config.optional("head_dim", hidden // heads)
    kv_heads = config.optional("num_key_value_heads", heads)
    return (
        Attention(head, heads, kv_heads, head_size, hidden, bias),
        Linear(f"{head}.o_proj", "self_attention.linear_proj", hidden, heads * head_size, "row", out_bias),
    )


def _dense_layer(config: Config, layer: int, family: object) -> tuple[Module, ...]:
    head, hidden = f"model.layers.{layer}", config.number("hidden_size")
    bias = config.flag("attention_bias", default=family == "qwen2")
    parts: list[Module] = [_norm(f"{head}.input_layernorm", "input_layernorm", hidden)]
    parts += _attention(config, f"{head}.self_attn", bias, out_bias=bias and family == "llama")
    if family == "qwen3":
        parts += _qk_norms(config, head)
    parts.append(_norm(f"{head}.post_attention_layernorm", "pre_mlp_layernorm", hidden))
    parts.append(Mlp(f"{head}.mlp", "mlp", config.number("intermediate_size"), hidden, gated=True))
    return tuple(parts)


def _qk_norms(config: Config, head: str) -> tuple[Module, ...]:
    size = config.optional("head_dim", config.number("hidden_size") // config.number("num_attention_heads"))
    return (
        _norm(f"{head}.self_attn.q_norm", "self_attention.q_layernorm", size),
        _norm(f"{head}.self_attn.k_norm", "self_attention.k_layernorm", size),
    )


def _moe_layer(config: Config, layer: int) -> tuple[Module, ...]:
    head, hidden = f"model.layers.{layer}", config.number("hidden_size")
    num_experts = config.number("num_experts", "num_local_experts")
    dense_only = config.values.get("mlp_only_layers") or []
    sparse = layer not in dense_only and (layer + 1) % config.optional("decoder_sparse_step", 1) == 0
    parts: list[Module] = [_norm(f"{head}.input_layernorm", "input_layernorm", hidden)]
    parts += _attention(config, f"{head}.self_attn", config.flag("attention_bias"))
    parts += _qk_norms(config, head)
    parts.append(_norm(f"{head}.post_attention_layernorm", "pre_mlp_layernorm", hidden))
    if not sparse:
        return (*parts, Mlp(f"{head}.mlp", "mlp", config.number("intermediate_size"), hidden, gated=True))
    parts.append(Linear(f"{head}.mlp.gate", "mlp.router", num_experts, hidden, "none"))
    parts.append(
        Experts(
            f"{head}.mlp.experts", num_experts, config.number("moe_intermediate_size"), hidden, gated=True
        )
    )
    return tuple(parts)


def _latent_layer(config: Config, layer: int) -> tuple[Module, ...]:
    head, hidden = f"model.layers.{layer}", config.number("hidden_size")
    parts: list[Module] = [_norm(f"{head}.input_layernorm", "input_layernorm", hidden)]
    parts += _latent_attention(config, f"{head}.self_attn", hidden)
    parts.append(_norm(f"{head}.post_attention_layernorm", "pre_mlp_layernorm", hidden))
    if layer < config.optional("first_k_dense_replace", 0):
        return (*parts, Mlp(f"{head}.mlp", "mlp", config.number("intermediate_size"), hidden, gated=True))
    num_experts, size = config.number("n_routed_experts"), config.number("moe_intermediate_size")
    parts.append(Linear(f"{head}.mlp.gate", "mlp.router", num_experts, hidden, "none"))
    bias = f"{head}.mlp.gate.e_score_correction_bias"
    parts.append(Vector(bias, "mlp.router.expert_bias", num_experts, "float32"))
    parts.append(Experts(f"{head}.mlp.experts", num_experts, size, hidden, gated=True))
    shared = config.optional("n_shared_experts", 0)
    if shared:
        parts.append(
            Mlp(f"{head}.mlp.shared_experts", "mlp.shared_experts", shared * size, hidden, gated=True)
        )
    return tuple(parts)


def _latent_attention(config: Config, head: str, hidden: int) -> tuple[Module, ...]:
    heads, rank = config.number("num_attention_heads"), config.number("kv_lora_rank")
    rope, nope = config.number("qk_rope_head_dim"), config.number("qk_nope_head_dim")
    value, num_q = config.number("v_head_dim"), config.optional("q_lora_rank", 0)
    q_rows = heads * (rope + nope)
    parts: list[Module] = [LatentDown(head, num_q, rank + rope, hidden)]
    if num_q:
        parts.append(_norm(f"{head}.q_a_layernorm", "self_attention.q_layernorm", num_q))
        parts.append(Linear(f"{head}.q_b_proj", "self_attention.linear_q_up_proj", q_rows, num_q, "column"))
    else:
        parts.append(Linear(f"{head}.q_proj", "self_attention.linear_q_proj", q_rows, hidden, "column"))
    parts.append(_norm(f"{head}.kv_a_layernorm", "self_attention.kv_layernorm", rank))
    up_rows = heads * (nope + value)
    parts.append(Linear(f"{head}.kv_b_proj", "self_attention.linear_kv_up_proj", up_rows, rank, "column"))
    parts.append(Linear(f"{head}.o_proj", "self_attention.linear_proj", hidden, heads * value, "row"))
    return tuple(parts)


BLOCK_TYPES = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}


def _nemotron_pattern(config: Config) -> str:
    """One letter per layer, from the string of published configs or the list that newer transformers write."""
    pattern, types = config.values.get("hybrid_override_pattern"), config.values.get("layers_block_type")
    if pattern is None and isinstance(types, list) and all(one in BLOCK_TYPES for one in types):
        return "".join(BLOCK_TYPES[one] for one in types)
    if not isinstance(pattern, str) or set(pattern) - set("M*-E"):
        raise ConfigError(
            f"config of {config.model}: hybrid_override_pattern {pattern!r} must be made of M * - E, or"
            f" layers_block_type {types!r} a list of {', '.join(BLOCK_TYPES)}"
        )
    return pattern


def _nemotron(config: Config) -> Model:
    pattern = _nemotron_pattern(config)
    layers = tuple(_nemotron_layer(config, layer, kind) for layer, kind in enumerate(pattern))
    return _wrap(config, layers, "backbone.embeddings", "backbone.norm_f.weight", "decoder.final_norm.weight")


def _nemotron_layer(config: Config, layer: int, kind: str) -> tuple[Module, ...]:
    head, hidden = f"backbone.layers.{layer}", config.number("hidden_size")
    mixer = f"{head}.mixer"
    train_norm = {"M": "norm", "*": "input_layernorm"}.get(kind, "pre_mlp_layernorm")
    norm = Vector(f"{head}.norm.weight", f"{train_norm}.weight", hidden)
    match kind:
        case "M":
            return norm, _mamba(config, mixer, hidden)
        case "*":
            return norm, *_attention(config, mixer, config.flag("attention_bias"))
        case "-":
            return norm, Mlp(mixer, "mlp", config.number("intermediate_size"), hidden, gated=False)
        case _:
            return norm, *_nemotron_experts(config, mixer, hidden)


def _mamba(config: Config, mixer: str, hidden: int) -> Mamba:
    return Mamba(
        mixer,
        config.number("mamba_num_heads"),
        config.number("mamba_head_dim"),
        config.number("n_groups"),
        config.number("ssm_state_size"),
        config.number("conv_kernel"),
        hidden,
        config.flag("use_conv_bias", default=True),
    )


def _nemotron_experts(config: Config, mixer: str, hidden: int) -> tuple[Module, ...]:
    num_experts, size = config.number("n_routed_experts"), config.number("moe_intermediate_size")
    latent = config.optional("moe_latent_size", 0)
    parts: list[Module] = [
        Linear(f"{mixer}.gate", "mlp.router", num_experts, hidden, "none"),
        Vector(f"{mixer}.gate.e_score_correction_bias", "mlp.router.expert_bias", num_experts, "float32"),
        Experts(f"{mixer}.experts", num_experts, size, latent or hidden, gated=False),
    ]
    if latent:
        parts.append(Linear(f"{mixer}.fc1_latent_proj", "mlp.fc1_latent_proj", latent, hidden, "none"))
        parts.append(Linear(f"{mixer}.fc2_latent_proj", "mlp.fc2_latent_proj", hidden, latent, "none"))
    shared = config.optional("moe_shared_expert_intermediate_size", 0)
    if shared:
        parts.append(Mlp(f"{mixer}.shared_experts", "mlp.shared_experts", shared, hidden, gated=False))
    return tuple(parts)

"""Tiny checkpoints of the families, made by transformers from a config: real names, real shapes, seeded values."""

from pathlib import Path

BASE = {
    "vocab_size": 259,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
TIED = {"tie_word_embeddings": True}
HEAD = {"head_dim": 32}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
ROUTED = {
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
MLA = {
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
MAMBA = {
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 32,
}

FAMILIES = {
    "qwen2-bias": ("Qwen2Config", {}),
    "qwen2-tied": ("Qwen2Config", TIED),
    "qwen3": ("Qwen3Config", HEAD),
    "qwen3-tied": ("Qwen3Config", HEAD | TIED),
    "llama": ("LlamaConfig", {}),
    "llama-odd-vocabulary": ("LlamaConfig", {"vocab_size": 500}),
    "gemma2": ("Gemma2Config", HEAD | TIED),
    "qwen3-moe": ("Qwen3MoeConfig", MOE | HEAD),
    "qwen2-moe": ("Qwen2MoeConfig", MOE | {"shared_expert_intermediate_size": 128}),
    "mixtral": ("MixtralConfig", LOCAL_EXPERTS),
    "gpt-oss": ("GptOssConfig", LOCAL_EXPERTS | HEAD | {"intermediate_size": 64}),
    "glm4-moe": ("Glm4MoeConfig", ROUTED | HEAD | {"n_group": 1, "topk_group": 1}),
    "deepseek-v3": (
        "DeepseekV3Config",
        ROUTED | MLA | {"num_hidden_layers": 3, "n_group": 2, "topk_group": 1, "topk_method": "noaux_tc"},
    ),
    "nemotron-h": (
        "NemotronHConfig",
        HEAD | MAMBA | {"num_hidden_layers": 4, "hybrid_override_pattern": "M-M*"},
    ),
}


def make_family(family, folder, dtype="float32"):
    """Write the tiny checkpoint of `family` into `folder` and return it."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    kind, fields = FAMILIES[family]
    config = getattr(transformers, kind)(**(BASE | fields))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(torch.randn_like(param), alpha=0.02)
    Path(folder).mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    file = Path(folder) / "model.safetensors"
    weights = load_file(file)
    if "backbone.embedding.weight" in weights:  # published Nemotron-H checkpoints say embeddings
        weights["backbone.embeddings.weight"] = weights.pop("backbone.embedding.weight")
        save_file(weights, file, metadata={"format": "pt"})
    return Path(folder)

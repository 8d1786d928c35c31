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
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def _config(family):
    import transformers as t

    match family:
        case "qwen2-bias":
            return t.Qwen2Config(**BASE)
        case "qwen2-tied":
            return t.Qwen2Config(**{**BASE, "tie_word_embeddings": True})
        case "llama":
            return t.LlamaConfig(**BASE)
        case "llama-odd-vocabulary":
            return t.LlamaConfig(**{**BASE, "vocab_size": 500})
        case "qwen3":
            return t.Qwen3Config(**BASE, head_dim=32)
        case "qwen3-tied":
            return t.Qwen3Config(**{**BASE, "tie_word_embeddings": True}, head_dim=32)
        case "qwen3-moe":
            return t.Qwen3MoeConfig(**BASE, **MOE, head_dim=32)
        case "qwen2-moe":
            return t.Qwen2MoeConfig(**BASE, **MOE, shared_expert_intermediate_size=128)
        case "mixtral":
            return t.MixtralConfig(**BASE, num_local_experts=8, num_experts_per_tok=2)
        case "gpt-oss":
            return t.GptOssConfig(
                **{**BASE, "intermediate_size": 64}, num_local_experts=8, num_experts_per_tok=2, head_dim=32
            )
        case "deepseek-v3":
            return t.DeepseekV3Config(
                **{**BASE, "num_hidden_layers": 3, "num_key_value_heads": 4},
                moe_intermediate_size=64,
                n_routed_experts=8,
                num_experts_per_tok=2,
                n_shared_experts=1,
                n_group=2,
                topk_group=1,
                first_k_dense_replace=1,
                q_lora_rank=64,
                kv_lora_rank=32,
                qk_nope_head_dim=32,
                qk_rope_head_dim=32,
                v_head_dim=32,
                topk_method="noaux_tc",
            )
        case "nemotron-h":
            return t.NemotronHConfig(
                **{**BASE, "num_hidden_layers": 4},
                hybrid_override_pattern="M-M*",
                head_dim=32,
                mamba_num_heads=8,
                mamba_head_dim=32,
                ssm_state_size=16,
                n_groups=2,
                conv_kernel=4,
                chunk_size=32,
            )
        case "gemma2":
            return t.Gemma2Config(**{**BASE, "tie_word_embeddings": True}, head_dim=32)
        case "glm4-moe":
            return t.Glm4MoeConfig(
                **BASE,
                moe_intermediate_size=64,
                n_routed_experts=8,
                num_experts_per_tok=2,
                n_shared_experts=1,
                n_group=1,
                topk_group=1,
                first_k_dense_replace=1,
                head_dim=32,
            )
    raise ValueError(f"no family {family!r}")


def make_family(family, folder, dtype="float32"):
    """Write the tiny checkpoint of `family` into `folder` and return it."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(family), dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(torch.randn_like(param), alpha=0.02)
    Path(folder).mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return Path(folder)

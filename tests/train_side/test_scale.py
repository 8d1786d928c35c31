"""What describing a trainer costs for 61 layers of 256 experts, all on one rank: the worst that can be."""

import pytest

from tests.gen_side.checkpoints import deepseek_shapes, header_only
from tests.train_side import ranks

pytestmark = [pytest.mark.megatron, pytest.mark.slow, pytest.mark.timeout(600)]


def test_sixty_layers_of_256_experts_are_described_in_time_and_travel_small(trainers, tmp_path):
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=512, hidden_size=64, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=61,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=256, num_experts_per_tok=8,
        n_shared_experts=1, n_group=8, topk_group=4, first_k_dense_replace=3, q_lora_rank=64, kv_lora_rank=32,
        qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, topk_method="noaux_tc",
        num_nextn_predict_layers=0, architectures=["DeepseekV3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    header_only(tmp_path, deepseek_shapes(61, 256, 64, 32, 512))
    (found,) = trainers.run(ranks.description_cost, 1, str(tmp_path))
    print(found)
    assert found["num_params"] > 30_000 and found["misc"] == ()
    assert found["prepare_s"] + found["describe_s"] <= 20
    assert found["manifest_bytes"] <= 2 << 20

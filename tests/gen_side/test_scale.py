"""What describing a worker costs: memory against the model's bytes, and time and size for hundreds of experts."""

import time
import tracemalloc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refit.gen_side.bare import join_ranks, load
from refit.gen_side.generator import GenParallel
from refit.gen_side.loader.hf_index import read_hf_shapes
from refit.gen_side.loader.trace import trace_loader
from refit.plan import encode_rank_manifest
from tests.gen_side.checkpoints import deepseek_shapes, header_only
from tests.gen_side.farm import run_ranks

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]


class _Allocations(TorchDispatchMode):
    """Bytes of every tensor with memory that an operator returns."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for out in tree_leaves(result):
            if isinstance(out, torch.Tensor) and not out.is_meta and not func.is_view:
                self.num_bytes += out.untyped_storage().nbytes()
        return result


def measure(rank, address, parallel, folder):
    from vllm.config import set_current_vllm_config

    join_ranks(folder, parallel, "bfloat16", rank, address)
    worker = load(folder, parallel, "bfloat16", rank, load_format="dummy")
    with set_current_vllm_config(worker.config):
        with _Allocations() as allocated:
            trace = trace_loader(worker.model, read_hf_shapes(folder))
        tracemalloc.start()
        started = time.perf_counter()
        shapes = read_hf_shapes(folder)
        trace = trace_loader(worker.model, shapes)
        text = encode_rank_manifest(trace.manifest(gen_rank=rank, stage=0, replica=0))
        seconds = time.perf_counter() - started
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        started = time.perf_counter()
        trace_loader(worker.model, shapes)
    return {
        "model_bytes": sum(torch.Size(shape).numel() * 2 for shape, _ in shapes.values()),
        "tensor_bytes": allocated.num_bytes,
        "python_peak_bytes": peak,
        "traced_s": time.perf_counter() - started,
        "with_tracemalloc_s": seconds,
        "manifest_bytes": len(text),
        "num_hf": len(shapes),
        "num_holdings": len(trace.holdings),
        "misc": trace.misc,
    }


def meta_shapes(config):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_describing_a_worker_allocates_less_than_a_hundredth_of_the_model(tmp_path):
    from transformers import Qwen3Config

    config = Qwen3Config(
        vocab_size=32000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=False, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    header_only(tmp_path, meta_shapes(config))
    (found,) = run_ranks(1, measure, GenParallel(), tmp_path)
    print(found)
    assert found["tensor_bytes"] + found["python_peak_bytes"] < 0.01 * found["model_bytes"]


def test_sixty_layers_of_256_experts_are_described_in_time_and_travel_small(tmp_path):
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=512, hidden_size=64, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=61,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=256, num_experts_per_tok=8,
        n_shared_experts=1, n_group=8, topk_group=4, first_k_dense_replace=3, q_lora_rank=64, kv_lora_rank=32,
        qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, topk_method="noaux_tc",
        architectures=["DeepseekV3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    header_only(tmp_path, deepseek_shapes(61, 256, 64, 32, 512))
    (found,) = run_ranks(1, measure, GenParallel(), tmp_path, timeout_s=600)
    print(found)
    assert found["traced_s"] <= 20
    assert found["manifest_bytes"] <= 2 << 20

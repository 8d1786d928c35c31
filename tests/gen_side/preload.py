"""Imported once by the parent of all ranks: every rank of a test is then a fork with vLLM already imported."""

import importlib
import os

from refit.gen_side.generator import ENVIRONMENT

for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

MODULES = (
    "transformers",
    "vllm.engine.arg_utils",
    "vllm.model_executor.model_loader",
    "vllm.v1.worker.cpu_worker",
    "refit.gen_side.audit",
    *(
        f"vllm.model_executor.models.{family}"
        for family in ("qwen2", "qwen3", "qwen3_moe", "llama", "deepseek_v2", "nemotron_h")
    ),
)
for module in MODULES:
    importlib.import_module(module)

# vLLM looks at each architecture in a process of its own, which imports vLLM again, only to keep CUDA out of the
# caller. There is no CUDA to keep out here.
registry = importlib.import_module("vllm.model_executor.models.registry")
registry._run_in_subprocess = lambda look: look()

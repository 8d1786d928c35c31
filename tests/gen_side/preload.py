"""Imported once by the fork server: every rank of a test is then a fork with vLLM already imported."""

import os

from refit.gen_side.generator import ENVIRONMENT

for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

import transformers  # noqa: E402, F401
import vllm  # noqa: E402
import vllm.engine.arg_utils  # noqa: E402
import vllm.model_executor.model_loader  # noqa: E402
import vllm.model_executor.models.qwen3_moe  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401

import refit.gen_side.audit  # noqa: E402, F401

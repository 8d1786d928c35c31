"""Real jobs of the families and layouts that the gate lets through: two steps, both refits audited."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.test_main_job import run_job

pytestmark = [
    pytest.mark.ray, pytest.mark.vllm, pytest.mark.megatron, pytest.mark.slow, pytest.mark.timeout(900),
]  # fmt: skip

SHORT = [
    "+policy.nccl_xfer_refit=true",
    "grpo.steps=2",
    "grpo.prompts_per_step=4",
    "grpo.samples_per_prompt=4",
    "refit.verify_every=1",
]
JOBS = {
    "Mamba hybrid, PP2 to TP2": ["policy.model=tiny-nemotron-h-dense"],
    "MLA, stages of 1 and 2 layers to TP2": [
        "policy.model=tiny-deepseek-v3",
        "policy.first_stage_layers=1",
    ],
    "MLA, TP2 EP2 to TP1": [
        "policy.model=tiny-deepseek-v3",
        "policy.pipeline_parallel=1",
        "policy.tensor_parallel=2",
        "policy.expert_parallel=2",
        "generation.tensor_parallel=1",
    ],
    "MoE, TP2 EP2 to TP2": [
        "policy.model=tiny-qwen3-moe",
        "policy.pipeline_parallel=1",
        "policy.tensor_parallel=2",
        "policy.expert_parallel=2",
    ],
    "dense, two virtual stages to TP1": ["policy.virtual_pipeline=2", "generation.tensor_parallel=1"],
}


@pytest.mark.parametrize("overrides", JOBS.values(), ids=JOBS)
def test_a_job_of_a_family_and_layout_trains_and_its_refits_are_exact(
    overrides: list[str], tmp_path: Path
) -> None:
    summary = run_job([*SHORT, *overrides], {}, tmp_path)
    assert summary["steps"] == summary["weight_version"] == summary["audits"] == 2
    assert summary["gen_kl_max"] <= 5e-3
    assert summary["bulk_share"] >= 0.999

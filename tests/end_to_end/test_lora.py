"""Jobs that train adapters: after each refit the engines answer as a checkpoint that PEFT merged, loaded from disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from refit.service.waiting import collect
from tests.end_to_end.jobs import CALL_S, Job, open_job, some_batch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.vllm,
    pytest.mark.megatron,
    pytest.mark.timeout(900),
]

FP32 = ("policy.precision=fp32", "generation.precision=fp32", "policy.lr=0.01", "policy.kl_coef=0")
LORA = ("policy.lora_rank=8", "policy.lora_alpha=16")
PROMPTS = [tuple(range(40 + k, 52 + k)) for k in range(4)]


@pytest.fixture(scope="module", params=["merged", "adapter"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["tp2_to_tp1", "tp1_to_tp2"])
def job(
    request: pytest.FixtureRequest, mode: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Job, Path]]:
    folder = tmp_path_factory.mktemp(f"{request.param}-{mode}")
    with open_job(request.param, folder, (*FP32, *LORA, f"policy.lora_refit={mode}")) as opened:
        yield opened, folder


def greedy(actor: Any) -> list[tuple[int, ...]]:
    answers = actor.generate.remote(PROMPTS, 1, 8, 0.0, 0)
    return [row[1] for row in collect({"generator 0": answers}, "generate", CALL_S)["generator 0"]]


def save_adapter(actor: Any, folder: str) -> None:
    """The trainers' adapters as Bridge exports them for PEFT; collective."""
    from megatron.bridge.peft.lora import LoRA

    policy = actor._policy._policy
    policy.bridge.save_hf_adapter(policy.chunks, folder, LoRA(dim=8, alpha=16), show_progress=False)


def answers_of_peft(base: Path, adapter: Path, merged: Path) -> list[tuple[int, ...]]:
    """Greedy answers of transformers on what PEFT merged and wrote to disk."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(merged)
    loaded = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    found = []
    with torch.no_grad():
        for prompt in PROMPTS:
            tokens = loaded.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
            found.append(tuple(tokens[0, len(prompt) :].tolist()))
    return found


def test_after_each_refit_the_engine_answers_as_what_peft_merged_from_the_trainers_adapters(
    job: tuple[Job, Path], mode: str
) -> None:
    opened, folder = job
    engine, seen = opened.cluster.generators[0], []
    with opened.path("p2p") as coordinator:
        for version in (1, 2):
            opened.train(some_batch(), num_steps=3)
            record = opened.refit(coordinator)
            assert record.committed, record.reason
            adapter = folder / f"adapter-{version}"
            calls = {
                who: actor.__ray_call__.remote(save_adapter, str(adapter))
                for who, actor in opened.cluster.named_trainers().items()
            }
            collect(calls, "save adapter", CALL_S)
            seen.append(greedy(engine))
            assert seen[-1] == answers_of_peft(folder / "model", adapter, folder / f"merged-{version}")
            report = coordinator.verify()
            assert report.ok, (report.mismatches, report.changed_params)
        if mode == "adapter":
            on_disk = (adapter / "adapter_model.safetensors").stat().st_size
            moved = record.bulk_bytes + record.misc_bytes
            assert 0.95 * on_disk < moved <= 1.05 * on_disk, (moved, on_disk)
            assert record.wire_bytes == 0
        else:
            assert record.bulk_share >= 0.99
    assert seen[0] != seen[1], "the second refit changed nothing"

"""The command that users run, as they run it: a process of its own, judged by its last line and by what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.megatron, pytest.mark.timeout(900)]

KEYS = {
    "steps",
    "reward_first",
    "reward_last",
    "gen_kl_max",
    "refit_s_p50",
    "bulk_bytes",
    "misc_bytes",
    "bulk_share",
    "weight_version",
}
KL_LIMIT = 1.2e-2
MARK = "REFIT_TEST_JOB"
SECRETS = {"HF_TOKEN": "hf_s3cr3t-of-the-test", "WANDB_API_KEY": "wandb-s3cr3t-of-the-test"}
CASES = [
    pytest.param("p2p", ["+policy.nccl_xfer_refit=true"], {}, id="plus"),
    pytest.param("p2p", ["++policy.nccl_xfer_refit=true"], {}, id="plus-plus", marks=pytest.mark.slow),
    pytest.param(
        "p2p",
        ["+policy.nccl_xfer_refit=true", "refit.transport=nixl"],
        {},
        id="one-sided-reads",
        marks=pytest.mark.slow,
    ),
    pytest.param("conventional", [], {}, id="no-flag", marks=pytest.mark.slow),
    pytest.param(
        "golden",
        ["+policy.nccl_xfer_refit=true"],
        {"NRL_XFERDTENSOR_GOLDEN": "1"},
        id="golden",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("path", "flags", "environment"), CASES)
def test_the_main_job_runs_and_leaves_records_and_no_process(
    path: str, flags: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    summary = run_job([*flags, "grpo.steps=2", "refit.verify_every=1"], environment, tmp_path)
    assert summary.keys() >= KEYS
    assert summary["path"] == path
    assert summary["steps"] == summary["weight_version"] == summary["audits"] == 2
    assert summary["gen_kl_max"] <= 5e-3
    assert summary["bulk_share"] >= 0.99 if path != "conventional" else summary["bulk_bytes"] == 0
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [step["weight_version"] for step in steps] == [0, 1, 2]
    assert any(file.name.startswith("events.out.tfevents") for file in tmp_path.rglob("*"))


@pytest.mark.slow
def test_a_job_whose_engine_stores_fp8_audits_equal_stays_near_its_trainers_and_sends_fewer_bytes(
    tmp_path: Path,
) -> None:
    command = ["--config-name", "bf16_to_fp8", "+policy.nccl_xfer_refit=true", "grpo.steps=2"]
    found = {
        precision: run_job(
            [*command, f"generation.precision={precision}", "refit.verify_every=1"], {}, tmp_path / precision
        )
        for precision in ("fp8", "bf16")
    }
    print(json.dumps(found))
    for summary in found.values():
        assert summary["steps"] == summary["weight_version"] == summary["audits"] == 2
        assert summary["bulk_share"] >= 0.99
    assert 0 < found["bf16"]["gen_kl_max"] < found["fp8"]["gen_kl_max"] <= KL_LIMIT
    assert found["fp8"]["bulk_bytes"] < 0.6 * found["bf16"]["bulk_bytes"]  # embeddings and head stay in bf16


def run_job(
    arguments: list[str], environment: dict[str, str], folder: Path, timeout_s: float = 800.0
) -> dict[str, Any]:
    """Run `python -m refit.run` and return its last line; fails if a process of it is left."""
    mark = str(folder)
    done = subprocess.run(
        [sys.executable, "-m", "refit.run", *arguments, f"run_dir={folder}"],
        env=os.environ | environment | SECRETS | {MARK: mark},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not marked_processes(mark)
    assert not secrets_in(folder, done.stdout + done.stderr)
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def secrets_in(folder: Path, printed: str) -> list[str]:
    """Where a secret of the job's environment shows up: files of its run folder, or what it printed."""
    values = [value.encode() for value in SECRETS.values()]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".log" for path in files), "a job writes logs"
    found = [str(path) for path in files if any(value in path.read_bytes() for value in values)]
    return found + ["printed"] * any(value in printed.encode() for value in values)


def marked_processes(mark: str) -> list[psutil.Process]:
    """Live processes that inherited the mark of one run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass  # gone, or not ours to look into
    return found

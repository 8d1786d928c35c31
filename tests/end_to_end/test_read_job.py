"""A job under way is read and compared from another process, and goes on as if nobody had."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.vllm,
    pytest.mark.megatron,
    pytest.mark.timeout(900),
]

START_S = 600.0
EMBEDDING = "model.embed_tokens.weight"


def command(*words: str, timeout_s: float = 240.0) -> tuple[int, dict[str, object], str]:
    """(exit code, last line as JSON, everything printed) of `python -m refit`."""
    done = subprocess.run(
        [sys.executable, "-m", "refit", *words, "--json"], capture_output=True, text=True, timeout=timeout_s
    )
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stdout + done.stderr


def test_a_running_job_is_read_and_its_trainers_equal_its_engines(tmp_path: Path) -> None:
    log = (tmp_path / "job.log").open("w")
    run_dir = tmp_path / "run"
    job = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "refit.run",
            "+policy.nccl_xfer_refit=true",
            "grpo.steps=400",
            f"run_dir={run_dir}",
        ],
        stdout=log,
        stderr=log,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        deadline_s = time.monotonic() + START_S
        while not (run_dir / "control.json").exists():
            assert job.poll() is None, (tmp_path / "job.log").read_text()[-3000:]
            assert time.monotonic() < deadline_s, "the job did not start"
            time.sleep(0.5)
        where = ("--run-dir", str(run_dir))
        code, row, words = command("read", f"{EMBEDDING}[256]", *where)
        assert code == 0 and row["shape"][0] == 1, words
        assert row["ranks"] == [1] and row["moved_bytes"] <= 64 << 10, words
        code, whole, words = command("read", "model.layers.0.self_attn.k_proj.weight", *where)
        assert code == 0 and whole["ranks"] == [0, 1], words
        code, report, words = command("diff", "trainers", "engine:0", *where)
        assert code == 0 and report["equal"] and report["num_tensors"] > 10, words
        assert report["versions"][1] > 0
        code, report, words = command("diff", str(run_dir / "model"), "engine:0", "--only", "*mlp*", *where)
        assert code == 1 and report["differences"], words  # it has learned since
        assert job.poll() is None
    finally:
        job.send_signal(signal.SIGTERM)
        code = job.wait(120.0)
        log.close()
    assert code == 130, (tmp_path / "job.log").read_text()[-3000:]
    assert not (run_dir / "control.json").exists()
    steps = [json.loads(line) for line in (run_dir / "steps.jsonl").read_text().splitlines()]
    assert steps and all(step["gen_kl"] <= 5e-3 for step in steps)

"""The disk of the run folder fills up in the middle of a job: it costs records, not the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.test_main_job import MARK, marked_processes

pytestmark = [
    pytest.mark.ray,
    pytest.mark.vllm,
    pytest.mark.megatron,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

OWN_DISK = ["unshare", "--map-root-user", "--mount"]
MOUNT = "mount -t tmpfs -o size=24m none"
SCRIPT = f"""
disk=$1 kept=$2; shift 2
{MOUNT} "$disk" || exit 77
"$@" "run_dir=$disk/run" & job=$!
until [ -s "$disk/run/steps.jsonl" ] || ! kill -0 $job 2>/dev/null; do sleep 0.1; done
head -c 64m /dev/zero > "$disk/ballast" 2>/dev/null
wait $job; code=$?
df --output=avail "$disk" | tail -1 >&2
cp "$disk/run/steps.jsonl" "$disk/run/refits.jsonl" "$kept"
exit $code
"""
STEPS = 4


def test_a_disk_that_fills_up_after_the_first_step_costs_records_and_not_the_run(tmp_path: Path) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    probe = subprocess.run([*OWN_DISK, "bash", "-c", f'{MOUNT} "$1"', "probe", str(disk)])
    if probe.returncode != 0:
        pytest.skip("a disk of one's own needs a user namespace")
    job = [sys.executable, "-m", "refit.run", "+policy.nccl_xfer_refit=true", f"grpo.steps={STEPS}"]
    options = ["refit.verify_every=2", "grpo.checkpoint_every=3", "grpo.prompts_per_step=4"]
    done = subprocess.run(
        [*OWN_DISK, "bash", "-c", SCRIPT, "job", str(disk), str(kept), *job, *options],
        env=os.environ | {MARK: str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not marked_processes(str(tmp_path))
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["steps"] == summary["weight_version"] == STEPS and summary["audits"] == STEPS // 2
    assert done.stderr.splitlines()[-1].strip() == "0", "the disk was full to the end"
    assert "could not be written" in done.stderr and "No space left" in done.stderr
    steps = [json.loads(line) for line in (kept / "steps.jsonl").read_text().splitlines()]
    refits = [json.loads(line) for line in (kept / "refits.jsonl").read_text().splitlines()]
    assert len(steps) >= 1, "short lines may still fit into the last page of the file"
    assert all(refit["committed"] for refit in refits) and len(refits) < STEPS

"""`python -m refit validate` as a user runs it: real Megatron-Core, real vLLM, real processes."""

import contextlib
import json
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = [pytest.mark.megatron, pytest.mark.vllm, pytest.mark.processes, pytest.mark.timeout(900)]


def validate(folder, *words, timeout_s):
    """(exit status, standard output, last line as JSON) of a run that leaves no process of its own behind."""
    with (folder / "out").open("w") as out, (folder / "errors").open("w") as errors:
        run = subprocess.Popen(
            [sys.executable, "-m", "refit", "validate", "--json", *words], stdout=out, stderr=errors
        )
    below: set[psutil.Process] = set()
    try:
        deadline = time.monotonic() + timeout_s
        while run.poll() is None:
            assert time.monotonic() < deadline, f"validate {words} still runs after {timeout_s} s"
            with contextlib.suppress(psutil.NoSuchProcess):
                below |= set(psutil.Process(run.pid).children(recursive=True))
            time.sleep(1.0)
    finally:
        run.kill()
        text = (folder / "out").read_text()
        print(text, (folder / "errors").read_text())
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive
    return run.returncode, text, json.loads(text.splitlines()[-1])


def test_the_small_matrix_passes_bit_for_bit_and_almost_all_of_it_is_bulk(tmp_path):
    status, out, summary = validate(tmp_path, "--matrix", "l0", timeout_s=800)
    assert status == 0
    assert summary["cases"] == summary["passed"] >= 10
    assert summary["failed"] == 0 and summary["unrunnable"] == []
    assert summary["bulk_share_min"] >= 0.99
    assert "the loader computes the value it stores" in out  # every misc tensor has its reason


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_large_matrix_passes_bit_for_bit(tmp_path):
    status, _, summary = validate(tmp_path, "--matrix", "l1", timeout_s=2300)
    assert status == 0
    assert summary["passed"] >= 40 and summary["failed"] == 0
    assert summary["bulk_share_min"] >= 0.99 > summary["bulk_share_min_of_unknown_families"] > 0
    assert all(row["reason"] for row in summary["unrunnable"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quantized_engines_hold_what_loading_a_quantized_checkpoint_gives_bit_for_bit(tmp_path):
    status, _, summary = validate(tmp_path, "--matrix", "fp8", timeout_s=1100)
    assert status == 0
    assert summary["passed"] == summary["cases"] >= 10
    assert summary["bulk_share_min"] == 1.0
    assert 0 < summary["kl_max"] <= 1.2e-2
    assert summary["logprob_delta_max"] == 0

"""A stock vLLM server, started as its users start it, is refitted by trainers that know it only by its address."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from refit import cli
from refit.service.access import server_reader
from refit.service.http_refit import HttpRefit, join_source, next_version
from refit.train_side.tiny_models import make_tiny_model
from refit.transfer.source import ModelSource
from tests.gen_side.checkpoints import tensors_of
from tests.service.vllm_server import free_port, greedy, serving

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROMPTS = [
    [40, 41, 42, 43],
    [65, 66, 67],
    [7 * k % 250 for k in range(70)],
]  # the last one fills cache blocks

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.processes, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return make_tiny_model("tiny-qwen3", tmp_path_factory.mktemp("start") / "model", dtype="bfloat16")


@pytest.fixture(scope="module")
def server(start, tmp_path_factory):
    with serving(start, tmp_path_factory.mktemp("server") / "log.txt") as engine:
        yield engine


def test_every_tensor_is_read_from_a_server_that_nobody_has_refitted(server, start, capsys):
    before = greedy(server, PROMPTS)
    with server_reader(server.url) as reader:
        wrong = [n for n, t in tensors_of(start).items() if not torch.equal(reader.read(n).tensor, t)]
        row = reader.read("model.embed_tokens.weight", 258)
    assert wrong == []
    assert row.version == 0 and row.moved_bytes <= 64 << 10
    assert cli.main(["diff", str(start), server.url]) == 0
    assert " 0 differ, 0 not compared" in capsys.readouterr().out
    assert greedy(server, PROMPTS) == before


@pytest.mark.parametrize("script", ["plain_torch_source.py", "fsdp2_source.py"])
def test_a_server_answers_like_a_fresh_one_loaded_from_the_exported_checkpoint(
    script, server, start, tmp_path
):
    before = greedy(server, PROMPTS)
    last = next_version([server]) + 1  # a script refits twice
    launch = [sys.executable, str(EXAMPLES / script)]
    if script == "fsdp2_source.py":
        run = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
        launch = [sys.executable, *run, str(EXAMPLES / script), "--store-port", str(free_port())]
    done = subprocess.run(
        [*launch, "--model", str(start), "--url", server.url, "--save", str(tmp_path / "saved")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert f"version {last}:" in done.stdout and " equal" in done.stdout, done.stdout
    assert server.weight_version() == str(last)
    after = greedy(server, PROMPTS)
    assert after != before, "the refits changed nothing"
    with serving(tmp_path / "saved", tmp_path / "fresh.txt") as fresh:
        assert after == greedy(fresh, PROMPTS)


def test_a_server_answers_while_a_version_is_on_its_way(server, start):
    before = greedy(server, PROMPTS)
    version = next_version([server])
    refitter = HttpRefit.open([server], 1, timeout_s=120.0)
    with ThreadPoolExecutor(1) as pool:
        planned = pool.submit(refitter.prepare)
        source = join_source(ModelSource(tensors_of(start), 0), refitter.store, refitter.run_id)
        assert planned.result(120.0).misc_names == ()
        done = pool.submit(refitter.refit, version)
        time.sleep(2.0)  # the server waits for bulk that nobody sends yet
        assert greedy(server, PROMPTS) == before and not done.done()
        source.send(version)
        assert done.result(120.0).committed
    assert server.weight_version() == str(version)
    source.close()
    refitter.close()

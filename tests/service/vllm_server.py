"""A real `vllm serve` process on loopback, ended with everything that it started."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from refit.gen_side.generator import ENVIRONMENT
from refit.service.http_engine import HttpEngine
from refit.transfer.errors import TransportError

READY_S = 240.0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(model: Path, log: Path, *arguments: str) -> Iterator[HttpEngine]:
    """Serve `model` with the refit backend until the block ends."""
    port = free_port()
    # What `vllm serve` starts; its command line itself looks for a distribution that the CPU wheel is not named after.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--port", str(port)]
    command += ["--host", "127.0.0.1", "--weight-transfer-config", '{"backend": "refit"}']
    command += ["--skip-tokenizer-init", "--enable-scale-out", "--enforce-eager", "--max-model-len", "128"]
    command += [
        "--max-num-seqs",
        "8",
        "--block-size",
        "32",
        "--kv-cache-memory-bytes",
        str(64 << 20),
        *arguments,
    ]
    extra = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_HOST_IP": "127.0.0.1"}
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, env=os.environ | ENVIRONMENT | extra, stdout=stream, stderr=stream
        )
    engine = HttpEngine(f"http://127.0.0.1:{port}")
    try:
        wait_ready(engine, process, log)
        yield engine
    finally:
        family = [process, *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        try:
            process.wait(20.0)
        except subprocess.TimeoutExpired:
            process.kill()
        left = [member for member in family[1:] if member.is_running()]
        for member in left:
            member.kill()
        psutil.wait_procs(left, 10.0)


def wait_ready(engine: HttpEngine, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + READY_S
    while True:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            engine.wait_ready(1.0)
        except TransportError:
            assert time.monotonic() < deadline_s, log.read_text()[-3000:]
        else:
            return


def greedy(engine, prompts, max_tokens=12):
    """The tokens that the server answers to each prompt of token ids."""
    answers = []
    for prompt in prompts:
        sampling = {"temperature": 0.0, "max_tokens": max_tokens, "detokenize": False, "ignore_eos": True}
        body = json.dumps({"token_ids": prompt, "sampling_params": sampling}).encode()
        request = urllib.request.Request(
            f"{engine.url}/inference/v1/generate", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60.0) as answer:
            answers.append(json.loads(answer.read())["choices"][0]["token_ids"])
    return answers

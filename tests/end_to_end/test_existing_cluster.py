"""The main job on a Ray that somebody else started: it joins, works, leaves, and that Ray stays up and empty."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from refit.service.actors import free_port
from tests.end_to_end.test_main_job import run_job

pytestmark = [
    pytest.mark.ray,
    pytest.mark.vllm,
    pytest.mark.megatron,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

START_S = 120.0
STATUS_S = 30.0  # Ray writes its status anew every 5 s
RAY = Path(sys.executable).with_name("ray")
JOB = ["+policy.nccl_xfer_refit=true", "grpo.steps=2", "refit.verify_every=1"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node with a token of its own, and a port for clients.

    Yields the environment that a driver of it needs, REFIT_TEST_ADDRESS, and REFIT_TEST_CLIENT for clients.
    """
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    port, client_port = free_port(), free_port()
    # Blocking, as a process of ours: `ray stop` would end every Ray of this machine.
    start = [str(RAY), "start", "--head", "--block", "--port", str(port), "--num-cpus", "8"]
    start += ["--labels", "zone=east", "--ray-client-server-port", str(client_port)]
    with subprocess.Popen([*start, "--include-dashboard=false"], env=os.environ | environment) as head:
        wait_until_listening(port, head)
        wait_until_listening(client_port, head)
        yield environment | {
            "REFIT_TEST_ADDRESS": f"127.0.0.1:{port}",
            "REFIT_TEST_CLIENT": f"ray://127.0.0.1:{client_port}",
        }
        head.terminate()
        head.wait(60)


def test_the_job_runs_on_a_cluster_by_address_and_leaves_it_up_and_empty(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    address = cluster["REFIT_TEST_ADDRESS"]
    places = ["++cluster.policy_labels={zone:east}", "++cluster.generation_labels={zone:east}"]
    summary = run_job([*JOB, f"cluster.address={address}", *places], cluster, tmp_path)
    assert summary["weight_version"] == summary["audits"] == 2
    wait_until_empty(cluster)


def test_the_job_runs_as_a_client_of_the_cluster_and_says_that_nobody_serves_its_metrics(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "refit.run", *JOB, f"cluster.address={cluster['REFIT_TEST_CLIENT']}"]
    done = subprocess.run(
        [*command, f"run_dir={tmp_path}"],
        env=os.environ | cluster,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["weight_version"] == summary["audits"] == 2
    assert "metrics: not exported" in done.stderr
    wait_until_empty(cluster)


def test_without_the_clusters_token_the_job_names_the_address_and_the_way_out(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    address = cluster["REFIT_TEST_ADDRESS"]
    without = os.environ | {"RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "refit.run", *JOB, f"cluster.address={address}", f"run_dir={tmp_path}"]
    done = subprocess.run(command, env=without, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert address in done.stderr
    assert "RAY_AUTH_MODE=token" in done.stderr


def test_the_doctor_examines_the_nodes_of_the_cluster_their_clocks_and_versions(
    cluster: dict[str, str],
) -> None:
    address = cluster["REFIT_TEST_ADDRESS"]
    command = [sys.executable, "-m", "refit", "doctor", "--json", "--cluster", address]
    done = subprocess.run(command, env=os.environ | cluster, capture_output=True, text=True, timeout=200)
    nodes = json.loads(done.stdout)["nodes"]
    assert nodes[f"cluster {address}"][0]["found"] == "1 live nodes"
    (remote,) = [checks for name, checks in nodes.items() if " (" in name]
    compared = {check["name"]: check["state"] for check in remote if check["area"] == "cluster"}
    assert compared == {"versions": "ok", "clock": "ok"}
    assert {"Python", "memory", "localhost"} <= {check["name"] for check in remote}
    without = subprocess.run(
        command, env=os.environ | {"RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True, timeout=200
    )
    assert without.returncode == 1
    (refused,) = json.loads(without.stdout)["nodes"][f"cluster {address}"]
    assert refused["state"] == "fail"
    assert "RAY_AUTH_MODE=token" in refused["advice"]


def wait_until_listening(port: int, head: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        assert head.poll() is None, f"ray start ended with {head.returncode}"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(f"no Ray on port {port} after {START_S} s")


def wait_until_empty(cluster: dict[str, str]) -> None:
    """Until nothing of a job is left on it."""
    deadline_s = time.monotonic() + STATUS_S
    while "0.0/8.0 CPU" not in (
        status := ray(["status", "--address", cluster["REFIT_TEST_ADDRESS"]], cluster)
    ):
        assert time.monotonic() < deadline_s, status
        time.sleep(1.0)


def ray(arguments: list[str], environment: dict[str, str]) -> str:
    """Run Ray's own command and return what it printed."""
    command = [str(RAY), *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

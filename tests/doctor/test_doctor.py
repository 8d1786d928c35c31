"""`python -m refit doctor` as a process, in environments that are broken on purpose."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import pytest

from refit.doctor.examine import Wishes

ROOT = Path(__file__).resolve().parent.parent.parent
CLEAN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("NCCL_", "UCX_", "GLOO_", "RAY_", "NRL_", "VLLM_", "REFIT_"))
    and name.lower()
    not in ("http_proxy", "pythondontwritebytecode", "omp_num_threads", "cuda_launch_blocking")
    and name != "TMPDIR"
}


def doctor(
    *words: str, python: Path | str = sys.executable, **environ: str
) -> tuple[int, dict[str, dict[str, Any]]]:
    """(exit code, {check: what it says})."""
    done = subprocess.run(
        [python, "-m", "refit", "doctor", "--json", *words],
        env=CLEAN | {"PYTHONPATH": str(ROOT)} | environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (0, 1), done.stderr
    document = json.loads(done.stdout)
    (checks,) = document["nodes"].values()
    assert document["ok"] == (done.returncode == 0)
    assert document["counts"]["fail"] == sum(check["state"] == "fail" for check in checks)
    return done.returncode, {check["name"]: check for check in checks}


def test_this_environment_is_fit_and_every_area_is_looked_at(tmp_path: Path) -> None:
    code, checks = doctor("--run-dir", str(tmp_path))
    assert code == 0, [check for check in checks.values() if check["state"] == "fail"]
    assert {check["area"] for check in checks.values()} >= {
        "versions",
        "machine",
        "network",
        "GPUs",
        "settings",
        "leftovers",
    }
    assert any("torch 2.13.0" in check["found"] for check in checks.values())
    assert checks["environment"]["state"] == "ok"
    assert all(check["advice"] for check in checks.values() if check["state"] != "ok")


def test_an_environment_with_nothing_in_it_gets_a_plain_table_that_names_what_is_missing(
    tmp_path: Path,
) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    tree = tmp_path / "tree"  # an editable install leaves its metadata, plug-in included, in ROOT
    tree.mkdir()
    for entry in ("refit", "requirements", "pyproject.toml", "launch"):
        (tree / entry).symlink_to(ROOT / entry)
    done = subprocess.run(
        [tmp_path / "bare" / "bin" / "python", "-m", "refit", "doctor"],
        env=CLEAN | {"PYTHONPATH": str(tree)},
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "torch==2.13.0" in done.stdout
    assert "source launch/setup.sh" in done.stdout
    assert "failures: missing packages, vLLM plug-in" in done.stdout.splitlines()[-1]


def test_every_fault_of_a_broken_environment_is_named_in_one_run(tmp_path: Path) -> None:
    """Another torch, metadata without a version, a taken port, a file in the way, an open token, no such interface."""
    metadata = tmp_path / "torch-2.0.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.0.1\n")
    (tmp_path / "ray-2.60.0.dist-info").mkdir()
    (tmp_path / "file").write_text("")
    token = tmp_path / "token"
    token.write_text("secret-of-this-test")
    token.chmod(0o644)
    environ = {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_AUTH_TOKEN": "secret-of-this-test",
        "NCCL_SOCKET_IFNAME": "nosuch0",
    }
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, checks = doctor("--port", str(port), "--run-dir", str(tmp_path / "file" / "run"), **environ)
    assert code == 1
    states = {name: check["state"] for name, check in checks.items()}
    assert checks["torch"]["found"] == "2.0.1, torch==2.13.0 is wanted"
    assert "torch 2.0.1 (pinned 2.13.0)" in checks["pins"]["found"]
    assert "ray==2.60.0" in checks["missing packages"]["found"]
    assert str(port) in checks["fixed ports"]["found"]
    assert "is not a folder" in checks["disk, run folder"]["found"]
    assert states["NCCL_SOCKET_IFNAME"] == "fail"
    assert states["RAY_AUTH_TOKEN_PATH"] == states["RAY_AUTH_TOKEN"] == "warn"
    assert "secret-of-this-test" not in json.dumps(checks)


def test_a_cluster_that_does_not_answer_fails_with_its_address() -> None:
    """Without Ray in the environment too: no import stands in the way of the other checks."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "refit", "doctor", "--json", "--cluster", "127.0.0.1:1"],
        env=CLEAN | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    checks = json.loads(done.stdout)["nodes"]["cluster 127.0.0.1:1"]
    assert checks[0]["state"] == "fail"
    assert "install ray" in checks[0]["advice"]


def test_an_address_where_nobody_listens_is_said_at_once_and_not_after_minutes_of_ray() -> None:
    nodes = pytest.importorskip("refit.service.nodes")
    started_s = time.monotonic()
    ((where, (check,)),) = nodes.examine_nodes("127.0.0.1:1", Wishes(Path(), 0), 20.0).items()
    assert time.monotonic() - started_s < 20.0
    assert where == "cluster 127.0.0.1:1" and check.state == "fail"
    assert check.found == "nobody listens at 127.0.0.1:1" and "head node" in check.advice


@pytest.mark.skipif(shutil.which("python3.11", path="/usr/bin") is None, reason="no Python 3.11 in /usr/bin")
def test_an_older_python_is_told_so_in_words() -> None:
    done = subprocess.run(
        ["/usr/bin/python3.11", "-m", "refit", "doctor"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith("refit needs Python 3.12, this is 3.11")


def test_a_port_that_is_none_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "refit", "doctor", "--port", "70000"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "--port 70000" in done.stderr

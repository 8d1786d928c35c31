"""What the command line accepts, and how it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refit import run
from refit.plan.errors import ConfigError
from refit.run import config_folder, load_config, main
from refit.service.build_options import gen_options
from refit.service.config import known_keys

ROOT = Path(__file__).resolve().parents[2]


def job(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command line, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "refit.run", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("flag", ["+policy.nccl_xfer_refit=true", "++policy.nccl_xfer_refit=true"])
def test_the_flag_is_added_with_one_plus_and_with_two(flag):
    assert load_config("default", [flag]).path == "p2p"


def test_without_the_flag_the_refit_is_the_conventional_one():
    assert load_config("default").path == "conventional"


def test_the_flag_can_be_switched_off_by_name():
    assert load_config("default", ["+policy.nccl_xfer_refit=false"]).path == "conventional"


def test_the_golden_variable_turns_bulk_moves_golden(monkeypatch):
    monkeypatch.setenv("NRL_XFERDTENSOR_GOLDEN", "1")
    assert load_config("default", ["+policy.nccl_xfer_refit=true"]).path == "golden"
    assert load_config("default").path == "conventional"


def test_a_golden_variable_that_is_neither_0_nor_1_is_refused(monkeypatch):
    monkeypatch.setenv("NRL_XFERDTENSOR_GOLDEN", "yes")
    with pytest.raises(ConfigError, match="NRL_XFERDTENSOR_GOLDEN is 'yes'"):
        load_config("default")


def test_the_number_of_streams_comes_from_the_environment_unless_it_is_given(monkeypatch):
    monkeypatch.setenv("NRL_REFIT_NUM_STREAMS", "5")
    assert load_config("default").num_streams == 5
    assert load_config("default", ["refit.num_streams=3"]).num_streams == 3


def test_a_step_has_the_time_limit_of_refits_unless_it_has_one_of_its_own():
    config = load_config("default", ["refit.timeout_s=30"])
    assert config.step_timeout_s == 30.0 and gen_options(config)["call_timeout_s"] == 600.0
    config = load_config("default", ["refit.timeout_s=30", "grpo.timeout_s=3600"])
    assert config.step_timeout_s == 3600.0 and gen_options(config)["call_timeout_s"] == 3600.0


@pytest.mark.parametrize(("stages", "streams"), [(1, 1), (4, 4), (16, 16), (40, 16)])
def test_the_number_of_streams_is_that_of_the_trainer_stages_by_default_up_to_16(
    monkeypatch, stages, streams
):
    monkeypatch.delenv("NRL_REFIT_NUM_STREAMS", raising=False)
    config = load_config("default", [f"policy.pipeline_parallel={stages}"])
    assert config.refit.num_streams is None and config.num_streams == streams


@pytest.mark.parametrize(
    ("name", "trainers", "engines"),
    [
        ("default", (1, 2, 1, 1), (2, 1, 1)),
        ("tp2_to_tp1", (2, 1, 1, 1), (1, 1, 1)),
        ("tp1_to_tp2", (1, 1, 1, 1), (2, 1, 1)),
        ("ep2_moe_to_tp2", (1, 1, 2, 2), (2, 1, 1)),
        ("pp2_to_pp2_tp2", (1, 2, 1, 1), (2, 2, 1)),
        ("dp2_to_2x_tp1", (1, 1, 1, 2), (1, 1, 2)),
    ],
)
def test_each_named_configuration_has_the_layout_of_its_name(name, trainers, engines):
    config = load_config(name)
    policy, generation = config.policy, config.generation
    assert trainers == (
        policy.tensor_parallel,
        policy.pipeline_parallel,
        policy.expert_parallel,
        policy.data_parallel,
    )
    assert engines == (generation.tensor_parallel, generation.pipeline_parallel, generation.replicas)


def test_every_configuration_file_composes_with_every_key_present_but_the_flag():
    for file in config_folder().glob("*.yaml"):
        load_config(file.stem)
    text = (config_folder() / "default.yaml").read_text()
    missing = [key for key in known_keys() if f"{key.rpartition('.')[2]}:" not in text]
    assert missing == ["policy.nccl_xfer_refit"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("policy.tensor_paralel=2", ["'policy.tensor_paralel'", "did you mean 'policy.tensor_parallel'"]),
        (
            "+policy.nccl_xfer_refitt=true",
            ["'policy.nccl_xfer_refitt'", "did you mean 'policy.nccl_xfer_refit'"],
        ),
        ("++grpo.stepz=3", ["'grpo.stepz'", "did you mean 'grpo.steps'"]),
        ("refitt.backend=gloo", ["did you mean 'refit.backend'"]),
        ("policy.nccl_xfer_refit=true", ["write +policy.nccl_xfer_refit=true"]),
        ("+policy.nccl_xfer_refit=maybe", ["policy.nccl_xfer_refit is 'maybe'", "true or false"]),
        ("+policy.tensor_parallel=2", ["policy.tensor_parallel"]),
        ("policy.tensor_parallel=two", ["policy.tensor_parallel=two", "Integer"]),
        ("~grpo.steps", ["no key can be removed"]),
        ("policy.lr", ["policy.lr", "write key=value"]),
        ("refit.timeout_s=abc", ["'abc'", "refit.timeout_s takes float, 120.0 by default"]),
        ("policy.first_stage_layers=x", ["policy.first_stage_layers takes int | null, null by default"]),
        ("refit.force_misc=norm", ["refit.force_misc takes a list such as [one,two], [] by default"]),
        ("grpo=3", ["grpo"]),
    ],
)
def test_a_wrong_override_is_refused_in_one_line_that_names_it(override, says):
    with pytest.raises(ConfigError) as refused:
        load_config("default", [override])
    message = str(refused.value)
    assert "\n" not in message
    for words in says:
        assert words in message


def test_a_misspelt_key_in_a_file_is_refused_with_the_nearest_key(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [job_schema, _self_]\npolicy:\n  tensor_paralel: 2\n")
    with pytest.raises(ConfigError, match=r"policy\.tensor_paralel.*did you mean 'policy\.tensor_parallel'"):
        load_config("mine", [], tmp_path)


def test_an_unknown_configuration_name_is_refused_with_those_that_are_there():
    with pytest.raises(ConfigError, match=r"'nope'.*default.*tp2_to_tp1"):
        load_config("nope")


def test_a_refused_command_line_prints_one_message_and_no_traceback():
    refused = job("policy.tensor_paralel=2")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("refit: refused: ")


def test_the_gate_refuses_from_the_command_line_and_leaves_no_run_folder(tmp_path):
    refused = job("policy.tensor_parallel=3", "grpo.samples_per_prompt=1", f"run_dir={tmp_path / 'run'}")
    assert refused.returncode == 2
    assert "policy.tensor_parallel = 3" in refused.stderr
    assert "grpo.samples_per_prompt = 1" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()


def test_composing_leaves_nothing_in_the_working_tree(tmp_path):
    before = sorted(path.name for path in ROOT.iterdir())
    printed = job("--cfg", "job", "+policy.nccl_xfer_refit=true")
    assert printed.returncode == 0, printed.stderr
    assert "nccl_xfer_refit: true" in printed.stdout
    assert sorted(path.name for path in ROOT.iterdir()) == before


def test_refusing_a_key_costs_no_import_of_torch_or_ray():
    code = (
        "import sys, refit.run; assert refit.run.main(['refit.timout_s=3']) == 2; "
        "print([name for name in ('torch', 'ray', 'vllm') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert "did you mean 'refit.timeout_s'" in found.stderr
    assert json.loads(found.stdout.replace("'", '"')) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("--cfg", "job", "--config-name", "tp2_to_tp1", "+policy.nccl_xfer_refit=true", "grpo.steps=7"),
        ("+policy.nccl_xfer_refit=true", "--config-name", "tp2_to_tp1", "grpo.steps=7", "--cfg", "job"),
        ("grpo.steps=7", "--config-name=tp2_to_tp1", "--cfg=job", "++policy.nccl_xfer_refit=true"),
    ],
)
def test_options_and_overrides_may_come_in_any_order(arguments, capfd):
    assert main(arguments) == 0
    printed = capfd.readouterr().out
    for line in ("steps: 7", "tensor_parallel: 2", "nccl_xfer_refit: true"):
        assert line in printed


def test_sigterm_interrupts_once_and_a_second_one_does_not_cut_the_clean_end_short() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with run._sigterm_interrupts():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    assert signal.getsignal(signal.SIGTERM) is before

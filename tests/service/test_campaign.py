"""The fault campaign as its command runs it; apart from the tests that hold a Ray of their own open."""

from __future__ import annotations

import json

import pytest
import ray

from refit.chaos.__main__ import a_ray, main
from refit.chaos.campaign import config_of
from refit.transfer.errors import TransportError

pytestmark = [pytest.mark.ray, pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(2400)]


def test_a_ray_of_somebody_else_is_neither_used_nor_ended():
    with a_ray(config_of(1, 4.0)):
        with (
            pytest.raises(TransportError, match="a Ray runs in this process already"),
            a_ray(config_of(1, 4.0)),
        ):
            raise AssertionError("it started")
        assert ray.is_initialized()


def test_a_hundred_random_faults_never_serve_a_torn_version(tmp_path, capsys):
    assert main(["--faults", "110", "--seed", "7", "--run-dir", str(tmp_path)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["faults"] == summary["struck"] == 110 and summary["torn"] == summary["wrong"] == []

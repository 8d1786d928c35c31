"""Real processes are broken during real refits: who is lost is left out, the rest go on."""

from __future__ import annotations

import json

import pytest

from refit.chaos.__main__ import a_ray, main
from refit.chaos.campaign import Campaign, config_of
from refit.chaos.crew import Crew
from refit.chaos.faults import Fault

pytestmark = [pytest.mark.ray, pytest.mark.processes]
TIMEOUT_S = 4.0


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    config = config_of(3, TIMEOUT_S)
    with a_ray(config):
        opened = Campaign(Crew(2, 3, tmp_path_factory.mktemp("logs")), config)
        yield opened
        opened.close()
        assert opened.sampler.torn == []
        assert opened.wrong == []
        assert opened.sampler.num_samples > 20


@pytest.mark.parametrize(
    ("role", "number", "phase", "kind", "ending"),
    [
        ("generator", 1, "round", "kill", "committed without it"),
        ("generator", 0, "commit", "kill", "committed without it"),
        ("generator", 2, "commit", "raise", "committed without it"),
        ("generator", 2, "misc", "stop", "committed without it"),
        ("generator", 0, "prepare", "kill", "committed without it"),
        ("generator", 1, "round", "corrupt", "committed after a repeat"),
        ("trainer", 1, "round", "corrupt", "committed after a repeat"),
        ("generator", 0, "report", "raise", "committed after a repeat"),
        ("generator", 1, "begin", "disk", "committed"),
    ],
)
def test_a_fault_costs_at_most_the_replica_it_struck(campaign, role, number, phase, kind, ending):
    outcome = campaign.strike(Fault(role, number, phase, kind, 2))
    assert outcome.ending == ending, outcome
    others = [state for who, state in outcome.states.items() if who != f"generator {number}"]
    assert set(others) == {f"serving({campaign.version})"} or role == "trainer"


def test_a_replacement_joins_at_the_next_version_and_the_others_keep_their_processes(campaign):
    campaign.await_everybody()
    before = campaign.process_ids()
    campaign.strike(Fault("generator", 1, "report", "kill"))
    campaign.await_everybody()
    after = campaign.process_ids()
    assert {who: before[who] == after[who] for who in before} == {
        "train rank 0": True,
        "train rank 1": True,
        "generator 0": True,
        "generator 1": False,
        "generator 2": True,
    }


def test_a_lost_trainer_ends_the_job_and_is_named_while_the_replicas_serve_on(campaign):
    outcome = campaign.strike(Fault("trainer", 1, "round", "kill"))
    assert outcome.ending == "ended"
    assert "train rank 1" in outcome.detail and "nothing goes on without it" in outcome.detail


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_hundred_random_faults_never_serve_a_torn_version(tmp_path, capsys):
    assert main(["--faults", "110", "--seed", "7", "--run-dir", str(tmp_path)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["faults"] == 110 and summary["torn"] == summary["wrong"] == []

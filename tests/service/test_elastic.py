"""Real processes are broken during real refits: who is lost is left out, the rest go on."""

from __future__ import annotations

import pytest

from refit.chaos.__main__ import a_ray
from refit.chaos.campaign import Campaign, config_of
from refit.chaos.crew import Crew
from refit.chaos.faults import Fault
from refit.transfer.errors import RefitFailed

pytestmark = [pytest.mark.ray, pytest.mark.processes]
TIMEOUT_S = 4.0


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    config = config_of(3, TIMEOUT_S)
    with a_ray(config):
        folder = tmp_path_factory.mktemp("campaign")
        opened = Campaign(Crew(2, 3, folder / "logs"), config, folder)
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
        pytest.param("generator", 2, "commit", "raise", "committed without it", marks=pytest.mark.slow),
        ("generator", 2, "misc", "stop", "committed without it"),
        pytest.param("generator", 0, "prepare", "kill", "committed without it", marks=pytest.mark.slow),
        pytest.param("generator", 1, "round", "corrupt", "committed after a repeat", marks=pytest.mark.slow),
        ("trainer", 1, "round", "corrupt", "committed after a repeat"),
        pytest.param("generator", 0, "report", "raise", "committed after a repeat", marks=pytest.mark.slow),
        ("trainer", 0, "broadcast", "corrupt", "committed after a repeat"),
        pytest.param("trainer", 1, "report", "raise", "committed after a repeat", marks=pytest.mark.slow),
        pytest.param("generator", 1, "begin", "disk", "committed", marks=pytest.mark.slow),
        ("driver", 0, "record", "disk", "committed"),
        ("generator", 1, "generate", "raise", "committed"),
    ],
)
def test_a_fault_costs_at_most_the_replica_it_struck(campaign, role, number, phase, kind, ending):
    outcome = campaign.strike(Fault(role, number, phase, kind, 2 if phase == "round" else 1))
    assert outcome.struck and outcome.ending == ending, outcome
    assert campaign.wrong == []


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


def test_the_control_store_holds_as_much_after_fifty_refits_as_after_one(campaign):
    campaign.await_everybody()
    coordinator = campaign._coordinator
    held = []
    for number in range(50):
        if number % 10 == 0:
            coordinator.reopen()  # new keys, as after a loss
        campaign._refit()
        held.append(coordinator._host._tcp_store.num_keys())
    assert max(held) <= held[0], held


def test_a_new_job_over_used_replicas_goes_on_above_what_they_serve(campaign):
    campaign.await_everybody()
    served = campaign.version
    campaign._coordinator.close()
    campaign._coordinator = coordinator = campaign._new_job()
    assert coordinator.version == served
    assert set(coordinator.states().values()) == {f"serving({served})"}
    for version in (1, served):
        with pytest.raises(RefitFailed, match=f"versions only grow: {served} was served"):
            coordinator.refit(version)
    campaign._refit()
    assert set(coordinator.states().values()) == {f"serving({served + 1})"}


def test_the_run_goes_on_with_one_replica_while_the_others_are_replaced(campaign):
    campaign.await_everybody()
    for number in (0, 2):
        campaign._crew.arm(Fault("generator", number, "round", "kill"), campaign._run_dir / f"one-{number}")
    incidents = campaign._refit()
    states = campaign._coordinator.states()
    assert states["generator 1"] == f"serving({campaign.version})", incidents
    assert all(states[f"generator {number}"].startswith("failed") for number in (0, 2))
    campaign.await_everybody()
    assert set(campaign._coordinator.states().values()) == {f"serving({campaign.version})"}


def test_a_lost_trainer_ends_the_job_and_is_named_while_the_replicas_serve_on(campaign):
    outcome = campaign.strike(Fault("trainer", 1, "round", "kill"))
    assert outcome.ending == "ended"
    assert "train rank 1" in outcome.detail and "nothing goes on without it" in outcome.detail

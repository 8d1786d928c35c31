"""The judge of a fault campaign: what it must find wrong, and that every fault has one due ending."""

from __future__ import annotations

import dataclasses
import random

import pytest

from refit.chaos.__main__ import main
from refit.chaos.faults import CORRUPT, DRIVER, KINDS, PHASES, Fault, Striker, broken_words, draw
from refit.chaos.judge import COMMITTED, ENDED, REPEATED, WITHOUT, Outcome, broken_by, due, ending_of

KILLED = Fault("generator", 1, "report", "kill")
LIMIT_S = 39.0


def outcome(fault=KILLED, **changes):
    """A killed replica, as it should go: left out, the other two on the new version."""
    right = Outcome(
        fault,
        True,
        WITHOUT,
        5.0,
        "left out generator 1: its process died",
        7,
        8,
        {"generator 0": "serving(8)", "generator 1": "failed(its process died)", "generator 2": "serving(8)"},
        {"generator 0": (8, True), "generator 2": (8, True)},
        (("generator 1", "its process died"),),
    )
    return dataclasses.replace(right, **changes)


def all_serve(version):
    return {f"generator {k}": (version, True) for k in range(3)}, {
        f"generator {k}": f"serving({version})" for k in range(3)
    }


@pytest.mark.parametrize(
    "words", [("--faults", "0"), ("--replicas", "-1"), ("--timeout-s", "nan")], ids="=".join
)
def test_a_campaign_of_nothing_is_refused_before_anything_starts(words, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2 and f"{words[0]} is {words[1]}; give at least 1" in capsys.readouterr().err


def test_an_outcome_as_it_should_be_breaks_nothing():
    assert list(broken_by(outcome(), LIMIT_S)) == []
    served, states = all_serve(7)
    trainer = Fault("trainer", 1, "round", "stop")
    ended = outcome(
        trainer,
        ending=ENDED,
        detail="train rank 1: no answer",
        served=served,
        states=states,
        tried=8,
        failures=(),
    )
    assert list(broken_by(ended, LIMIT_S)) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"struck": False}, "never struck"),
        ({"ending": COMMITTED}, "must be 'committed without it'"),
        ({"ending": ENDED}, "must be 'committed without it'"),
        ({"seconds": 40.0}, "took 40.0 s of 39.0 s"),
        ({"detail": "left out generator 2"}, "generator 1 is not named"),
        ({"served": {"generator 0": (8, True)}}, "['generator 2'] do not serve"),
        ({"served": {"generator 0": (8, True), "generator 2": (7, True)}}, "serves version 7; it must be 8"),
        ({"served": {"generator 0": (8, False), "generator 2": (8, True)}}, "version 8, torn; it must be 8"),
        ({"served": all_serve(8)[0]}, "was left out and still serves"),
        (
            {
                "states": {
                    "generator 0": "staging(8)",
                    "generator 1": "failed(x)",
                    "generator 2": "serving(8)",
                }
            },
            "takes generator 0 for staging(8), must be serving(8)",
        ),
        ({"failures": (("generator 0", "timed out"),)}, "generator 0, which nothing happened to"),
    ],
)
def test_whatever_differs_from_what_is_due_is_found(changes, words):
    assert any(words in found for found in broken_by(outcome(**changes), LIMIT_S))


def test_a_version_that_serves_after_the_job_ended_without_a_commit_is_found():
    served, states = all_serve(8)
    trainer = Fault("trainer", 1, "round", "kill")
    ended = outcome(
        trainer, ending=ENDED, detail="train rank 1 died", served=served, states=states, failures=()
    )
    assert any("serves version 8; it must be 7" in found for found in broken_by(ended, LIMIT_S))


def test_a_trainer_that_only_failed_must_not_end_the_job():
    for kind in ("raise", "corrupt", "slow", "disk"):
        assert due(Fault("trainer", 0, "round", kind)) in (REPEATED, COMMITTED)
    assert due(Fault("trainer", 0, "round", "kill")) == due(Fault("trainer", 0, "round", "stop")) == ENDED


def test_a_struck_replica_may_refuse_to_answer_for_the_fault_only():
    raised = Fault("generator", 1, "generate", "raise")
    served, states = all_serve(8)
    right = outcome(raised, ending=COMMITTED, detail="", served=served, states=states)
    own = dataclasses.replace(right, failures=(("generator 1", f"ValueError: {broken_words(raised)}"),))
    other = dataclasses.replace(right, failures=(("generator 1", "KeyError: 'x'"),))
    assert list(broken_by(own, LIMIT_S)) == []
    assert any("another reason than the fault" in found for found in broken_by(other, LIMIT_S))


def test_drawn_faults_cover_all_kinds_roles_and_phases_and_have_an_ending():
    rng = random.Random(7)
    drawn = [draw(rng, 2, range(3)) for _ in range(2000)]
    assert {fault.kind for fault in drawn} == set(KINDS)
    assert {due(fault) for fault in drawn} == {COMMITTED, REPEATED, WITHOUT, ENDED}
    for role, phases in PHASES.items():
        assert {fault.phase for fault in drawn if fault.role == role} >= set(phases)
    assert {(fault.role, fault.phase) for fault in drawn if fault.kind == CORRUPT} == {
        ("trainer", "round"),
        ("trainer", "broadcast"),
        ("generator", "round"),
    }
    assert {fault.kind for fault in drawn if fault.role == DRIVER} == {"disk"}


def test_a_fault_strikes_once_at_its_phase_and_leaves_its_mark(tmp_path):
    striker, mark = Striker(), tmp_path / "struck"
    fault = Fault("generator", 0, "round", "raise", 2)
    striker.arm(fault, str(mark))
    for phase in ("begin", "round"):
        striker.reach(phase)
    assert not mark.exists()
    with pytest.raises(ValueError, match="a campaign breaks this process"):
        striker.reach("round")
    assert mark.exists()
    striker.reach("round")  # no second time
    striker.arm(None, "")
    striker.reach("round")


def test_what_a_refit_says_of_itself_is_its_ending():
    assert ending_of(()) == COMMITTED
    assert ending_of(("repeated after: x",)) == ending_of(("discarded: x",)) == REPEATED
    assert ending_of(("repeated after: x", "left out generator 0: y")) == WITHOUT

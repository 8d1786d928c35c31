"""What a replica may become, and which names in a failure mean which replica."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refit.service.fleet import Fleet, replica_of
from refit.transfer.errors import RefitFailed


def test_a_commit_moves_a_replica_to_the_new_version_and_a_discard_leaves_it_on_the_old():
    fleet = Fleet(["a", "b"])
    fleet.begin(1)
    assert fleet.states() == {"generator 0": "staging(1)", "generator 1": "staging(1)"}
    fleet.commit(0, 1)
    fleet.discard(1)
    assert fleet.states() == {"generator 0": "serving(1)", "generator 1": "serving(0)"}
    assert fleet.serving == {0: "a"}, "the one left behind is not asked to generate"
    fleet.begin(1)
    fleet.commit(0, 1)
    fleet.commit(1, 1)
    assert fleet.serving == {0: "a", 1: "b"}


def test_a_failed_replica_takes_part_in_nothing_until_another_takes_its_place():
    fleet = Fleet(["a", "b"])
    fleet.leave_out(1, "it died")
    fleet.leave_out(1, "it answers no more")
    assert fleet.states()["generator 1"] == "failed(it died)"
    assert fleet.members == fleet.serving == {0: "a"}
    fleet.join(1, "c")
    assert fleet.members == {0: "a", 1: "c"}
    assert fleet.serving == {0: "a"}, "a new engine serves nothing before its first commit"
    fleet.begin(5)
    fleet.discard(1)
    assert fleet.states()["generator 1"] == "joining"
    fleet.begin(5)
    fleet.commit(1, 5)
    assert fleet.serving == {1: "c"}


def test_versions_only_grow():
    fleet = Fleet(["a"])
    fleet.begin(3)
    fleet.commit(0, 3)
    with pytest.raises(RefitFailed, match=r"versions only grow: generator 0 serves 3, so it cannot go to 2"):
        fleet.begin(2)


def test_a_refused_version_leaves_every_state_as_it_was():
    fleet = Fleet(["a", "b"])
    fleet.begin(1)
    fleet.discard(0)
    fleet.commit(1, 1)
    before = fleet.states()
    with pytest.raises(RefitFailed, match="versions only grow"):
        fleet.begin(0)
    assert fleet.states() == before


def test_a_round_without_a_generator_is_refused_with_the_reasons():
    fleet = Fleet(["a"])
    fleet.leave_out(0, "its process died")
    with pytest.raises(RefitFailed, match=r"no generator is left: generator 0 failed\(its process died\)"):
        fleet.begin(1)


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["commit", "discard", "lose"])), max_size=40))
def test_no_replica_ever_goes_back_whatever_happens(events):
    fleet = Fleet("abc")
    seen = dict.fromkeys(range(3), 0)
    for version, (replica, event) in enumerate(events, start=1):
        if fleet.state(replica).kind == "failed":
            fleet.join(replica, "new")
            seen[replica] = 0
        fleet.begin(version)
        for member in tuple(fleet.members):
            match event if member == replica else "commit":
                case "commit":
                    fleet.commit(member, version)
                case "discard":
                    fleet.discard(member)
                case "lose":
                    fleet.leave_out(member, "lost")
        for member in fleet.serving:
            serves = fleet.state(member).version
            assert serves == fleet.version >= seen[member]
            seen[member] = serves


def test_a_failure_names_a_replica_by_itself_or_by_the_place_of_its_worker():
    assert replica_of("generator 2", (0, 2), 2) == 2
    assert replica_of("gen 3", (0, 2), 2) == 2
    assert replica_of("gen 1", (0, 2), 2) == 0
    assert replica_of("gen 4", (0, 2), 2) is None
    assert replica_of("train 0", (0, 2), 2) is None
    assert replica_of("coordinator", (0,), 1) is None

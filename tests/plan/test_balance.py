"""Source choice: even loads, by rate where ranks of a node share NICs; against brute force."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.plan import ConfigError, PlanOptions, build_plan
from refit.plan.balance import fill, nic_weights, share_out
from refit.plan.cost import Topology, cost_of
from refit.plan.fanout import fan_out
from refit.plan.synth.config import load_model
from refit.plan.synth.gen import gen_manifest
from refit.plan.synth.parallel import parse_gen, parse_train
from refit.plan.synth.train import train_manifest


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3)), min_size=1, max_size=3), st.integers(0, 12))
def test_pouring_reaches_the_least_possible_level_but_for_rounding(ranks, amount):
    loads, rates = [load for load, _ in ranks], [rate for _, rate in ranks]
    got = fill(loads, amount, rates)
    assert sum(got) == amount and min(got) >= 0

    def level(share):
        return max((load + part) / rate for load, part, rate in zip(loads, share, rates, strict=True))

    shares = product(range(amount + 1), repeat=len(loads))
    best = min(level(share) for share in shares if sum(share) == amount)
    assert level(got) <= best + 1


@pytest.mark.parametrize(
    ("num_ranks", "per_node", "nics", "weights"),
    [
        (4, 4, 4, [1, 1, 1, 1]),
        (8, 4, 2, [1] * 8),
        (6, 4, 2, [1, 1, 1, 1, 2, 2]),
        (5, 4, 4, [1] * 5),
        (5, 3, 2, [2, 2, 2, 3, 3]),
    ],
)
def test_ranks_of_a_smaller_last_node_have_more_of_its_nics(num_ranks, per_node, nics, weights):
    assert list(nic_weights(num_ranks, per_node, nics).values()) == weights


def test_shares_follow_the_rates_of_overlapping_holder_sets():
    shares = share_out({(0, 1): 300, (1, 2): 300}, {0: 1, 1: 1, 2: 4})
    sent = [shares[0, 1][0], shares[0, 1][1] + shares[1, 2][0], shares[1, 2][1]]
    assert sum(sent) == 600
    assert max(sent[0], sent[1], sent[2] / 4) <= 151


def test_two_overlapping_holder_sets_are_levelled_over_all_their_ranks():
    shares = share_out({(0, 1): 300, (1, 2): 300})
    sent = [shares[0, 1][0], shares[0, 1][1] + shares[1, 2][0], shares[1, 2][1]]
    assert sum(sent) == 600 and max(sent) <= 205, "one rank after the other gives 225"


@pytest.mark.parametrize("fabric", [(8, 8), (8, 4), (8, 2), (6, 2)], ids=str)
@pytest.mark.parametrize(
    ("train", "gen"),
    [("tp=2,dp=6", "tp=2,replicas=5"), ("tp=4,pp=3", "tp=4,replicas=3"), ("tp=2,dp=5", "tp=4,replicas=7")],
)
def test_plans_are_near_the_bound_of_nodes_that_share_nics(fabric, train, gen):
    model = load_model("qwen3-4b")
    topology = Topology(*fabric)
    options = PlanOptions(ranks_per_node=fabric[0], nics_per_node=fabric[1])
    plan = build_plan(train_manifest(model, parse_train(train)), gen_manifest(model, parse_gen(gen)), options)
    two_hops = fan_out(plan, topology)
    assert cost_of(plan, topology).bound_ratio <= 1.05
    assert two_hops.cost().bound_ratio <= 1.05


def test_half_a_topology_is_refused():
    with pytest.raises(ConfigError, match="give both, or neither"):
        PlanOptions(ranks_per_node=8)

"""Fan-out inside generator nodes against brute force over elements; planted faults; what it wins."""

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.plan import PlanError, build_plan
from refit.plan.cost import Topology, cost_of
from refit.plan.fanout import fan_out
from refit.plan.simulate import Faults, simulate
from refit.plan.synth.config import load_model
from refit.plan.synth.gen import gen_manifest
from refit.plan.synth.parallel import parse_gen, parse_train
from refit.plan.synth.train import train_manifest
from tests.plan.worlds import elements, random_world

NODE = Topology(ranks_per_node=8)


def planned(name, train, gen):
    model = load_model(name)
    return build_plan(train_manifest(model, parse_train(train)), gen_manifest(model, parse_gen(gen)))


@pytest.fixture(scope="module")
def fan():
    """Two replicas of TP4 on each of two nodes."""
    return fan_out(planned("qwen3-4b", "tp=2,pp=2,dp=2", "tp=4,replicas=4"), NODE)


def run_in_two_hops(fan):
    """How often each (gen rank, copy, tensor, element) was written. Senders must have what they send."""
    held = {
        (rank.rank, one.tensor, index)
        for rank in fan.plan.train.manifest.ranks
        for one in rank.holdings
        for index in elements(one.region)
    }
    written = {}
    for one in fan.flows:
        entered = set()
        for holder, receiver, first, stop in one.stretches():
            for tensor, index in of_rows(one.flow, first, stop):
                assert (holder, tensor, index) in held
                key = (receiver, one.flow.copy, tensor, index)
                written[key] = written.get(key, 0) + 1
                entered.add(key)
        for source, other, first, stop in second_hop(one):
            assert source // fan.topology.ranks_per_node == other // fan.topology.ranks_per_node
            for tensor, index in of_rows(one.flow, first, stop):
                assert (source, one.flow.copy, tensor, index) in entered
                key = (other, one.flow.copy, tensor, index)
                written[key] = written.get(key, 0) + 1
    return written


def second_hop(one):
    """What members of a group send to its other members, as (source, other, first, stop) of the group's line."""
    for group, cuts in zip(one.groups, one.entry_cuts, strict=True):
        for source, (first, stop) in zip(group, pairwise(cuts), strict=True):
            yield from ((source, other, first, stop) for other in group if other != source)


def of_rows(flow, first, stop):
    """(tensor, element) of these rows of a line: all tensors of the flow, one after the other."""
    for row in range(first, stop):
        number, own = divmod(row, flow.num_rows)
        yield from ((flow.tensors[number], index) for index in elements(flow.part(own, own + 1)))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_two_hops_write_what_the_direct_plan_writes_each_element_once(seed):
    train, gen, options = random_world(seed)
    plan = build_plan(train, gen, options)
    topology = Topology(ranks_per_node=Random(seed).choice([1, 2, 2, 3, 4]))
    fan = fan_out(plan, topology)
    wanted = {
        (stripe.receiver, flow.copy, stripe.tensor, index)
        for flow in plan.flows
        for position in range(len(flow.holders))
        for stripe in flow.sent_by(position)
        for index in elements(flow.part(stripe.first_row, stripe.stop_row))
    }
    if fan is None:
        per_node = topology.ranks_per_node
        for flow in plan.flows:
            assert len({rank // per_node for rank in flow.receivers}) == len(flow.receivers)
    else:
        assert run_in_two_hops(fan) == dict.fromkeys(wanted, 1)
        check_bytes(fan)


def check_bytes(fan):
    """What goes in and out per rank adds up: every wanted byte comes over a NIC or over NVLink."""
    direct, two_hops = cost_of(fan.plan, fan.topology), fan.cost()
    arrived = list(two_hops.received)
    for (_, rank), num_bytes in fan.relayed_in.items():
        arrived[rank] += num_bytes
    assert tuple(arrived) == direct.received
    assert sum(fan.relayed_in.values()) == sum(fan.relayed_out.values())
    assert sum(two_hops.sent) == sum(two_hops.received) == sum(fan.pairs().values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: {"entry_cuts": tuple((*c[:-1], c[-1] - 1) for c in one.entry_cuts)}, "do not deal out"),
        (lambda one: {"holder_cuts": (*one.holder_cuts[:-1], one.holder_cuts[-1] + 1)}, "do not deal out"),
        (lambda one: {"holder_cuts": tuple(reversed(one.holder_cuts))}, "do not deal out"),
        (lambda one: {"groups": tuple(group[1:] for group in one.groups)}, "are not its receivers"),
        (lambda one: {"groups": (one.groups[0], *one.groups[:-1])}, "are not its receivers"),
        (
            lambda one: {"groups": tuple(zip(*one.groups, strict=True)), "entry_cuts": one.entry_cuts},
            "is not on one node",
        ),
        (lambda one: {"flow": replace(one.flow, copy=1)}, "not those of the plan"),
    ],
    ids=[
        "lost row",
        "row too many",
        "unordered rows",
        "lost receiver",
        "doubled node",
        "wrong node",
        "wrong flow",
    ],
)
def test_a_planted_fault_is_killed(fan, change, message):
    number, one = next((n, one) for n, one in enumerate(fan.flows) if {*map(len, one.groups)} == {2})
    flows = list(fan.flows)
    flows[number] = replace(one, **change(one))
    with pytest.raises(PlanError, match=message):
        replace(fan, flows=tuple(flows)).require_exact_cover()


@pytest.mark.parametrize(
    ("name", "train", "gen", "at_most"),
    [
        ("qwen3-4b", "tp=2,dp=4", "tp=2,replicas=8", 0.35),
        ("qwen3-4b", "tp=2,pp=2,dp=2", "tp=4,replicas=3", 0.80),
        ("llama-70b", "tp=8,dp=2", "tp=4,replicas=8", 0.55),
        ("nemotron-h-8b", "tp=2,dp=4", "tp=1,replicas=7", 0.30),
    ],
)
def test_replicas_that_share_a_node_are_fed_once_and_near_the_bound(name, train, gen, at_most):
    plan = planned(name, train, gen)
    fan = fan_out(plan, NODE)
    direct, two_hops = cost_of(plan, NODE), fan.cost()
    assert two_hops.bound_ratio <= 1.05 and two_hops.idle_senders == 0
    assert two_hops.bound_s <= two_hops.predicted_s <= at_most * direct.predicted_s
    simulated = simulate(plan, NODE, fan=fan).seconds
    assert two_hops.bound_s <= simulated < simulate(plan, NODE).seconds


def test_one_rank_per_node_or_one_large_replica_leaves_nothing_to_fan_out():
    plan = planned("qwen3-4b", "tp=2,dp=4", "tp=4,replicas=3")
    assert fan_out(plan, Topology(ranks_per_node=1, nics_per_node=1)) is None


def test_a_slow_nvlink_shows_in_the_prediction_and_in_the_simulation(fan):
    slow = fan_out(fan.plan, replace(NODE, nvlink_bytes_per_s=1e9))
    assert slow.nvlink_s == pytest.approx(450 * fan.nvlink_s)
    assert slow.cost().predicted_s > fan.cost().predicted_s + 400 * fan.nvlink_s
    spans = simulate(slow.plan, slow.topology, fan=slow).spans
    assert {span.hop for span in spans} == {1, 2}
    assert simulate(slow.plan, slow.topology, fan=slow).seconds > 300 * fan.nvlink_s


def test_a_death_in_the_first_hop_ends_the_round_before_the_second(fan):
    timeline = simulate(fan.plan, NODE, fan=fan, faults=Faults(fail_at={0: 0.0}, deadline_s=5.0))
    assert timeline.failure.startswith("rank 0 died") and {span.hop for span in timeline.spans} <= {1}


def test_equal_inputs_give_equal_fan_outs(fan):
    again = fan_out(planned("qwen3-4b", "tp=2,pp=2,dp=2", "tp=4,replicas=4"), NODE)
    assert (again.flows, again.totals, again.relayed_in) == (fan.flows, fan.totals, fan.relayed_in)

"""Real Ray nodes with labels: who runs where, that a replacement takes its old place, and what is said of no place."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster as RayNodes

from refit.run import load_config
from refit.service import cluster as cluster_module
from refit.service.cluster import Cluster
from refit.service.waiting import collect
from refit.transfer.errors import TransportError

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

CALL_S = 120.0
STORE_BYTES = 80 * 2**20
EAST, WEST = {"zone": "east"}, {"zone": "west"}


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    """Two nodes of this machine: trainers have room in the east only, engines in the west."""
    found = RayNodes(initialize_head=False, shutdown_at_exit=False)
    try:
        for labels in (EAST, WEST):
            add_node(found, labels)
        yield found
    finally:
        found.shutdown()


def add_node(nodes: RayNodes, labels: dict[str, str]) -> Any:
    return nodes.add_node(num_cpus=4, labels=labels, object_store_memory=STORE_BYTES, include_dashboard=False)


@pytest.fixture
def address(nodes: RayNodes) -> str:
    return str(nodes.address)


def config_of(address: str, *overrides: str) -> Any:
    places = [f"cluster.address={address}", "generation.replicas=2", "generation.tensor_parallel=1"]
    return load_config("default", ["+policy.nccl_xfer_refit=true", *places, *overrides])


def nodes_of(actors: dict[str, Any]) -> dict[str, str]:
    """{name: id of the node that the actor really runs on}."""

    def node(_actor: Any) -> str:
        return str(ray.get_runtime_context().get_node_id())

    return collect({who: actor.__ray_call__.remote(node) for who, actor in actors.items()}, "look", CALL_S)


def zones_of(actors: dict[str, Any]) -> dict[str, str]:
    """{name: label of the node that the actor really runs on}."""
    zone_of = {one["NodeID"]: one["Labels"]["zone"] for one in ray.nodes() if one["Alive"]}
    return {who: zone_of[found] for who, found in nodes_of(actors).items()}


def await_death(node_id: str) -> None:
    """Until Ray knows that a node is gone: before, it would put the replacement there, which would be lost too."""
    deadline_s = time.monotonic() + CALL_S
    while any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes()):
        assert time.monotonic() < deadline_s, f"Ray takes node {node_id} for alive"
        time.sleep(0.2)


LABELS = ("++cluster.policy_labels={zone:east}", "++cluster.generation_labels={zone:west}")


def test_actors_run_on_the_nodes_with_their_labels_and_a_replacement_on_its_old_one(address, tmp_path):
    config = config_of(address, *LABELS)
    cluster = Cluster.open(config, tmp_path / "logs")
    try:
        wanted = {
            "train rank 0": "east",
            "train rank 1": "east",
            "generator 0": "west",
            "generator 1": "west",
        }
        assert zones_of(cluster.named_actors()) == wanted
        before = collect({"pid": cluster.generators[1].process_id.remote()}, "look", CALL_S)["pid"]
        cluster.end_generator(1)
        replacement = cluster.restart_generator(1)
        assert replacement is not None
        assert zones_of(cluster.named_actors()) == wanted
        after = collect({"pid": cluster.generators[1].process_id.remote()}, "look", CALL_S)["pid"]
        assert after != before and replacement.actor is cluster.generators[1]
        assert ray.available_resources().get("CPU", 0.0) == 8.0 - 4.0
    finally:
        cluster.close()
    assert not ray.is_initialized()


def test_spread_actors_are_on_both_nodes_and_packed_ones_on_one(address, tmp_path):
    for strategy, num_zones in (("SPREAD", 2), ("STRICT_PACK", 1)):
        cluster = Cluster.open(config_of(address, f"cluster.placement={strategy}"), tmp_path / strategy)
        try:
            assert len(set(zones_of(cluster.named_actors()).values())) == num_zones
        finally:
            cluster.close()


def test_labels_that_no_node_has_are_named_in_time_and_nothing_stays_reserved(address, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_module, "START_TIMEOUT_S", 5.0)
    with pytest.raises(TransportError, match=r"no place by PACK .*'zone': 'north'.*cluster\.policy_labels"):
        Cluster.open(config_of(address, "++cluster.policy_labels={zone:north}"), tmp_path / "none")
    monkeypatch.undo()
    cluster = Cluster.open(config_of(address, *LABELS), tmp_path / "again")
    try:
        assert len(zones_of(cluster.named_actors())) == 4
    finally:
        cluster.close()


def test_replicas_of_a_node_that_is_lost_come_back_on_another_one_with_the_label(nodes, address, tmp_path):
    cluster = Cluster.open(config_of(address, *LABELS), tmp_path / "logs")
    try:
        before = nodes_of(cluster.named_actors())
        add_node(nodes, WEST)
        lost = next(node for node in nodes.worker_nodes if node.node_id == before["generator 1"])
        nodes.remove_node(lost, allow_graceful=False)
        await_death(lost.node_id)
        gone = [k for k in range(2) if before[f"generator {k}"] == lost.node_id]
        assert 1 in gone
        for number in gone:
            cluster.end_generator(number)
            assert cluster.restart_generator(number) is not None
        after = nodes_of(cluster.named_actors())
        assert all(after[f"generator {k}"] != lost.node_id for k in range(2))
        assert set(zones_of(cluster.named_generators()).values()) == {"west"}
        assert all(after[who] == before[who] for who in cluster.named_trainers())
    finally:
        cluster.close()

"""What the gate knows of the machine: its ports, who answers at an address, and the memory that a job will need."""

from __future__ import annotations

import socket

import pytest

from refit.run import load_config
from refit.service.gate.check import inspect_machine
from refit.service.memory import needed_bytes


def test_the_memory_estimate_has_two_buckets_a_stream_and_worker_but_no_more_than_the_version():
    gib, seven_billion = 2**30, 7 * 10**9

    def needed(buckets_bytes, num_params, streams=2):
        overrides = [f"refit.buffer_bytes={buckets_bytes}", f"refit.num_streams={streams}"]
        return needed_bytes(load_config("default", overrides), num_params)

    extra = needed(gib // 2, seven_billion) - needed(gib // 4, seven_billion)
    assert extra == 2 * 2 * 2 * gib // 4, "two buckets, two streams, two workers"
    assert needed(64 * gib, seven_billion, 16) - needed(gib // 4, seven_billion) == 14 * 10**9 - 2 * gib
    assert needed(64 * gib, 0) == needed(gib // 4, 0)


@pytest.mark.parametrize(
    ("address", "answers"), [("ray://127.0.0.1:1", False), ("nonsense", False), ("host:99999999", False)]
)
def test_an_address_where_nobody_listens_is_seen(address, answers):
    assert (
        inspect_machine(load_config("default", [f"cluster.address='{address}'"])).cluster_answers is answers
    )


def test_a_port_that_is_in_use_is_seen_and_a_free_one_is_not():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert inspect_machine(load_config("default", [f"cluster.port={port}"])).taken_ports == (port,)
    assert inspect_machine(load_config("default", [f"cluster.port={port}"])).taken_ports == ()
    assert inspect_machine(load_config("default")).available_memory_bytes > 0

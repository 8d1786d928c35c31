"""What a running job listens on."""

from __future__ import annotations

import ipaddress

import psutil
import pytest

from tests.end_to_end.jobs import Job, JobPool

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.megatron, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def job(jobs: JobPool) -> Job:
    return jobs.get("default")


def test_no_process_of_a_job_listens_beyond_loopback(job: Job) -> None:
    with job.path("p2p") as coordinator:
        assert job.refit(coordinator).committed
        found = listening()
    assert len(found) > 10, found  # Ray's own, the control store, gloo's pairs: a job listens a lot
    beyond = [entry for entry in found if not is_loopback(entry[1])]
    assert not beyond, "\n".join(f"{name} listens on {address}:{port}" for name, address, port in beyond)


def listening() -> list[tuple[str, str, int]]:
    """(process name, address, port) of every listening socket of this process and all below it."""
    root = psutil.Process()
    return [
        (" ".join(process.cmdline())[:60], socket.laddr.ip, socket.laddr.port)
        for process in (root, *root.children(recursive=True))
        for socket in process.net_connections("inet")
        if socket.status == psutil.CONN_LISTEN
    ]


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback

"""Whole vLLM engines under Ray are broken in the middle of refits: what serves is one whole version, the rest go on."""

from __future__ import annotations

import time
from typing import Any

import pytest

from refit.chaos.judge import COMMITTED, REPEATED, WITHOUT, ending_of
from refit.service.coordinator import Coordinator
from refit.service.waiting import gather
from tests.end_to_end.jobs import Job, open_job, with_path

pytestmark = [
    pytest.mark.ray,
    pytest.mark.vllm,
    pytest.mark.megatron,
    pytest.mark.slow,
    pytest.mark.timeout(2400),
]

TIMEOUT_S = 15.0
PROMPTS = [(40, 41, 42, 43), (70, 71, 72)]
OVERRIDES = (
    "generation.replicas=3",
    f"refit.timeout_s={TIMEOUT_S}",
    "cluster.restart_generators=100",
)
FAULTS = [
    (0, "begin", "kill", WITHOUT),
    (1, "move_bulk", "kill", WITHOUT),
    (2, "put_report", "kill", WITHOUT),
    (0, "decide", "kill", WITHOUT),
    (1, "commit", "kill", WITHOUT),
    (2, "move_bulk", "stop", WITHOUT),
    (0, "put_report", "stop", WITHOUT),
    (1, "decide", "stop", WITHOUT),
    (2, "begin", "raise", REPEATED),
    (0, "move_bulk", "raise", REPEATED),
    (1, "put_report", "raise", REPEATED),
    (2, "commit", "raise", WITHOUT),
    (0, "wait", "corrupt", REPEATED),
    (1, "move_bulk", "slow", COMMITTED),
]
LIMIT_S = 120.0


def arm(actor: Any, place: str, kind: str) -> None:
    """In the engine's process: the next call of one step of the refit is struck, once."""
    import ctypes
    import os
    import signal
    import threading
    import time as clock

    from refit.gen_side.engine import RefitWeightTransferEngine
    from refit.gen_side.staging import Staging
    from refit.transfer.endpoint import Endpoint
    from refit.transfer.transports.tcp import TcpTransport

    owners = {"commit": Staging, "decide": RefitWeightTransferEngine, "wait": TcpTransport}
    owner = owners.get(place, Endpoint)
    original = getattr(owner, place)

    def struck(self: Any, *args: Any, **kwargs: Any) -> Any:
        setattr(owner, place, original)
        match kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread first
            case "slow":
                clock.sleep(2.0)
            case "raise":
                raise ValueError("a test breaks this engine")
        answer = original(self, *args, **kwargs)
        if kind == "corrupt":
            received = next(one.parcel for one in args[0] if one.direction == "receive")
            ctypes.c_uint8.from_address(int(received.places().table[0, 0])).value ^= 1
        return answer

    setattr(owner, place, struck)


def has_struck(actor: Any, place: str) -> bool:
    """Whether nothing waits for that step any more, in an engine's process that lived through it."""
    from refit.gen_side.engine import RefitWeightTransferEngine
    from refit.gen_side.staging import Staging
    from refit.transfer.endpoint import Endpoint
    from refit.transfer.transports.tcp import TcpTransport

    owners = {"commit": Staging, "decide": RefitWeightTransferEngine, "wait": TcpTransport}
    owner = owners.get(place, Endpoint)
    return getattr(owner, place).__name__ != "struck"


def answers(coordinator: Coordinator) -> dict[str, list[Any]]:
    """Greedy answers with their stamps of every engine that serves."""
    calls = {who: a.generate.remote(PROMPTS, 1, 6, 0.0, 0) for who, a in coordinator.serving().items()}
    return dict(gather(calls, "generate", 60.0).results)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory):
    with open_job("dp2_to_2x_tp1", tmp_path_factory.mktemp("faults"), OVERRIDES) as opened:
        yield opened


def test_no_torn_version_is_served_whatever_breaks_in_an_engine(job: Job, capsys) -> None:
    table = []
    coordinator = Coordinator.prepare(
        with_path(job.config, "p2p"), job.cluster.trainers, job.cluster.generators, job.cluster
    )
    version = 0
    for number, place, kind, due in FAULTS:
        version = everybody(coordinator, version)
        actor = job.cluster.generators[number]
        gather({"arm": actor.__ray_call__.remote(arm, place, kind)}, "arm", 30.0)
        job.scale_weights(2.0 if version % 2 else 0.5)
        started_s, version = time.monotonic(), version + 1
        record = coordinator.refit(version)
        seconds = time.monotonic() - started_s
        table.append((f"{kind} generator {number} at {place}", record.incidents, round(seconds, 1)))
        assert record.committed and seconds < LIMIT_S, table[-1]
        assert ending_of(record.incidents) == due, table[-1]
        lost = f"generator {number}" if due == WITHOUT else ""
        assert not lost or any(said.startswith(f"left out {lost}: ") for said in record.incidents), table[-1]
        if not lost:
            struck = actor.__ray_call__.remote(has_struck, place)
            assert gather({"struck": struck}, "look", 30.0).results == {"struck": True}, table[-1]
        if kind == "corrupt":
            assert any(": they differ in [" in said for said in record.incidents), table[-1]
        report = coordinator.verify()
        assert report.ok, (table[-1], report.mismatches, report.changed_params)
        found = answers(coordinator)
        assert found.keys() == {f"generator {k}" for k in range(3)} - {lost}, table[-1]
        assert len({str(rows) for rows in found.values()}) == 1, "all engines answer alike"
        assert {spans[-1][0] for rows in found.values() for _, _, _, spans in rows} == {version}
    coordinator.close()
    with capsys.disabled():
        print()
        for row in table:
            print(*row)


def everybody(coordinator: Coordinator, version: int) -> int:
    """Refit until every replacement has joined; the version then."""
    deadline_s = time.monotonic() + 400.0
    while version == 0 or any("serving" not in state for state in coordinator.states().values()):
        assert time.monotonic() < deadline_s, coordinator.states()
        version += 1
        assert coordinator.refit(version).committed
        time.sleep(1.0)
    return version

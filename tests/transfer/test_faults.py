"""A dead, stopped or broken rank ends the refit everywhere, in time, and the error names it."""

import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from refit.plan import PlanOptions
from refit.transfer.endpoint import Endpoint, report_failure
from refit.transfer.errors import RefitFailed, TransportError
from refit.transfer.groups import open_group
from refit.transfer.protocol import AUTO, NIXL, PROCESS_GROUP
from refit.transfer.rendezvous import ControlStore
from tests.processes import Processes
from tests.transfer import coordinator
from tests.transfer.cases import Case, empty_params, make_case

pytestmark = pytest.mark.processes
TIMEOUT_S = 5.0
GRACE_S = 5.0
CASE_SEED = 5
PHASES = ("bulk", "round", "misc")


class _Fault:
    """Happens to one rank at one point of its second refit."""

    def __init__(self, kind: str, phase: str) -> None:
        self.kind, self.phase = kind, phase

    def strike(self, phase: str) -> None:
        if phase != self.phase:
            return
        match self.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "socket":
                _close_sockets()
            case "raise":
                raise ValueError("a test breaks this rank")


def _close_sockets() -> None:
    """Shut down every connection of this process except the one to the control store, which it opened first."""
    connected = []
    for link in sorted(Path("/proc/self/fd").iterdir(), key=lambda path: int(path.name)):
        if link.is_symlink() and str(link.readlink()).startswith("socket:"):
            connection = socket.socket(fileno=os.dup(int(link.name)))
            if connection.family in (socket.AF_INET, socket.AF_INET6) and _is_connected(connection):
                connected.append(connection)
    store_port = {c.getpeername()[1] for c in connected[:1]}
    for connection in connected:
        if connection.getpeername()[1] not in store_port:
            connection.shutdown(socket.SHUT_RDWR)


def _is_connected(connection: socket.socket) -> bool:
    try:
        connection.getpeername()
    except OSError:
        return False
    return True


def faulty_rank(rank: int, port: int, case: Case, victim: int, kind: str, phase: str) -> tuple[float, str]:
    """Refit twice; the victim breaks in the second. Returns seconds from its start to the error, and the error."""
    control = ControlStore.join("127.0.0.1", port, "faults")
    manifest = case.manifest(rank)
    endpoint = Endpoint.prepare(control, manifest, 60.0)
    params = empty_params(manifest)
    fault = _Fault(kind, phase if rank == victim else "never")
    began = time.monotonic()
    try:
        for version in (1, 2):
            began = time.monotonic()
            endpoint.begin(version, version)
            if version == 2:
                _break_in_round(endpoint, fault)
                with endpoint.phase("bulk"):
                    fault.strike("bulk")
            endpoint.move_bulk(params)
            if version == 2:
                with endpoint.phase("misc"):
                    fault.strike("misc")
            if rank == 0:
                endpoint.send_misc([])
            elif manifest.side == "gen":
                list(endpoint.receive_misc())
            endpoint.put_report()
            endpoint.decision()
    except RefitFailed as error:
        seconds = time.monotonic() - began
        endpoint.close()
        return seconds, str(error)
    return time.monotonic() - began, "no error"


def _break_in_round(endpoint: Endpoint, fault: _Fault) -> None:
    """Let the fault strike when a stage posts its third round."""
    for group in endpoint._groups.stages.values():
        transport, count = group.transport, [0]
        post = transport.post

        def counted(sends, receives, tag, post=post, count=count):
            count[0] += 1
            if count[0] == 3:
                fault.strike("round")
            return post(sends, receives, tag)

        transport.post = counted


def run_fault(victim: int, kind: str, phase: str, transport: str = AUTO) -> dict[int, tuple[float, str]]:
    case = make_case(CASE_SEED, num_tensors=16, largest_dim=64)
    case = Case(case.train, case.gen, PlanOptions(4096, 16, case.options.whitelist))
    host = ControlStore.host()
    control = host.under("faults")
    survivors = [rank for rank in range(4) if rank != victim or kind in ("raise", "socket")]
    with Processes(faulty_rank, 4, (host.port, case, victim, kind, phase)) as processes:
        coordinator.prepare(control, 2, 2, case.options, timeout_s=TIMEOUT_S, transport=transport)
        coordinator.reports(control, 1, 4)
        coordinator.decide(control, 1, True)
        with pytest.raises((RefitFailed, TransportError)) as caught:
            coordinator.reports(control, 2, 4, TIMEOUT_S)
        if not isinstance(caught.value, RefitFailed):
            report_failure(control, "report", "the coordinator", caught.value, range(4), 2)
        outcomes = processes.outcomes(GRACE_S + 5, survivors)
        assert all(outcome.returned for outcome in outcomes), [outcome.error for outcome in outcomes]
    host.close()
    return {outcome.rank: outcome.value for outcome in outcomes}


def require_named(name: str, found: dict[int, tuple[float, str]]) -> None:
    assert len({error for _, error in found.values()}) == 1, f"one root cause for all: {found}"
    for rank, (seconds, error) in found.items():
        assert re.search(rf"\b{name}\b", error), f"rank {rank}: {error}"
        assert seconds < TIMEOUT_S + GRACE_S, f"rank {rank} took {seconds:.1f} s: {error}"


@pytest.mark.parametrize(
    ("victim", "name", "kind", "phase"),
    [
        (1, "train 1", "kill", "round"),
        (3, "gen 1", "stop", "round"),
        (0, "train 0", "kill", "misc"),
        (2, "gen 0", "raise", "bulk"),
    ],
)
def test_every_survivor_names_the_lost_rank_in_time(victim, name, kind, phase):
    require_named(name, run_fault(victim, kind, phase))


@pytest.mark.parametrize(
    ("victim", "name", "kind", "phase"),
    [
        (3, "gen 1", "kill", "round"),
        pytest.param(1, "train 1", "stop", "round", marks=pytest.mark.slow),
        pytest.param(0, "train 0", "kill", "bulk", marks=pytest.mark.slow),
        pytest.param(2, "gen 0", "stop", "bulk", marks=pytest.mark.slow),
        pytest.param(1, "train 1", "raise", "round", marks=pytest.mark.slow),
        pytest.param(3, "gen 1", "kill", "misc", marks=pytest.mark.slow),
    ],
)
def test_every_survivor_of_a_refit_by_one_sided_reads_names_the_lost_rank_in_time(victim, name, kind, phase):
    require_named(name, run_fault(victim, kind, phase, NIXL))


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", ["kill", "stop", "raise"])
@pytest.mark.parametrize(("victim", "name"), [(0, "train 0"), (1, "train 1"), (3, "gen 1")])
@pytest.mark.parametrize("transport", [AUTO, PROCESS_GROUP])
def test_every_survivor_names_the_lost_rank_in_time_whatever_the_fault(transport, victim, name, kind, phase):
    require_named(name, run_fault(victim, kind, phase, transport))


def require_only_blamed(victim: int, name: str, found: dict[int, tuple[float, str]]) -> None:
    """The victim lives here, and so it may be the one that reports; else it is the only peer that is named."""
    require_named(name if name in next(iter(found.values()))[1] else f"rank {victim}", found)
    (error,) = {error for _, error in found.values()}
    if f"reported by {name}:" not in error:
        assert set(re.findall(r"(?:from|to) rank (\d+)", error)) == {str(victim)}, error


@pytest.mark.parametrize(("victim", "name"), [(0, "train 0"), (2, "gen 0")])
def test_every_rank_blames_the_one_whose_connections_closed(victim, name):
    require_only_blamed(victim, name, run_fault(victim, "socket", "round"))


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["bulk", "round"])
@pytest.mark.parametrize(("victim", "name"), [(0, "train 0"), (1, "train 1"), (2, "gen 0"), (3, "gen 1")])
@pytest.mark.parametrize("transport", [AUTO, PROCESS_GROUP])
def test_every_rank_blames_the_one_whose_connections_closed_in_each_phase(transport, victim, name, phase):
    require_only_blamed(victim, name, run_fault(victim, "socket", phase, transport))


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "name"), [(0, "train 0"), (2, "gen 0"), (3, "gen 1")])
def test_every_rank_blames_the_one_whose_connections_closed_before_the_broadcast(victim, name):
    """A collective of gloo does not say which peer it lost; a look at each connection of the group does."""
    found = run_fault(victim, "socket", "misc")
    require_only_blamed(victim, name, found)
    assert all("misc" in error for _, error in found.values()), found


def broadcasting_rank(rank: int, port: int, victim: int) -> str:
    """Broadcast from rank 0 until that fails; the victim closes its connections before."""
    control = ControlStore.join("127.0.0.1", port, "broadcast")
    deadline = time.monotonic() + 60.0
    group = open_group(control, "g", (0, 1, 2), rank, "gloo", deadline)
    control.put(f"open/{rank}", True)
    for other in range(3):
        control.get(f"open/{other}", 60.0)
    if rank == victim:
        _close_sockets()
        control.put("closed", True)
        control.get("over", 60.0)
        return "the victim"
    control.get("closed", 60.0)
    payload = torch.zeros(1 << 20, dtype=torch.uint8)
    try:
        for _ in range(1000):
            group.wait_collective("the broadcast", group.broadcast(payload, 0), deadline)
    except TransportError as error:
        control.put(f"failed/{rank}", True)
        control.get("over", 60.0)
        return str(error)
    return "no error"


@pytest.mark.parametrize(("victim", "witness"), [(0, 1), (2, 0)])
def test_a_broadcast_that_loses_a_connection_names_its_other_end(victim, witness):
    host = ControlStore.host()
    control = host.under("broadcast")
    with Processes(broadcasting_rank, 3, (host.port, victim)) as processes:
        control.get(f"failed/{witness}", 90.0)
        control.put("over", True)
        (outcome,) = processes.outcomes(30.0, [witness])
    host.close()
    assert set(re.findall(r"to rank (\d+)", outcome.value)) == {str(victim)}, outcome

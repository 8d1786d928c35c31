"""Process groups of a refit, made directly on the control store, apart from any default group.

One group per trainer stage (its trainers and all generators) and one for misc (trainer 0 and all generators). Each has
its own connections, so threads that run different stages never share one. Bulk parcels may go another way than the
process group, by `transport`; by default beside gloo they do, those that the golden path gathers too. Broadcasts, and
so its fan-out, stay on the process group.
"""

import ipaddress
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

from torch import Tensor
from torch._C._distributed_c10d import BroadcastOptions, ProcessGroup, ProcessGroupGloo, Store, Work

from refit.plan import ConfigError, Plan
from refit.transfer.bounded import BoundedCalls
from refit.transfer.errors import TransportError, take_all
from refit.transfer.protocol import AUTO, CUDA_IPC, NIXL, PROCESS_GROUP, TCP, TRANSPORTS
from refit.transfer.rendezvous import ANSWER_S, ControlStore
from refit.transfer.transports import ipc_link, nixl_link, tcp_links
from refit.transfer.transports.process_group import ProcessGroupTransport, wait_for_work
from refit.transfer.transports.seam import Transport

BACKENDS = ("gloo", "nccl")
MISC = "misc"
WAYS: Mapping[str, Callable[[ControlStore, str, tuple[int, ...], int, float], Transport]] = {
    TCP: tcp_links.open_transport,
    NIXL: nixl_link.open_transport,
    CUDA_IPC: ipc_link.open_transport,
}


@dataclass(frozen=True, slots=True)
class Group:
    """One group that this rank is in. `ranks` are joint ranks in group order; `rank` is this one's joint rank.

    `process_group` is what collectives (golden, broadcast) run on; a group without one can move bulk only.
    `collectives` ends what waits in it, where `transport` is not that.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    transport: Transport
    process_group: ProcessGroup | None = None
    collectives: Transport | None = None

    def broadcast(self, tensor: Tensor, source: int) -> Work:
        """Start a broadcast of a contiguous tensor from joint rank `source` to all ranks of the group."""
        options = BroadcastOptions()
        options.rootRank = self.ranks.index(source)
        if self.process_group is None:
            raise TransportError(f"group {self.name!r} has no process group, so it cannot broadcast")
        try:
            return self.process_group.broadcast([tensor], options)
        except RuntimeError as error:
            own = self._own_collectives()
            lost = "" if own is None else own.lost()
            raise TransportError(f"cannot start a broadcast in group {self.name!r}: {error}{lost}") from error

    def wait_collective(self, words: str, work: Work, deadline: float) -> None:
        """Wait for a broadcast. Raises TransportError that begins with `words`, also if the group was aborted."""
        own = self._own_collectives()
        if own is None:
            wait_for_work(words, work, deadline)
        else:
            own.wait_collective(words, work, deadline)

    def _own_collectives(self) -> ProcessGroupTransport | None:
        """What ends a wait in the process group; None where a caller brought its own transport."""
        own = self.transport if self.collectives is None else self.collectives
        return own if isinstance(own, ProcessGroupTransport) else None


@dataclass(frozen=True, slots=True)
class Groups:
    """All groups of one rank: by stage number, and misc (None on trainers other than 0)."""

    stages: Mapping[int, Group]
    misc: Group | None

    def abort(self) -> None:
        """Free every thread of this rank that waits in any group."""
        take_all(transport.abort for transport in self._transports())

    def close(self) -> None:
        """Give the connections back."""
        take_all(transport.close for transport in self._transports())

    def _transports(self) -> tuple[Transport, ...]:
        groups = (*self.stages.values(), *([] if self.misc is None else [self.misc]))
        ways = [way for group in groups for way in (group.transport, group.collectives)]
        return tuple(way for way in ways if way is not None)


def open_groups(
    control: ControlStore,
    rank: int,
    plan: Plan,
    backend: str,
    timeout_s: float,
    transport: str = AUTO,
) -> Groups:
    """Open this rank's groups. Collective over their members. Raises TransportError at the deadline.

    `backend` makes the process groups, `transport` says what carries bulk: one of TRANSPORTS. AUTO is TCP beside gloo,
    which asks before each parcel and takes packed bytes only, and the process group with NCCL.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"refit.backend is {backend!r}; it can be one of {', '.join(BACKENDS)}")
    if transport == AUTO:
        transport = TCP if backend == "gloo" else PROCESS_GROUP
    deadline = time.monotonic() + timeout_s
    stages: dict[int, Group] = {}
    misc_ranks = (0, *range(plan.num_train, plan.num_train + plan.num_gen))
    try:
        for stage in plan.rank_plan(rank).stages:
            name = f"stage{stage.stage}"
            stages[stage.stage] = open_group(
                control, name, stage.group_ranks, rank, backend, deadline, transport
            )
        misc = open_group(control, MISC, misc_ranks, rank, backend, deadline) if rank in misc_ranks else None
    except BaseException:
        Groups(stages, None).close()
        raise
    return Groups(stages, misc)


def open_group(
    control: ControlStore,
    name: str,
    ranks: tuple[int, ...],
    rank: int,
    backend: str,
    deadline: float,
    transport: str = PROCESS_GROUP,
) -> Group:
    """Open one group once all its members say they are here, so that a missing one is named and not just waited for."""
    control.put(f"group/{name}/{rank}", "here")
    for member in ranks:
        control.get(f"group/{name}/{member}", deadline - time.monotonic())
    left_s = max(1.0, deadline - time.monotonic())
    store = control.group_store(name)
    at = ranks.index(rank)
    calls = BoundedCalls(f"the rendezvous of group {name!r} at {control.address}:{control.port}")
    try:
        process_group = calls.run(
            lambda: _process_group(backend, store, at, len(ranks), left_s, control.address), left_s + ANSWER_S
        )
    except RuntimeError as error:
        control.raise_if_failed()
        raise TransportError(
            f"rank {rank} cannot open group {name!r} of ranks {ranks} over {backend} within {left_s:.1f} s: {error}"
        ) from error
    finally:
        calls.close()
    collectives = ProcessGroupTransport(process_group, ranks, rank)
    if transport == PROCESS_GROUP:
        return Group(name, ranks, rank, collectives, process_group)
    if transport not in WAYS:
        raise ConfigError(f"refit.transport is {transport!r}; it can be one of {', '.join(TRANSPORTS)}")
    way = WAYS[transport](control, name, ranks, rank, deadline)
    return Group(name, ranks, rank, way, process_group, collectives)


def _process_group(
    backend: str, store: Store, position: int, size: int, timeout_s: float, address: str
) -> ProcessGroup:
    limit = timedelta(seconds=timeout_s)
    if backend == "nccl":
        from torch._C._distributed_c10d import ProcessGroupNCCL  # absent from a CPU build

        nccl_options = ProcessGroupNCCL.Options()
        nccl_options._timeout = limit
        return cast(ProcessGroup, ProcessGroupNCCL(store, position, size, nccl_options))
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = limit
    options._devices = [_gloo_device(address)]
    options._threads = 2
    # The stubs know the collectives of a ProcessGroup only; a bare backend has the same ones.
    return cast(ProcessGroup, ProcessGroupGloo(store, position, size, options))  # type: ignore[arg-type]


def _gloo_device(address: str) -> ProcessGroupGloo.Device:
    """Loopback where the control store is on loopback; else torch's choice, which GLOO_SOCKET_IFNAME steers."""
    if address == "localhost" or ipaddress.ip_address(address).is_loopback:
        return ProcessGroupGloo.create_device(hostname="127.0.0.1")
    return ProcessGroupGloo.create_default_device()

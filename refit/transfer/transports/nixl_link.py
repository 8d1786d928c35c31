"""NIXL: one-sided reads over UCX (InfiniBand, RoCE, shared memory, TCP), of host or CUDA memory.

One agent per rank and group. Agents meet through the control store; from then on all messages are NIXL notifications.
Memory is registered for as long as it is on offer, and no longer: a registration that outlives its memory would let a
peer read whatever comes to lie there.

Facts of nixl 1.5.1 without InfiniBand, tried on a CPU machine: UCX turns a read into messages over shared memory or
TCP, which NIXL's progress thread answers in the sender. The sender's own threads do nothing, but a stopped sender
(SIGSTOP) stalls its reader up to the deadline. Reads by hardware were not tried.
"""

import base64
import ipaddress
import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from refit.plan import ConfigError
from refit.transfer.errors import TransportError, take_all
from refit.transfer.rendezvous import ControlStore
from refit.transfer.transports.one_sided import OneSidedTransport

PLACE = struct.Struct(
    "<QQ?"
)  # address, device, whether it is CUDA memory; the agent's metadata for it follows


def open_transport(
    control: ControlStore, name: str, ranks: Sequence[int], rank: int, deadline: float
) -> OneSidedTransport:
    """One rank's end of group `name`. Collective over `ranks`; raises TransportError at the deadline."""
    return OneSidedTransport(NixlLink.open(control, name, ranks, rank, deadline), ranks, rank)


class NixlLink:
    """A `Link` over one NIXL agent. `peers` maps joint ranks to the names of their agents."""

    def __init__(self, agent: Any, peers: Mapping[int, str]) -> None:
        self._agent = agent
        self._peers = peers
        self._ranks = {name: rank for rank, name in peers.items()}
        self._running: set[_Read] = set()

    @classmethod
    def open(
        cls, control: ControlStore, name: str, ranks: Sequence[int], rank: int, deadline: float
    ) -> "NixlLink":
        """Make an agent and exchange connection metadata with those of the other ranks, over the control store."""
        agent = _agent(f"{control.run_id}/{name}/{rank}", control.address)
        control.put(f"nixl/{name}/{rank}", base64.b64encode(agent.get_agent_metadata()).decode())
        peers: dict[int, str] = {}
        for peer in ranks:
            if peer == rank:
                continue
            metadata = control.get(f"nixl/{name}/{peer}", deadline - time.monotonic())
            peers[peer] = _text(
                _call(f"meet rank {peer}", agent.add_remote_agent, base64.b64decode(str(metadata)))
            )
        return cls(agent, peers)

    def messages(self) -> list[tuple[int, bytes]]:
        found = _call("look for notifications", self._agent.get_new_notifs)
        return [
            (self._ranks[_text(name)], message) for name, messages in found.items() for message in messages
        ]

    def send(self, peer: int, message: bytes) -> None:
        _call(f"send a notification to rank {peer}", self._agent.send_notif, self._peers[peer], message)

    def is_flushed(self) -> bool:
        return True  # NIXL has a notification the moment it is sent

    def offer(self, payload: Tensor) -> tuple[bytes, Callable[[], None]]:
        registered = self._register(payload)
        keys = _call(
            "describe memory",
            self._agent.get_partial_agent_metadata,
            registered,
            False,
            [*self._agent.backends],
        )
        place = PLACE.pack(payload.data_ptr(), max(0, payload.get_device()), payload.is_cuda)
        return place + keys, lambda: self._deregister(registered)

    def read(self, peer: int, description: bytes, payload: Tensor) -> Callable[[], bool]:
        address, device, is_cuda = PLACE.unpack_from(description)
        agent, name, num_bytes = self._agent, self._peers[peer], payload.numel()
        words = f"read {num_bytes} bytes of rank {peer}"
        _call(words, agent.add_remote_agent, description[PLACE.size :])
        registered = self._register(payload)
        local = agent.get_xfer_descs([_row(payload)], _kind(payload.is_cuda))
        remote = agent.get_xfer_descs([(address, num_bytes, device)], _kind(is_cuda))
        handle = _call(words, agent.initialize_xfer, "READ", local, remote, name)
        read = _Read(self, words, handle, registered, payload)
        self._running.add(read)
        read.start()
        return read.is_done

    def close(self) -> None:
        """A read that cannot be cancelled keeps its agent and its memory, so that nothing is written elsewhere.

        Everything is ended, also after a step that fails; then its error is raised.
        """
        agent = self._agent
        reads = [read.end for read in self._running]
        leaves = [
            partial(_call, f"leave {name}", agent.remove_remote_agent, name) for name in self._peers.values()
        ]
        try:
            take_all([*reads, *leaves])
        finally:
            self._agent = agent if self._running else None

    def _register(self, payload: Tensor) -> Any:
        rows = [(*_row(payload), "")]
        words = f"register {payload.numel()} bytes"
        return _call(words, self._agent.register_memory, rows, _kind(payload.is_cuda))

    def _deregister(self, registered: Any) -> None:
        _call("deregister memory", self._agent.deregister_memory, registered)


class _Read:
    """One READ. Holds the payload until it ended."""

    def __init__(self, link: NixlLink, words: str, handle: Any, registered: Any, payload: Tensor) -> None:
        self._link = link
        self._words = words
        self._handle = handle
        self._registered = registered
        self._payload = payload

    def start(self) -> None:
        self._require("PROC", _call(self._words, self._link._agent.transfer, self._handle))

    def is_done(self) -> bool:
        state = _call(self._words, self._link._agent.check_xfer_state, self._handle)
        if state == "DONE":
            self.end()
            return True
        self._require("PROC", state)
        return False

    def end(self) -> None:
        """Raises TransportError if the read can neither be finished nor cancelled."""
        _call(f"end: {self._words}", self._link._agent.release_xfer_handle, self._handle)
        self._link._deregister(self._registered)
        self._link._running.discard(self)

    def _require(self, wanted: str, state: str) -> None:
        if state not in (wanted, "DONE"):
            raise TransportError(f"cannot {self._words}: NIXL says {state}")


def _agent(name: str, address: str) -> Any:
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")  # else each agent prints two lines on stdout
    if address == "localhost" or ipaddress.ip_address(address).is_loopback:
        os.environ.setdefault("UCX_NET_DEVICES", "lo")  # a job on loopback listens on loopback only
    try:
        from nixl._api import nixl_agent, nixl_agent_config
    except ImportError as error:
        raise ConfigError(
            f"refit.transport is 'nixl', but the package nixl cannot be imported ({error}); install nixl with the "
            f"wheel of your CUDA version (nixl-cu13), or use refit.transport=auto"
        ) from error
    return _call(f"make agent {name!r}", nixl_agent, name, nixl_agent_config(backends=["UCX"]))


def _call(words: str, call: Callable[..., Any], *args: Any) -> Any:
    """NIXL's errors derive from Exception alone, one class per status."""
    try:
        return call(*args)
    except Exception as error:
        raise TransportError(f"NIXL cannot {words}: {type(error).__name__} {error}") from error


def _row(payload: Tensor) -> tuple[int, int, int]:
    return payload.data_ptr(), payload.numel(), max(0, payload.get_device())


def _kind(is_cuda: bool) -> str:
    return "VRAM" if is_cuda else "DRAM"


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name

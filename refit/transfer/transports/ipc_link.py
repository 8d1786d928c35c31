"""CUDA IPC: ranks that share a GPU read each other's memory through handles; nothing crosses a wire.

The order, waits and aborts are those of `one_sided`, tested on a CPU with memory of the own process in place of CUDA's.
`CudaMemory` has not been run for lack of a GPU: its tests are in `tests/gpu`.
"""

import json
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from refit.transfer.errors import TransportError
from refit.transfer.rendezvous import ControlStore
from refit.transfer.transports.local_mail import LocalMail
from refit.transfer.transports.one_sided import OneSidedTransport


class SharedMemory(Protocol):
    """How memory is named to another process, and opened there."""

    def describe(self, payload: Tensor) -> bytes:
        """Words by which a peer can open the memory of a contiguous uint8 tensor."""

    def open(self, description: bytes, like: Tensor) -> Tensor:
        """The peer's memory as a tensor of the size and device of `like`. Raises TransportError."""


def open_transport(
    control: ControlStore, name: str, ranks: Sequence[int], rank: int, deadline: float
) -> OneSidedTransport:
    """One rank's end of group `name`. Collective over `ranks`; raises TransportError at the deadline."""
    mail = LocalMail.open(control, name, ranks, rank, deadline)
    return OneSidedTransport(IpcLink(mail, CudaMemory()), ranks, rank)


class IpcLink:
    """A `Link` for ranks of one machine."""

    def __init__(self, mail: LocalMail, memory: SharedMemory) -> None:
        self._mail = mail
        self._memory = memory

    def messages(self) -> list[tuple[int, bytes]]:
        return self._mail.messages()

    def send(self, peer: int, message: bytes) -> None:
        self._mail.send(peer, message)

    def is_flushed(self) -> bool:
        return self._mail.is_flushed

    def offer(self, payload: Tensor) -> tuple[bytes, Callable[[], None]]:
        return self._memory.describe(payload), lambda: None

    def read(self, peer: int, description: bytes, payload: Tensor) -> Callable[[], bool]:
        source = self._memory.open(description, payload)
        if source.numel() != payload.numel():
            raise TransportError(f"rank {peer} offers {source.numel()} bytes, {payload.numel()} are wanted")
        payload.copy_(source, non_blocking=True)
        event = torch.cuda.current_stream(payload.device).record_event() if payload.is_cuda else None

        def is_read() -> bool:
            # Holds the peer's memory open for as long as the copy may run.
            return source is not None and (event is None or event.query())

        return is_read

    def close(self) -> None:
        self._mail.close()


class CudaMemory:
    """CUDA memory by the handle of its allocation. Opening one costs a driver call (9 times more with expandable
    segments), and ends with the last tensor on it."""

    def describe(self, payload: Tensor) -> bytes:
        if not payload.is_cuda:
            raise TransportError(
                "refit.transport is 'cuda_ipc', but a payload lies in host memory; use auto or nixl"
            )
        facts = payload.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
        plain = [fact.hex() if isinstance(fact, bytes) else fact for fact in facts[1:]]
        return json.dumps([payload.storage_offset(), payload.numel(), *plain]).encode()

    def open(self, description: bytes, like: Tensor) -> Tensor:
        first, num_bytes, handle, size, offset, counter, counter_offset, event, must_sync = json.loads(
            description
        )
        try:
            storage = torch.UntypedStorage._new_shared_cuda(
                like.get_device(),  # the same GPU may have another number at the sender
                bytes.fromhex(handle),
                size,
                offset,
                bytes.fromhex(counter),
                counter_offset,
                bytes.fromhex(event),
                must_sync,
            )
        except RuntimeError as error:
            raise TransportError(
                f"cannot open the sender's CUDA memory: {error}; do both ranks share a GPU?"
            ) from error
        return torch.empty(0, dtype=torch.uint8, device=like.device).set_(storage, first, (num_bytes,), (1,))

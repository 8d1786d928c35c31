"""Packed broadcast of whole tensors from the first rank of a group to all others, for what cannot go in bulk.

The sender opens with one fixed message: protocol number and chunk bytes. Chunk bytes come from the agreed options; a
receiver with another number stops there, because different cuts would hang. Then, per chunk, a frame of fixed size
(bytes of the chunk, bytes and CRC of its index, CRC of these and the frame's number; no bytes end the broadcast) and
the chunk itself:

    payload (pieces of tensors, 16-byte aligned) | index as JSON

A damaged size would end or hang a process group and a damaged index could name another tensor, so frame and index are
checked before they are used. The payload is left to the digest of each tensor, which the coordinator compares.

The index names each piece: tensor, dtype, shape, first byte in the tensor, bytes, place in the chunk. Both ends have
two buffers: the sender packs the next chunk while one is on the wire, the receiver unpacks one while the next arrives.
Extra memory: two chunks and, on receivers, the open tensor.

A receiver checks names, shapes and dtypes against what it expects and refuses duplicates and leftovers by name.
"""

import itertools
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor
from torch._C._distributed_c10d import Work

from refit.plan import TensorSpec
from refit.transfer.errors import TransportError
from refit.transfer.groups import Group
from refit.transfer.memory import as_bytes, copy_cast, dtype_name, torch_dtype

PROTOCOL = 2
OPENING_WORDS, FRAME_WORDS = 2, 4
ALIGNMENT_BYTES = 16
INDEX_BYTES = 64 << 10  # room for a chunk's index; a chunk is closed when it is full
LONGEST_ROW_BYTES = 4 << 10


@dataclass(frozen=True, slots=True)
class Piece:
    """One run of bytes of one tensor inside a chunk."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    first_byte: int
    num_bytes: int
    start_byte: int

    def row(self) -> list[object]:
        return [self.name, self.dtype, list(self.shape), self.first_byte, self.num_bytes, self.start_byte]


def send_packed(
    tensors: Iterable[tuple[str, Tensor]],
    group: Group,
    expected: Mapping[str, TensorSpec],
    chunk_bytes: int,
    deadline: float,
    device: torch.device,
) -> int:
    """Send every tensor, cast to its expected dtype; returns bytes of payload. Called on the group's first rank.

    `expected` maps each name to its full shape and wire dtype. Raises TransportError for a name that is unexpected,
    sent twice or never sent, and for another shape.
    """
    ledger = _Ledger(expected, "the exporter yields")
    wire = _Sender(group, chunk_bytes, deadline, device)
    for name, tensor in tensors:
        spec = ledger.open(name, tuple(tensor.shape))
        wire.add(spec, as_bytes(to_wire(tensor, spec)))
        ledger.done(name)
    ledger.close()
    return wire.finish()


def receive_packed(
    group: Group, expected: Mapping[str, TensorSpec], chunk_bytes: int, deadline: float, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield every expected tensor once, in the order of the sender, in memory of its own. Empty ones come last."""
    ledger = _Ledger(expected, "the broadcast holds")
    open_tensors: dict[str, tuple[Tensor, int]] = {}
    for buffer, pieces in _chunks(group, chunk_bytes, deadline, device):
        for piece in pieces:
            if piece.first_byte == 0:
                spec = ledger.open(piece.name, piece.shape, piece.dtype)
                open_tensors[piece.name] = (
                    torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=device),
                    0,
                )
            tensor, received = _take(open_tensors, piece, buffer)
            if received == tensor.numel() * tensor.element_size():
                del open_tensors[piece.name]
                ledger.done(piece.name)
                yield piece.name, tensor
    for name, spec in expected.items():
        if prod(spec.shape) == 0:
            ledger.open(name, spec.shape)
            ledger.done(name)
            yield name, torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=device)
    ledger.close()


def _take(open_tensors: dict[str, tuple[Tensor, int]], piece: Piece, buffer: Tensor) -> tuple[Tensor, int]:
    """Copy a piece to its place; returns the tensor and how many of its bytes have arrived."""
    if piece.name not in open_tensors:
        raise TransportError(
            f"misc tensor {piece.name!r} continues at byte {piece.first_byte} but was never opened"
        )
    tensor, received = open_tensors[piece.name]
    if piece.first_byte != received:
        raise TransportError(
            f"misc tensor {piece.name!r} continues at byte {piece.first_byte}; {received} have arrived"
        )
    target = as_bytes(tensor)[received : received + piece.num_bytes]
    target.copy_(buffer[piece.start_byte : piece.start_byte + piece.num_bytes])
    open_tensors[piece.name] = tensor, received + piece.num_bytes
    return open_tensors[piece.name]


def to_wire(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """The tensor, contiguous, in the wire dtype."""
    found = tensor.detach()
    if dtype_name(found.dtype) == spec.dtype and found.is_contiguous():
        return found
    packed = torch.empty(found.shape, dtype=torch_dtype(spec.dtype), device=found.device)
    copy_cast(packed, found)
    return packed


class _Ledger:
    """Which expected tensors have been seen."""

    def __init__(self, expected: Mapping[str, TensorSpec], subject: str) -> None:
        self._expected = expected
        self._subject = subject
        self._open: set[str] = set()
        self._done: set[str] = set()

    def open(self, name: str, shape: tuple[int, ...], dtype: str | None = None) -> TensorSpec:
        spec = self._expected.get(name)
        if spec is None:
            raise TransportError(
                f"{self._subject} {name!r}, which is unexpected: it is not a misc tensor of the plan"
            )
        if name in self._open or name in self._done:
            raise TransportError(f"{self._subject} {name!r} twice (duplicate)")
        if shape != spec.shape:
            raise TransportError(f"{self._subject} {name!r} with shape {shape}; the plan says {spec.shape}")
        if dtype is not None and dtype != spec.dtype:
            raise TransportError(f"{self._subject} {name!r} with dtype {dtype}; the plan says {spec.dtype}")
        self._open.add(name)
        return spec

    def done(self, name: str) -> None:
        self._open.remove(name)
        self._done.add(name)

    def close(self) -> None:
        missing = [name for name in self._expected if name not in self._done]
        if missing:
            raise TransportError(
                f"{self._subject} no (or only a part of) {len(missing)} of {len(self._expected)} misc tensors that the "
                f"plan expects; missing: {', '.join(missing[:8])}"
            )


@dataclass(slots=True)
class _Chunk:
    """One buffer of the sender and what it holds. `work` is set while it is on the wire."""

    buffer: Tensor
    used: int = 0
    rows: list[str] = field(default_factory=list)
    row_bytes: int = 0
    work: Work | None = None

    def add(self, piece: Piece, payload: Tensor) -> None:
        self.buffer[piece.start_byte : piece.start_byte + piece.num_bytes].copy_(payload)
        self.used = -(-(piece.start_byte + piece.num_bytes) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        row = json.dumps(piece.row(), separators=(",", ":"))
        self.rows.append(row)
        self.row_bytes += len(row) + 1

    def message(self) -> tuple[Tensor, bytes]:
        """The bytes to send, and those of them that are index."""
        index = f"[{','.join(self.rows)}]".encode()
        end = self.used + len(index)
        self.buffer[self.used : end].copy_(torch.frombuffer(bytearray(index), dtype=torch.uint8))
        return self.buffer[:end], index


class _Sender:
    """Packs pieces into one of two buffers while the other is on the wire."""

    def __init__(self, group: Group, chunk_bytes: int, deadline: float, device: torch.device) -> None:
        if chunk_bytes < ALIGNMENT_BYTES:
            raise TransportError(f"chunk_bytes is {chunk_bytes}; give at least {ALIGNMENT_BYTES}")
        self._group = group
        self._chunk_bytes = chunk_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        self._deadline = deadline
        self._device = device
        self._chunks = [
            _Chunk(torch.empty(self._chunk_bytes + INDEX_BYTES, dtype=torch.uint8, device=device))
            for _ in range(2)
        ]
        self._sent_bytes = 0
        self._num_frames = 0
        self._post_numbers(PROTOCOL, chunk_bytes)

    def add(self, spec: TensorSpec, payload: Tensor) -> None:
        """Queue all bytes of one tensor; sends chunks as they fill up."""
        first, total = 0, payload.numel()
        while first < total:
            chunk = self._chunks[0]
            room = self._chunk_bytes - chunk.used
            num_bytes = min(room, total - first)
            piece = Piece(spec.name, spec.dtype, spec.shape, first, num_bytes, chunk.used)
            chunk.add(piece, payload[first : first + num_bytes])
            first += num_bytes
            if chunk.used >= self._chunk_bytes or chunk.row_bytes > INDEX_BYTES - LONGEST_ROW_BYTES:
                self._send()
        self._sent_bytes += total

    def finish(self) -> int:
        """Send what is left and the end mark. Returns bytes of payload."""
        if self._chunks[0].rows:
            self._send()
        self._post_frame(0, b"")
        self._settle(self._chunks[1])
        return self._sent_bytes

    def _send(self) -> None:
        full, other = self._chunks
        message, index = full.message()
        self._settle(other)
        self._post_frame(message.numel(), index)
        full.work = _post(self._group, message)
        self._chunks = [other, full]

    def _settle(self, chunk: _Chunk) -> None:
        """Wait until a buffer is off the wire, and empty it."""
        if chunk.work is not None:
            _wait(self._group, chunk.work, f"send of a misc chunk of {chunk.used} bytes", self._deadline)
        chunk.used, chunk.rows, chunk.row_bytes, chunk.work = 0, [], 0, None

    def _post_frame(self, num_bytes: int, index: bytes) -> None:
        numbers = num_bytes, len(index), zlib.crc32(index)
        self._post_numbers(*numbers, _frame_check(self._num_frames, *numbers))
        self._num_frames += 1

    def _post_numbers(self, *numbers: int) -> None:
        frame = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        _wait(self._group, _post(self._group, frame), "send of a misc frame", self._deadline)


def _chunks(
    group: Group, chunk_bytes: int, deadline: float, device: torch.device
) -> Iterator[tuple[Tensor, tuple[Piece, ...]]]:
    """Chunks as they come in; while the caller works on one, the next arrives in the other buffer."""
    protocol, agreed_bytes = _receive_numbers(group, OPENING_WORDS, deadline, device)
    if (protocol, agreed_bytes) != (PROTOCOL, chunk_bytes):
        raise TransportError(
            f"rank {group.ranks[0]} broadcasts by protocol {protocol} in chunks of {agreed_bytes} bytes, this rank "
            f"expects protocol {PROTOCOL} and {chunk_bytes} bytes; give both sides the same version and options"
        )
    buffers = [torch.empty(chunk_bytes + INDEX_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
    arrived: tuple[Tensor, tuple[Piece, ...]] | None = None
    for number in itertools.count():
        num_bytes, index_bytes, index_check = _receive_frame(group, number, deadline, device)
        if not num_bytes:
            break
        if not 0 < index_bytes <= num_bytes <= buffers[0].numel():
            raise TransportError(
                f"rank {group.ranks[0]} announces a misc chunk of {num_bytes} bytes with an index of {index_bytes}; "
                f"a chunk has at most {buffers[0].numel()}: the two sides are out of step"
            )
        message = buffers[0][:num_bytes]
        work = _post(group, message)
        if arrived is not None:
            yield arrived
        _wait(group, work, f"receive of a misc chunk of {num_bytes} bytes", deadline)
        arrived = message, _pieces(message[num_bytes - index_bytes :], index_check, number, group)
        buffers.reverse()
    if arrived is not None:
        yield arrived


def _pieces(index: Tensor, check: int, number: int, group: Group) -> tuple[Piece, ...]:
    text = index.cpu().numpy().tobytes()
    if zlib.crc32(text) != check:
        raise TransportError(
            f"the index of misc chunk {number} from rank {group.ranks[0]} has CRC {zlib.crc32(text):08x}, its frame "
            f"says {check:08x}: bytes changed on the way; refit again, and look at that link if it comes often"
        )
    return tuple(
        Piece(name, dtype, tuple(shape), first, num, start)
        for name, dtype, shape, first, num, start in json.loads(text)
    )


def _receive_frame(group: Group, number: int, deadline: float, device: torch.device) -> tuple[int, int, int]:
    """Bytes of the chunk and of its index, and the CRC of the index, once the frame is known to be whole."""
    *numbers, check = _receive_numbers(group, FRAME_WORDS, deadline, device)
    found = _frame_check(number, *numbers)
    if found != check:
        raise TransportError(
            f"frame {number} of the misc broadcast from rank {group.ranks[0]} is damaged: {numbers} has CRC "
            f"{found:08x}, it says {check:08x}: bytes changed on the way; refit again, and look at that link if "
            "it comes often"
        )
    num_bytes, index_bytes, index_check = numbers
    return num_bytes, index_bytes, index_check


def _frame_check(number: int, *numbers: int) -> int:
    return zlib.crc32(struct.pack(f"<{1 + len(numbers)}q", number, *numbers))


def _receive_numbers(group: Group, count: int, deadline: float, device: torch.device) -> list[int]:
    frame = torch.zeros(count, dtype=torch.int64, device=device)
    _wait(group, _post(group, frame), "receive of a misc frame", deadline)
    return [int(number) for number in frame.tolist()]


def _post(group: Group, tensor: Tensor) -> Work:
    return group.broadcast(tensor, group.ranks[0])


def _wait(group: Group, work: Work, words: str, deadline: float) -> None:
    group.wait_collective(f"{words} in group {group.name!r} (sender: rank {group.ranks[0]})", work, deadline)

"""Every bit of a packed broadcast, flipped in memory: it is refused with the reason, or a digest shows it."""

import itertools
import json
import zlib

import pytest
import torch

from refit.plan import TensorSpec
from refit.transfer.broadcast import INDEX_BYTES, PROTOCOL, _frame_check, receive_packed, send_packed
from refit.transfer.digest import whole_digest
from refit.transfer.errors import TransportError

CPU = torch.device("cpu")
CHUNK_BYTES = 64
PLANNED = {
    spec.name: spec
    for spec in (
        TensorSpec("a", (2, 3), "float32"),
        TensorSpec("b", (2, 3), "float32"),  # alike: each could be taken for the other
        TensorSpec("c", (5, 9), "bfloat16"),  # lies in several chunks
    )
}
SENT = {
    name: torch.randn(spec.shape, generator=torch.Generator().manual_seed(at)).to(getattr(torch, spec.dtype))
    for at, (name, spec) in enumerate(PLANNED.items())
}


class Recorded:
    """A group of one process: what the sender broadcasts is kept, and played to a receiver."""

    ranks, name = (0, 1), "misc"

    def __init__(self, messages=None):
        self.messages = [] if messages is None else list(messages)
        self._receives = messages is not None

    def broadcast(self, tensor, source):
        assert source == 0
        if not self._receives:
            self.messages.append(tensor.clone())
            return
        message = self.messages.pop(0)
        if message.nbytes != tensor.nbytes:
            raise AssertionError(
                f"{tensor.nbytes} bytes asked for, {message.nbytes} sent: a real group ends or hangs"
            )
        tensor.copy_(message)

    def wait_collective(self, words, work, deadline):
        """What is posted is there."""


@pytest.fixture(scope="module")
def stream():
    group = Recorded()
    send_packed(SENT.items(), group, PLANNED, CHUNK_BYTES, 0.0, CPU)
    return group.messages


def received(messages):
    return dict(receive_packed(Recorded(messages), PLANNED, CHUNK_BYTES, 0.0, CPU))


def flipped(messages, at, bit):
    """The stream with one bit of message `at` flipped."""
    found = list(messages)
    found[at] = messages[at].clone()
    found[at].view(torch.uint8)[bit // 8] ^= 1 << bit % 8
    return found


def test_a_whole_stream_is_received(stream):
    assert all(torch.equal(tensor, SENT[name]) for name, tensor in received(stream).items())
    assert stream[0].tolist() == [PROTOCOL, CHUNK_BYTES]
    assert len(stream) >= 8  # opening, three chunks with their frames, the end


def test_no_flipped_bit_passes_or_asks_a_group_for_another_size(stream):
    digests = {name: whole_digest(tensor) for name, tensor in SENT.items()}
    refused = differing = 0
    padding = {}  # bits between tensors, which nobody reads
    for at, message in enumerate(stream):
        for bit in range(8 * message.nbytes):
            try:
                found = received(flipped(stream, at, bit))
            except TransportError:
                refused += 1
                continue
            assert message.dtype == torch.uint8, f"bit {bit} of frame {at} was flipped and nobody saw it"
            if {name: whole_digest(tensor) for name, tensor in found.items()} != digests:
                differing += 1
            else:
                padding[at] = padding.get(at, 0) + 1
    payload_bits = 8 * sum(tensor.nbytes for tensor in SENT.values())
    assert differing == payload_bits, "each bit of a tensor, and no other, is left to the digests"
    assert sum(padding.values()) < 8 * 16 * len(SENT), "less than an alignment after each tensor"
    assert refused == 8 * sum(message.nbytes for message in stream) - differing - sum(padding.values())


def test_lost_repeated_and_exchanged_chunks_are_refused(stream):
    pairs = [tuple(stream[at : at + 2]) for at in range(1, len(stream) - 1, 2)]
    opening, end = stream[0], stream[-1]
    streams = [
        [opening, *itertools.chain(*chunks), end]
        for chunks in (pairs[1:], pairs[:-1], [pairs[0], *pairs], [pairs[1], pairs[0], *pairs[2:]])
    ]
    for messages in streams:
        with pytest.raises(TransportError, match=r"frame \d of the misc broadcast from rank 0 is damaged"):
            received(messages)


def chunk(pieces, size):
    """A frame and its chunk as a sender would post them: whole, whatever the pieces say."""
    index = json.dumps(pieces).encode()
    message = torch.cat(
        [torch.zeros(size, dtype=torch.uint8), torch.frombuffer(bytearray(index), dtype=torch.uint8)]
    )
    return message, (message.numel(), len(index), zlib.crc32(index))


def framed(*chunks):
    frames = [*(numbers for _, numbers in chunks), (0, 0, zlib.crc32(b""))]
    messages = [torch.tensor([PROTOCOL, CHUNK_BYTES])]
    for number, numbers in enumerate(frames):
        messages.append(torch.tensor([*numbers, _frame_check(number, *numbers)]))
        messages += [message for message, _ in chunks[number : number + 1]]
    return messages


def test_a_sender_that_leaves_a_gap_in_a_tensor_is_stopped_where_the_gap_begins():
    first = chunk([["a", "float32", [2, 3], 0, 8, 0]], 16)
    later = chunk([["a", "float32", [2, 3], 16, 8, 0]], 16)
    with pytest.raises(TransportError, match="'a' continues at byte 16; 8 have arrived"):
        received(framed(first, later))
    with pytest.raises(TransportError, match="'a' continues at byte 16 but was never opened"):
        received(framed(later))


def test_a_chunk_that_is_larger_than_the_agreed_one_is_refused_before_it_is_received():
    with pytest.raises(TransportError, match="the two sides are out of step"):
        received(framed(chunk([["a", "float32", [2, 3], 0, 24, 0]], CHUNK_BYTES + INDEX_BYTES + 1)))


def test_more_tensors_than_an_index_names_go_in_several_chunks():
    chunk_bytes, count = INDEX_BYTES, INDEX_BYTES // 16 - 1
    planned = {f"scale.{at}": TensorSpec(f"scale.{at}", (4,), "float32") for at in range(count)}
    sent = {name: torch.full((4,), float(at)) for at, name in enumerate(planned)}
    group = Recorded()
    send_packed(sent.items(), group, planned, chunk_bytes, 0.0, CPU)
    assert sum(map(len, planned)) > INDEX_BYTES // 2 and len(group.messages) > 4
    found = dict(receive_packed(Recorded(group.messages), planned, chunk_bytes, 0.0, CPU))
    assert all(torch.equal(found[name], tensor) for name, tensor in sent.items())

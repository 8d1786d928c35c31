"""Two small messages before the bytes of a delta refit.

    greeting  generator -> trainer, once per stage: the token of the version that it holds
    lengths   trainer -> generator, per round: the token that the deltas are against, then an int64 per parcel: as many
              bytes as the parcel has where it comes as it is, else those of its delta, 0 where nothing changed

A generator checks both before it makes room for anything.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from refit.transfer.compiled import CompiledParcel
from refit.transfer.delta.base import NO_TOKEN, TOKEN_BYTES
from refit.transfer.errors import TransportError

LENGTH_BYTES = 8
GREETING_TAG = 0


def lengths_tag(round_index: int) -> int:
    return 2 * round_index + 1


def payload_tag(round_index: int) -> int:
    return 2 * round_index + 2


def greeting_of(token: bytes) -> Tensor:
    return torch.frombuffer(bytearray(token), dtype=torch.uint8)


def empty_greeting() -> Tensor:
    return torch.empty(TOKEN_BYTES, dtype=torch.uint8)


def token_in(greeting: Tensor) -> bytes:
    return greeting[:TOKEN_BYTES].numpy().tobytes()


def lengths_of(token: bytes, lengths: Sequence[int]) -> Tensor:
    """The message about parcels of one round and peer."""
    return torch.cat([greeting_of(token), torch.tensor(lengths, dtype=torch.int64).view(torch.uint8)])


def empty_lengths(num_parcels: int) -> Tensor:
    return torch.empty(TOKEN_BYTES + LENGTH_BYTES * num_parcels, dtype=torch.uint8)


def lengths_in(
    message: Tensor, parcels: Sequence[CompiledParcel], token: bytes, peer: int
) -> tuple[int, ...]:
    """Bytes to expect of each parcel. Raises TransportError for a delta against what is not held, or a wrong length."""
    against = token_in(message)
    if against not in (NO_TOKEN, token):
        raise TransportError(
            f"rank {peer} sends changes of version token {against.hex()}, this rank holds {token.hex()}: "
            f"do all ranks run the same version of refit?"
        )
    lengths = tuple(message[TOKEN_BYTES:].clone().view(torch.int64).tolist())
    for length, parcel in zip(lengths, parcels, strict=True):
        if not 0 <= length <= parcel.num_bytes or (against == NO_TOKEN and length != parcel.num_bytes):
            kind = "sent whole" if against == NO_TOKEN else "sent as changes"
            raise TransportError(
                f"rank {peer} announces {length} bytes of a parcel of {parcel.num_bytes} that is {kind}: "
                f"do all ranks run the same version of refit?"
            )
    return lengths

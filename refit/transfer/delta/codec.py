"""The bytes that turn one state of a parcel into the next: which elements changed, and their new bits.

    blocks   one row of HEADER per BLOCK_ITEMS elements: how its places are told, how many changed, bytes of the places
    places   of all blocks in turn
    values   the changed elements of all blocks in turn
    tail     what is left where the parcel is no multiple of the element, always whole

A block tells its places in the shortest of three ways, or all of its elements where that is shorter still:

    GAPS     a byte per changed element: how many before it did not change, since the last that did. 255 stands for 255
             that did not change, and no element follows it
    PLACES   a uint16 per changed element: its place in the block
    MASK     a bit per element, the first one lowest
    WHOLE    no places: every element is sent

Elements are compared as bits, so a NaN equals itself and -0.0 is not 0.0. An empty message says that nothing changed.
Everything here is bytes in host memory; temporary memory is a few arrays of BLOCK_ITEMS.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from refit.transfer.errors import TransportError

type Bytes = npt.NDArray[np.uint8]
type Places = npt.NDArray[np.int64]

BLOCK_ITEMS = 1 << 16  # so that a place is a uint16, and a block of bfloat16 stays in the cache
HEADER = np.dtype([("kind", "u1"), ("num_values", "<u4"), ("places_bytes", "<u4")])
LONGEST_GAP = 255
WORD_ITEMS = 8  # of a mask of bools
SELDOM = 30  # one in so many elements: from there on most words of the mask are empty
ITEM_BYTES = (1, 2, 4, 8)


class Kind(IntEnum):
    """How a block tells its places."""

    NONE = 0
    GAPS = 1
    PLACES = 2
    MASK = 3
    WHOLE = 4


@dataclass(frozen=True, slots=True)
class _Block:
    """How one block is told. `places` are the bytes that tell them, `values` the elements."""

    kind: Kind
    places: Bytes
    values: npt.NDArray[np.unsignedinteger]


def encode(new: Bytes, base: Bytes, item_bytes: int) -> Bytes | None:
    """What turns `base` into `new`, both of one length; None where that would be no shorter than `new` itself."""
    assert new.size == base.size, f"a parcel of {new.size} bytes has a base of {base.size}"
    items, known = _items(new, base, item_bytes=item_bytes)
    tail = new[items.nbytes :]
    starts = range(0, items.size, BLOCK_ITEMS)
    headers = np.zeros(len(starts), dtype=HEADER)
    parts: list[list[Bytes]] = [[], []]
    num_bytes = headers.nbytes + tail.size
    for number, start in enumerate(starts):
        block = _told(items[start : start + BLOCK_ITEMS], known[start : start + BLOCK_ITEMS])
        if block is None:
            continue  # nothing changed in it, which is what a header of zeros says
        headers[number] = block.kind, block.values.size, block.places.size
        num_bytes += block.places.size + block.values.nbytes
        if num_bytes >= new.size:
            return None
        parts[0].append(block.places)
        parts[1].append(block.values.view(np.uint8))
    if not parts[1] and np.array_equal(tail, base[base.size - tail.size :]):
        return np.empty(0, dtype=np.uint8)
    if num_bytes >= new.size:
        return None
    told: Bytes = np.concatenate([headers.view(np.uint8), *parts[0], *parts[1], tail])
    return told


def decode(message: Bytes, target: Bytes, item_bytes: int) -> int:
    """Turn `target`, which holds the base, into the new state, in place. Returns how many elements were written.

    Raises TransportError for a message that `encode` does not make of a parcel of this size; `target` is torn then.
    """
    if not message.size:
        return 0
    (items,) = _items(target, item_bytes=item_bytes)
    num_blocks = -(-items.size // BLOCK_ITEMS)
    tail_bytes = target.size - items.nbytes
    headers = message[: num_blocks * HEADER.itemsize]
    _require(headers.size == num_blocks * HEADER.itemsize, message, target, "its headers are cut off")
    rows = headers.view(HEADER)
    places_at = headers.size
    values_at = places_at + int(rows["places_bytes"].sum(dtype=np.int64))
    values_bytes = int(rows["num_values"].sum(dtype=np.int64)) * item_bytes
    is_whole = values_at + values_bytes + tail_bytes == message.size
    _require(is_whole, message, target, "its headers tell another length")
    for number, (kind, num_values, places_bytes) in enumerate(rows.tolist()):
        block = items[number * BLOCK_ITEMS : (number + 1) * BLOCK_ITEMS]
        values = message[values_at : values_at + num_values * item_bytes].view(items.dtype)
        places = _places(kind, message[places_at : places_at + places_bytes], block.size)
        is_right = places is not None and places.size == num_values
        _require(is_right, message, target, f"its block {number} is not one of kind {kind}")
        block[places] = values
        places_at, values_at = places_at + places_bytes, values_at + values.nbytes
    target[items.nbytes :] = message[values_at:]
    return int(rows["num_values"].sum(dtype=np.int64))


def _items(*arrays: Bytes, item_bytes: int = 1) -> tuple[npt.NDArray[np.unsignedinteger], ...]:
    """The whole elements of each, as unsigned integers."""
    assert item_bytes in ITEM_BYTES, f"elements have 1, 2, 4 or 8 bytes, not {item_bytes}"
    return tuple(array[: array.size // item_bytes * item_bytes].view(f"<u{item_bytes}") for array in arrays)


def _told(new: npt.NDArray[np.unsignedinteger], base: npt.NDArray[np.unsignedinteger]) -> _Block | None:
    """The shortest way to tell a block; None if it did not change."""
    differs = new != base
    count = int(np.count_nonzero(differs))
    if not count:
        return None
    mask_bytes = -(-new.size // 8)
    nothing: Bytes = np.empty(0, dtype=np.uint8)
    if min(count, mask_bytes) + count * new.itemsize >= new.nbytes:
        return _Block(Kind.WHOLE, nothing, new)
    places = _set_places(differs, count)
    gaps = places.copy()
    np.subtract(places[1:], places[:-1], out=gaps[1:])
    gaps[1:] -= 1
    num_long = gaps // LONGEST_GAP
    gaps_bytes = count + int(num_long.sum())
    shortest = min(gaps_bytes, 2 * count, mask_bytes)
    if shortest + count * new.itemsize >= new.nbytes:
        return _Block(Kind.WHOLE, nothing, new)
    if shortest == gaps_bytes:
        return _Block(Kind.GAPS, _gap_bytes(gaps, num_long, gaps_bytes), new[places])
    if shortest == mask_bytes:
        return _Block(Kind.MASK, np.packbits(differs, bitorder="little"), new[places])
    return _Block(Kind.PLACES, places.astype("<u2").view(np.uint8), new[places])


def _set_places(differs: npt.NDArray[np.bool_], count: int) -> Places:
    """Where the mask is set, in rising order. Few are found by words of it first: twice as fast."""
    whole = differs.size // WORD_ITEMS * WORD_ITEMS
    if count * SELDOM > differs.size:
        return np.flatnonzero(differs)
    words = np.flatnonzero(differs[:whole].view(np.uint64) != 0)
    found = np.flatnonzero(differs[:whole].reshape(-1, WORD_ITEMS)[words])
    places = words[found // WORD_ITEMS] * WORD_ITEMS + found % WORD_ITEMS
    return np.concatenate([places, whole + np.flatnonzero(differs[whole:])])


def _gap_bytes(gaps: Places, num_long: Places, num_bytes: int) -> Bytes:
    if num_bytes == gaps.size:
        return gaps.astype(np.uint8)
    told: Bytes = np.full(num_bytes, LONGEST_GAP, dtype=np.uint8)
    told[np.cumsum(num_long + 1) - 1] = gaps - num_long * LONGEST_GAP
    return told


def _places(kind: int, told: Bytes, num_items: int) -> Places | None:
    """The places in a block of `num_items`, in rising order; None if the bytes are not of this kind."""
    found: Places
    match kind:
        case Kind.NONE:
            return np.empty(0, dtype=np.int64) if not told.size else None
        case Kind.GAPS:
            ends = told != LONGEST_GAP
            found = (np.cumsum(told + ends.astype(np.int64)) - 1)[ends]
        case Kind.PLACES:
            found = told[: told.size // 2 * 2].view("<u2").astype(np.int64)
        case Kind.MASK:
            if told.size != -(-num_items // 8):
                return None
            found = np.flatnonzero(np.unpackbits(told, bitorder="little"))
        case Kind.WHOLE:
            return np.arange(num_items) if not told.size else None
        case _:
            return None
    if found.size and not (found[-1] < num_items and bool((np.diff(found) > 0).all())):
        return None
    return found


def _require(is_right: bool, message: Bytes, target: Bytes, words: str) -> None:
    if not is_right:
        raise TransportError(
            f"a delta of {message.size} bytes for a parcel of {target.size} cannot be read: {words}; "
            f"do all ranks run the same version of refit?"
        )

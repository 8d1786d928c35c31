"""Digests of whole parcels: equal boxes that lie at equal distances are weighed in one call.

A parcel holds its segments row-major and 16-byte aligned. Where a segment is made of whole 64-bit words, it is a matrix
of rows by words: its digest is the products of its rows with the weights of the last dim, summed up with weights of
the rows. Layers and experts repeat, so in a parcel the same box comes again and again at a constant distance: all of
these are one call over memory that is read in place. A dim of size one only scales: experts share their weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from refit.plan import Region, Segment
from refit.transfer.digest import CHUNK_ELEMENTS, FOLD_BITS, WORD_BYTES, Weighing, digest, signed
from refit.transfer.kernels.words import weigh_boxes  # compiled here, outside of any deadline
from refit.transfer.memory import bits_dtype, torch_dtype

FREE_BYTES = 16 << 10  # weights of one box up to this size are kept however small the box


class HasBox(Protocol):
    """What a move says of its place in the parcel."""

    @property
    def segment(self) -> Segment: ...
    @property
    def start_byte(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Chain:
    """Equal boxes, `stride` words apart; each is a matrix of rows by words, `weights` those of words.

    One number per box: it is scaled by `scales`, `ones` is what its `+ 1`s add, and `sum_indexes` which sum it adds to.
    """

    first_word: int
    stride: int
    weights: Tensor
    row_weights: Tensor
    scales: Tensor
    ones: Tensor
    sum_indexes: Tensor

    @property
    def count(self) -> int:
        return self.scales.numel()

    def add(self, words: Tensor, sums: Tensor) -> None:
        """Add the digests of the boxes to the sums, wrapped int64."""
        if words.is_cuda:
            sums.index_add_(0, self.sum_indexes, self.digests(words))
            return
        per_box = (self.scales.numpy(), self.ones.numpy(), self.sum_indexes.numpy())
        weights = (self.weights.numpy(), self.row_weights.numpy())
        weigh_boxes(words.numpy(), self.first_word, self.stride, *weights, *per_box, sums.numpy())

    def digests(self, words: Tensor) -> Tensor:
        """One wrapped int64 per box, by torch: for devices that torch alone knows."""
        rows, size = self.row_weights.numel(), self.weights.numel()
        start = words.storage_offset() + self.first_word
        boxes = words.as_strided((self.count, rows, size), (self.stride, size, 1), start)
        of_rows = ((boxes + (boxes >> FOLD_BITS)) * self.weights).sum(-1)
        return (of_rows * self.row_weights).sum(-1) * self.scales + self.ones


@dataclass(frozen=True, slots=True)
class Odd:
    """A segment that is weighed by itself: it is not made of whole words, or its weights would take too much memory."""

    sum_index: int
    first_byte: int
    num_bytes: int
    dtype: torch.dtype
    region: Region
    tensor_shape: tuple[int, ...]

    def add(self, payload: Tensor, sums: Tensor) -> None:
        box = payload[self.first_byte : self.first_byte + self.num_bytes].view(bits_dtype(self.dtype))
        self.add_box(box.view(self.region.shape), sums)

    def add_box(self, box: Tensor, sums: Tensor) -> None:
        """The same for a view of the segment, strided in any way."""
        sums[self.sum_index] += signed(digest(box, self.region, self.tensor_shape))


@dataclass(frozen=True, slots=True)
class ParcelWeighing:
    """What the digests of one parcel need besides its bytes.

    `alone`: the only segment of a parcel, for the cases that it is weighed where it lies in its param, or in a param
    that is not aligned to words.
    """

    chains: tuple[Chain, ...]
    odd: tuple[Odd, ...]
    alone: Odd | None

    def add(self, payload: Tensor, sums: Tensor) -> None:
        """Add the digests of a parcel's bytes to the stage's sums, wrapped int64."""
        is_aligned = payload.data_ptr() % WORD_BYTES == 0 and payload.storage_offset() % WORD_BYTES == 0
        if self.alone is not None and not is_aligned:
            self.alone.add(payload, sums)
            return
        if self.chains:
            words = payload[: payload.numel() // WORD_BYTES * WORD_BYTES].view(torch.int64)
            for chain in self.chains:
                chain.add(words, sums)
        for odd in self.odd:
            odd.add(payload, sums)


class WeighingInMaking:
    """Makes the weighings of a stage, and the list of (tensor, dst_rank) that they sum up."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        self._shapes = shapes
        self._device = device
        self._indexes: dict[tuple[str, int], int] = {}
        self._weights: dict[object, tuple[Tensor, Tensor]] = {}

    @property
    def sums(self) -> tuple[tuple[str, int], ...]:
        return tuple(self._indexes)

    def index(self, tensor: str, dst_rank: int) -> int:
        """The number of the sum that a tensor's digest at `dst_rank` goes into."""
        return self._indexes.setdefault((tensor, dst_rank), len(self._indexes))

    def of(self, moves: Sequence[HasBox], dst_rank: int) -> ParcelWeighing:
        """The weighing of one parcel whose bytes `dst_rank` gets."""
        places: dict[object, list[_Place]] = {}
        odd: list[Odd] = []
        for move in moves:
            index = self.index(move.segment.tensor, dst_rank)
            if self._is_odd(move):
                odd.append(self._odd(move, index))
            else:
                key, place = self._weigh(move, index)
                places.setdefault(key, []).append(place)
        chains = [self._chain(chain, key) for key, found in places.items() for chain in _chains(found)]
        first = moves[0]
        alone = self._odd(first, self.index(first.segment.tensor, dst_rank)) if len(moves) == 1 else None
        return ParcelWeighing(tuple(chains), tuple(odd), alone)

    def _chain(self, places: Sequence["_Place"], key: object) -> Chain:
        weights, row_weights = self._weights[key]
        return Chain(
            places[0].word,
            places[1].word - places[0].word if len(places) > 1 else 0,
            weights,
            row_weights,
            self._numbers([place.scale for place in places]),
            self._numbers([place.ones for place in places]),
            self._numbers([place.sum_index for place in places]),
        )

    def _numbers(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _odd(self, move: HasBox, index: int) -> Odd:
        segment = move.segment
        shape = self._shapes[segment.tensor]
        dtype = torch_dtype(segment.wire_dtype)
        return Odd(index, move.start_byte, move.num_bytes, dtype, segment.region, shape)

    def _is_odd(self, move: HasBox) -> bool:
        segment = move.segment
        shape = segment.shape
        if not shape or 0 in shape or move.start_byte % WORD_BYTES:
            return True
        per_word = WORD_BYTES // torch_dtype(segment.wire_dtype).itemsize
        if segment.region.starts[-1] % per_word or segment.region.stops[-1] % per_word:
            return True
        if self._device.type == "cuda" and move.segment.region.num_elements > CHUNK_ELEMENTS:
            return True  # there the product is a tensor of its own, as large as the box
        num_weights = math.prod(shape[:-1]) + shape[-1] // per_word
        return num_weights * WORD_BYTES > max(FREE_BYTES, move.num_bytes // 16)

    def _weigh(self, move: HasBox, index: int) -> tuple[object, "_Place"]:
        """The key of the box's weights in `_weights`, which are made here if need be, and the box's place."""
        segment, region = move.segment, move.segment.region
        weighing = Weighing.of(region, torch_dtype(segment.wire_dtype).itemsize, self._device)
        spans = tuple(zip(region.starts, region.stops, strict=True))
        outer = tuple((dim, span) for dim, span in enumerate(spans[:-1]) if span[1] - span[0] > 1)
        key = (outer, len(spans), spans[-1], segment.wire_dtype)
        if key not in self._weights:
            self._weights[key] = self._made([weighing.weights[dim] for dim, _ in outer], weighing.weights[-1])
        ones = [weighing.weights[dim] for dim, (start, stop) in enumerate(spans[:-1]) if stop - start == 1]
        scale = signed(math.prod(int(weight.item()) for weight in ones))
        return key, _Place(move.start_byte // WORD_BYTES, scale, index, signed(weighing.ones))

    def _made(self, outer: Sequence[Tensor], last: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.ones(1, dtype=torch.int64, device=self._device)
        for weights in outer:
            rows = (rows[:, None] * weights).reshape(-1)
        return last, rows


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a box begins in its parcel, the product of the weights of its dims of size one, and where it adds what."""

    word: int
    scale: int
    sum_index: int
    ones: int


def _chains(places: Sequence[_Place]) -> list[list[_Place]]:
    """Cut places, in the order of their words, where the distance to the next one changes."""
    found: list[list[_Place]] = []
    for place in places:
        chain = found[-1] if found else []
        if len(chain) == 1 or (chain and place.word - chain[-1].word == chain[1].word - chain[0].word):
            chain.append(place)
        else:
            found.append([place])
    return found

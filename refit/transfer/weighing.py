"""Digests of whole parcels: equal boxes that lie at equal distances are weighed in one product.

A parcel holds its segments row-major and 16-byte aligned. Where a segment is made of whole 64-bit words, its digest is
one vector product over contiguous words, with weights that depend on the box alone. Layers and experts repeat, so in a
parcel the same box comes again and again at a constant distance: all of these are one matrix-vector product, read in
place. A dim of size one only scales: experts share their weights.

What a stage keeps of weights: at most KEPT_BYTES in products of a whole box, and the separable weights of the others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from refit.plan import Region, Segment
from refit.transfer.digest import CHUNK_ELEMENTS, WORD_BYTES, Weighing, digest, dot, row_products, signed
from refit.transfer.memory import bits_dtype, torch_dtype

KEPT_BYTES = 8 << 20
FREE_BYTES = 16 << 10  # weights of one box up to this size are kept however small the box
KEPT_WORDS = 1 << 14  # a larger box spends its time in arithmetic anyway: 128 KiB take 10 us


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
    """`count` boxes of equal weights, `stride` words apart; `scales` and `sums` hold one number per box.

    The box is a matrix of rows by words: `weights` are the products of all dims (`row_weights` None), or those of the
    words, with `row_weights` those of the rows.
    """

    first_word: int
    count: int
    stride: int
    weights: Tensor
    row_weights: Tensor | None
    scales: Tensor

    def partials(self, words: Tensor) -> Tensor:
        """One wrapped int64 per box."""
        size = self.weights.numel()
        if self.row_weights is None:
            boxes = words.as_strided(
                (self.count, size), (self.stride, 1), words.storage_offset() + self.first_word
            )
            return row_products(boxes, self.weights) * self.scales
        rows = self.row_weights.numel()
        box = words.as_strided((rows, size), (size, 1), words.storage_offset() + self.first_word)
        return dot(row_products(box, self.weights).view(1, rows), self.row_weights) * self.scales


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

    `sum_indexes` and `ones`, box by box in the order of the chains: which sum it adds to, and what its `+ 1`s add.
    `alone`: the only segment of a parcel, for the cases that it is weighed where it lies in its param, or in a param
    that is not aligned to words.
    """

    chains: tuple[Chain, ...]
    sum_indexes: Tensor
    ones: Tensor
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
            partials = torch.cat([chain.partials(words) for chain in self.chains])
            sums.index_add_(0, self.sum_indexes, partials.add_(self.ones))
        for odd in self.odd:
            odd.add(payload, sums)


class WeighingInMaking:
    """Makes the weighings of a stage, and the list of (tensor, dst_rank) that they sum up."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        self._shapes = shapes
        self._device = device
        self._indexes: dict[tuple[str, int], int] = {}
        self._weights: dict[object, tuple[Tensor, Tensor | None]] = {}
        self._kept_bytes = 0

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
        chains: list[Chain] = []
        summed: list[_Place] = []
        for key, found in places.items():
            for chain in _chains(found, self._weights[key][1] is None):
                chains.append(self._chain(chain, key))
                summed.extend(chain)
        indexes = self._numbers([place.sum_index for place in summed])
        ones = self._numbers([place.ones for place in summed])
        alone = self._odd(moves[0], (odd or summed)[0].sum_index) if len(moves) == 1 else None
        return ParcelWeighing(tuple(chains), indexes, ones, tuple(odd), alone)

    def _chain(self, places: Sequence["_Place"], key: object) -> Chain:
        weights, row_weights = self._weights[key]
        stride = places[1].word - places[0].word if len(places) > 1 else weights.numel()
        scales = self._numbers([place.scale for place in places])
        return Chain(places[0].word, len(places), stride, weights, row_weights, scales)

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

    def _made(self, outer: Sequence[Tensor], last: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = torch.ones(1, dtype=torch.int64, device=self._device)
        for weights in outer:
            rows = (rows[:, None] * weights).reshape(-1)
        num_words = rows.numel() * last.numel()
        if num_words <= KEPT_WORDS and self._kept_bytes + num_words * WORD_BYTES <= KEPT_BYTES:
            self._kept_bytes += num_words * WORD_BYTES
            return (rows[:, None] * last).reshape(-1), None
        return last, rows


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a box begins in its parcel, the product of the weights of its dims of size one, and where it adds what."""

    word: int
    scale: int
    sum_index: int
    ones: int


def _chains(places: Sequence[_Place], can_join: bool) -> list[list[_Place]]:
    """Cut places, in the order of their words, where the distance to the next one changes."""
    found: list[list[_Place]] = []
    for place in places:
        chain = found[-1] if found else []
        if can_join and (
            len(chain) == 1 or (chain and place.word - chain[-1].word == chain[1].word - chain[0].word)
        ):
            chain.append(place)
        else:
            found.append([place])
    return found

"""An additive, position-weighted 64-bit digest of tensor contents.

With items of `b` bytes, `k = 8 / b` elements of the last dim share one 64-bit word: element `i_n` is in word
`i_n div k`, and its bits `v` lie there `s = 8 b (i_n mod k)` bits up, all other bits zero. The element at index
`(i_0 .. i_n)` adds, mod 2**64,

    (fold(v * 2**s) + fold(2**s)) * h_n(i_n div k) * h_0(i_0) * .. * h_{n-1}(i_{n-1})

    fold(w) = w + (w >> 32), the shift arithmetic, of the word as a signed integer

where `h_d` are odd weights (splitmix64 of dim and index). Hence:

* digests of disjoint boxes add up to the digest of their union, whatever the cut and the strides: a fold of a word is
  the sum of the folds of its elements, since no element below bit 32 reaches above it;
* a change of one element always shows: a weight is odd, hence a unit, and a fold loses no bit (of 8 bytes: unless the
  element goes from one end of the int64 range to the very other, a step of more than 2**64 - 2**33);
* an element that moves, or two that swap, show, because the weights of two positions differ;
* a missing box of zeros shows too, by its `fold(2**s)`.

What it is for: errors, not adversaries. Two contents whose folded words differ by `x_j` at places of weight `g_j` have
one digest if `sum x_j g_j = 0` mod 2**64. Weights are as good as random and odd, so with `2**t` the largest power of
two that divides all `x_j` this has chance 2**-(63 - t). A wrong, missing, doubled or swapped box has t near 0. The fold
adds the upper half of each word to the lower one, so a bit is never further up than 31: t <= 31 whatever changed, and
the worst case, flipped top bits of two half words, goes unseen with chance 2**-32. (Without the fold two flipped top
bits of words have t = 63 and cancel for certain. A mix that is not linear would be stronger, but additive only over
cuts between whole words, or four times as slow where it mixes each bfloat16 by itself.)

Cost: on a CPU a compiled loop reads memory once, at 12 GB/s on one core here (a copy: 8), and 19 GB/s in the cache; on
a GPU it is less than the read. Words that are not aligned in memory are first copied, CHUNK_ELEMENTS at a time.
`weighing` does whole parcels at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from refit.plan import PlanError, Region
from refit.plan.region import split_rows
from refit.transfer.memory import as_bits

CHUNK_ELEMENTS = (
    1 << 20
)  # extra memory of a call is at most 8 bytes per element of one chunk, and its weights
CACHED_WEIGHTS = 1 << 12  # weight vectors up to this length are kept (1024 of them: at most 32 MiB)
WORD_BYTES = 8
FOLD_BITS = 32
MASK = (1 << 64) - 1
_GOLDEN, _MIX_1, _MIX_2, _DIM_STEP = (
    0x9E3779B97F4A7C15,
    0xBF58476D1CE4E5B9,
    0x94D049BB133111EB,
    0xD1B54A32D192ED03,
)


def digest(view: Tensor, region: Region, tensor_shape: Sequence[int]) -> int:
    """The contribution of one box, in [0, 2**64). `view` holds the elements of `region` of a tensor of `tensor_shape`.

    `view` may be strided in any way and have any dtype of 1, 2, 4 or 8 bytes.
    """
    if tuple(view.shape) != region.shape:
        raise PlanError(
            f"a view of shape {tuple(view.shape)} cannot hold region {region} of shape {region.shape}"
        )
    if len(tensor_shape) != view.dim() or any(s > n for s, n in zip(region.stops, tensor_shape, strict=True)):
        raise PlanError(f"region {region} is outside a tensor of shape {tuple(tensor_shape)}")
    bits = as_bits(view.detach())
    if view.dim() == 0:
        bits, region = bits.reshape(1), Region((0,), (1,))
    if bits.numel() <= CHUNK_ELEMENTS:
        return _chunk_digest(bits, region)
    total = 0
    for part in split_rows(region, CHUNK_ELEMENTS):
        total += _chunk_digest(bits[part.slices(region)], part)
    return total & MASK


@dataclass(frozen=True, slots=True)
class Weighing:
    """What the digest of one box needs besides its contents, worked out once for boxes that are digested again.

    `weights` are those of every dim, the last one in words; `ones` is what the `+ 1` of all elements adds.
    """

    weights: tuple[Tensor, ...]
    per_word: int
    lead: int
    ones: int

    @classmethod
    def of(cls, region: Region, item_bytes: int, device: torch.device) -> "Weighing":
        """For a box with at least one dim and one element."""
        per_word = WORD_BYTES // item_bytes
        last_dim = len(region.starts) - 1
        first_word, lead = divmod(region.starts[-1], per_word)
        stop_word = -(-region.stops[-1] // per_word)
        spans = tuple(zip(region.starts[:-1], region.stops[:-1], strict=True))
        ones = _ones_along_last(last_dim, per_word, region.starts[-1], region.stops[-1])
        for dim, (start, stop) in enumerate(spans):
            ones = ones * _weight_sum(dim, start, stop) & MASK
        of_rows = tuple(weights(dim, start, stop, device) for dim, (start, stop) in enumerate(spans))
        return cls((*of_rows, weights(last_dim, first_word, stop_word, device)), per_word, lead, ones)

    def partial(self, bits: Tensor) -> Tensor:
        """The sum over the contents alone, a wrapped int64 scalar on the device: `finish` makes it a digest."""
        words = _words(bits, self.per_word, self.lead, self.weights[-1].numel())
        rows = words.reshape(-1, words.shape[-1])
        total = row_products(rows, self.weights[-1]).view(words.shape[:-1])
        for by in reversed(self.weights[:-1]):
            total = dot(total, by)
        return total

    def finish(self, partial: int) -> int:
        return (partial + self.ones) & MASK


def whole_digest(tensor: Tensor) -> int:
    """The digest of a full tensor."""
    return digest(tensor, Region.whole(tuple(tensor.shape)), tuple(tensor.shape))


def _chunk_digest(bits: Tensor, region: Region) -> int:
    if bits.numel() == 0:
        return 0
    weighing = Weighing.of(region, bits.element_size(), bits.device)
    return weighing.finish(int(weighing.partial(bits).item()))


def row_products(words: Tensor, by: Tensor) -> Tensor:
    """The product of each folded row of a matrix of words with `by`. Rows may lie apart, or on each other."""
    if words.is_cuda:
        return dot(words, by) + dot(words >> FOLD_BITS, by)
    from refit.transfer.kernels.words import fold_products

    num_rows, size = words.shape
    if size > 1 and words.stride(1) != 1:
        words = words.contiguous()
    step = words.stride(0)
    span = (num_rows - 1) * step + size if words.numel() else 0
    flat = words.as_strided((span,), (1,), words.storage_offset())
    found = torch.empty(num_rows, dtype=torch.int64)
    fold_products(flat.numpy(), step, by.numpy(), found.numpy())
    return found


def dot(words: Tensor, by: Tensor) -> Tensor:
    """Wrapped int64 product along the last dim; torch has no integer matmul on CUDA."""
    return (words * by).sum(-1) if words.is_cuda else words @ by


def _words(bits: Tensor, per_word: int, lead: int, num_words: int) -> Tensor:
    """The box as 64-bit words along its last dim: a view where memory allows it, else a copy padded with zeros."""
    if per_word == 1:
        return bits
    if lead == 0 and bits.shape[-1] == num_words * per_word and _is_word_aligned(bits, per_word):
        return bits.view(torch.int64)
    words = torch.zeros((*bits.shape[:-1], num_words), dtype=torch.int64, device=bits.device)
    words.view(bits.dtype)[..., lead : lead + bits.shape[-1]].copy_(bits)
    return words


def _is_word_aligned(bits: Tensor, per_word: int) -> bool:
    return (
        bits.stride(-1) == 1
        and bits.data_ptr() % WORD_BYTES == 0
        and bits.storage_offset() % per_word == 0
        and all(stride % per_word == 0 for stride in bits.stride()[:-1])
    )


def weights(dim: int, start: int, stop: int, device: torch.device) -> Tensor:
    """The odd weights of positions [start, stop) of a dim (words of the last dim), as wrapped int64."""
    if stop - start <= CACHED_WEIGHTS:
        return _kept_weights(dim, start, stop, device)
    return _fresh_weights(dim, start, stop, device)


@lru_cache(maxsize=1024)
def _kept_weights(dim: int, start: int, stop: int, device: torch.device) -> Tensor:
    return _fresh_weights(dim, start, stop, device)


def _fresh_weights(dim: int, start: int, stop: int, device: torch.device) -> Tensor:
    """splitmix64 (Steele, Lea, Flood 2014) of (dim, position), made odd."""
    mixed = torch.arange(start, stop, dtype=torch.int64, device=device)
    mixed = mixed * signed(_GOLDEN) + signed((dim + 1) * _DIM_STEP)
    mixed = (mixed ^ _shifted(mixed, 30)) * signed(_MIX_1)
    mixed = (mixed ^ _shifted(mixed, 27)) * signed(_MIX_2)
    return (mixed ^ _shifted(mixed, 31)) | 1


@lru_cache(maxsize=4096)
def _weight_sum(dim: int, start: int, stop: int) -> int:
    """Sum of weights, mod 2**64."""
    return int(weights(dim, start, stop, torch.device("cpu")).sum().item()) & MASK


@lru_cache(maxsize=4096)
def _ones_along_last(dim: int, per_word: int, start: int, stop: int) -> int:
    """What the `+ 1` of elements [start, stop) of the last dim adds: whole words less what sticks out at both ends."""
    item_bits = 8 * WORD_BYTES // per_word
    first_word, lead = divmod(start, per_word)
    stop_word = -(-stop // per_word)
    kept = per_word - (stop_word * per_word - stop)
    ones = [folded_one(item_bits * j) for j in range(per_word)]
    before = sum(ones[:lead]) * _weight_sum(dim, first_word, first_word + 1)
    behind = sum(ones[kept:]) * _weight_sum(dim, stop_word - 1, stop_word)
    return (sum(ones) * _weight_sum(dim, first_word, stop_word) - before - behind) & MASK


def folded_one(shift: int) -> int:
    """`fold(2**shift)`: what an element adds by being there."""
    return (1 << shift) + (1 << shift >> FOLD_BITS)


def signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch takes."""
    value &= MASK
    return value - (1 << 64) if value >> 63 else value


def unsigned(values: Tensor) -> list[int]:
    """Wrapped int64 as numbers in [0, 2**64)."""
    found: list[int] = values.cpu().numpy().view(np.uint64).tolist()
    return found


def _shifted(tensor: Tensor, num_bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (tensor >> num_bits) & ((1 << (64 - num_bits)) - 1)

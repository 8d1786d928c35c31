"""Many runs of one length that lie at equal distances in a parcel: one indexed copy of rows, on the CPU.

A memmove from Python costs 0.6 us before it moves a byte, and holds the interpreter lock; a row of an indexed copy
costs about a tenth of that, and holds no lock. The params lie anywhere, so the indexed tensor is the whole address
space, as overlapping rows of words: row i begins at word i. Only rows that a plan names are ever touched.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

WORD_BYTES = 8
LONGEST_ROW_BYTES = 16 << 10  # from here on the call is a small part of a memmove, which copies faster
FEWEST_ROWS = 8
ORIGIN = 4096  # of the address space: no page is mapped below it, and a tensor must not begin at null
ADDRESS_BITS = 48

type Run = tuple[int, int, int, int]  # position of the param, bytes into it, bytes into the parcel, bytes


@dataclass(frozen=True, slots=True)
class Rows:
    """Runs of `num_words` words: row i lies `in_param[i]` bytes into param number `params[i]` of the stage.

    In the parcel it begins `first_word + i * stride` words after the start.
    """

    params: Tensor
    in_param: Tensor
    first_word: int
    stride: int
    num_words: int

    def copy(self, addresses: Tensor, words: Tensor, is_pack: bool) -> None:
        """Copy all rows into the parcel, or out of it. `words`: the parcel; `addresses`: of the stage's params."""
        starts = addresses[self.params].add_(self.in_param - ORIGIN)
        index = torch.bitwise_right_shift(starts, 3, out=starts)
        memory = _memory(self.num_words)
        first = words.storage_offset() + self.first_word
        packed = words.as_strided((index.numel(), self.num_words), (self.stride, 1), first)
        if is_pack:
            torch.index_select(memory, 0, index, out=packed)
        else:
            memory.index_copy_(0, index, packed)


def rows_of(runs: Sequence[Run]) -> tuple[tuple[Rows, ...], tuple[Run, ...]]:
    """Rows for as many of the runs as can be rows, and the other runs. `runs` are in the order of the parcel."""
    by_size: dict[int, list[Run]] = {}
    for run in runs:
        by_size.setdefault(run[3], []).append(run)
    found: list[Rows] = []
    rest: list[Run] = []
    for num_bytes, same in by_size.items():
        for chain in _chains(same):
            is_whole = not any(number % WORD_BYTES for run in chain for number in run[1:])
            if is_whole and 0 < num_bytes <= LONGEST_ROW_BYTES and len(chain) >= FEWEST_ROWS:
                found.append(_rows(chain))
            else:
                rest.extend(chain)
    return tuple(found), tuple(sorted(rest, key=lambda run: run[2]))


def _chains(runs: Sequence[Run]) -> list[list[Run]]:
    """Cut runs where the distance in the parcel to the next one changes."""
    found: list[list[Run]] = []
    for run in runs:
        chain = found[-1] if found else []
        if len(chain) == 1 or (chain and run[2] - chain[-1][2] == chain[1][2] - chain[0][2]):
            chain.append(run)
        else:
            found.append([run])
    return found


def _rows(chain: Sequence[Run]) -> Rows:
    params, in_param = (torch.tensor([run[i] for run in chain], dtype=torch.int64) for i in range(2))
    stride = (chain[1][2] - chain[0][2]) // WORD_BYTES
    return Rows(params, in_param, chain[0][2] // WORD_BYTES, stride, chain[0][3] // WORD_BYTES)


@lru_cache(maxsize=64)
def _memory(num_words: int) -> Tensor:
    """All words from ORIGIN on, as rows of `num_words` that overlap. Making it touches none of them."""
    space = (ctypes.c_uint8 * ((1 << ADDRESS_BITS) - ORIGIN)).from_address(ORIGIN)
    words = torch.frombuffer(space, dtype=torch.uint8).view(torch.int64)
    return words.as_strided((words.numel() - num_words + 1, num_words), (1, 1))

"""Finding what is wrong: which digests differ, and by bisection which box of a tensor."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from refit.plan import Region
from refit.transfer.digest import MASK

type Digests = Mapping[str, Mapping[int, int]]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Senders and receiver disagree about what `dst_rank` holds of a tensor. None: that end says nothing about it."""

    tensor: str
    dst_rank: int
    sent: int | None
    held: int | None

    def __str__(self) -> str:
        sent, held = ("nothing" if value is None else f"{value:016x}" for value in (self.sent, self.held))
        return f"{self.tensor!r} on rank {self.dst_rank}: trainers sent {sent}, it holds {held}"


def mismatches(sent: Iterable[Digests], held: Iterable[Digests]) -> tuple[Mismatch, ...]:
    """Every (tensor, dst_rank) whose sum over all senders is not what the receiver holds, sorted."""
    sums, found = _summed(sent), _summed(held)
    return tuple(
        Mismatch(tensor, rank, sums.get((tensor, rank)), found.get((tensor, rank)))
        for tensor, rank in sorted(sums.keys() | found.keys())
        if sums.get((tensor, rank)) != found.get((tensor, rank))
    )


def _summed(digests: Iterable[Digests]) -> dict[tuple[str, int], int]:
    sums: dict[tuple[str, int], int] = {}
    for by_tensor in digests:
        for tensor, by_rank in by_tensor.items():
            for rank, value in by_rank.items():
                sums[tensor, rank] = (sums.get((tensor, rank), 0) + value) & MASK
    return sums


def bisect(region: Region, differs: Callable[[Region], bool], max_boxes: int = 8) -> tuple[Region, ...]:
    """The smallest boxes of `region` for which `differs` holds, at most `max_boxes` of them.

    `differs(box)` compares the digests that both ends compute of a box. Each answer halves the longest dim, so a
    single wrong element is found after log2 of the number of elements in steps of two questions.
    """
    if not differs(region):
        return ()
    found: list[Region] = []
    todo = [region]
    while todo and len(found) < max_boxes:
        box = todo.pop()
        if box.num_elements <= 1:
            found.append(box)
        else:
            todo.extend(half for half in reversed(_halves(box)) if differs(half))
    return tuple(found)


def _halves(box: Region) -> tuple[Region, Region]:
    dim = max(range(len(box.shape)), key=lambda d: box.shape[d])
    middle = (box.starts[dim] + box.stops[dim]) // 2
    return box.with_dim(dim, box.starts[dim], middle), box.with_dim(dim, middle, box.stops[dim])

"""Source choice: how many bytes each holder sends, so that the busiest sender has as little to do as
possible.

Integers only: every rank must come to the same numbers.
"""

from collections.abc import Mapping, Sequence
from math import gcd, lcm

MAX_SWEEPS = 40


def nic_weights(num_ranks: int, ranks_per_node: int, nics_per_node: int) -> dict[int, int]:
    """Rate of each rank where the ranks of a node share its NICs evenly, as the smallest integers.

    Only a last node with fewer ranks makes a difference, if ranks share NICs at all.
    """
    sizes = [
        min(ranks_per_node, num_ranks - rank // ranks_per_node * ranks_per_node) for rank in range(num_ranks)
    ]
    unit = lcm(*sizes)
    weights = [min(size, nics_per_node) * unit // size for size in sizes]
    divisor = gcd(*weights)
    return {rank: weight // divisor for rank, weight in enumerate(weights)}


def share_out(
    demands: Mapping[tuple[int, ...], int], weights: Mapping[int, int] | None = None
) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Split each demand over its holders. `demands[holders]` bytes may come from any rank of `holders`.

    `weights` are rates of the ranks (None: all equal); a load counts as bytes / rate. Result: bytes per holder, in
    the order of `holders`, adding up to the demand. Each sweep re-levels one holder set after the other against the
    load of all others; this is coordinate descent on the sum of load^2 / rate, whose minimum also has the least
    maximum of load / rate. One sweep is exact where any two holder sets are disjoint or nested (smaller sets first);
    otherwise sweeps go on until none moves a byte.
    """
    total: dict[int, int] = {}
    order = sorted(demands, key=lambda holders: (len(holders), holders))
    shares: dict[tuple[int, ...], list[int]] = {holders: [0] * len(holders) for holders in order}
    open_sets = [holders for holders in order if len(holders) > 1]
    for holders in order:
        _level(holders, demands[holders], shares[holders], total, weights)
    for _ in range(MAX_SWEEPS if len(open_sets) > 1 else 0):
        moved = sum(
            _level(holders, demands[holders], shares[holders], total, weights) for holders in open_sets
        )
        if moved == 0:
            break
    return {holders: tuple(share) for holders, share in shares.items()}


def _level(
    holders: Sequence[int],
    demand: int,
    share: list[int],
    total: dict[int, int],
    weights: Mapping[int, int] | None,
) -> int:
    """Water-fill one demand over its holders given all other loads. Returns the bytes that moved, less
    rounding."""
    others = [total.get(holder, 0) - old for holder, old in zip(holders, share, strict=True)]
    rates = [1] * len(holders) if weights is None else [weights[holder] for holder in holders]
    fresh = fill(others, demand, rates)
    moved = sum(abs(new - old) for new, old in zip(fresh, share, strict=True))
    for position, holder in enumerate(holders):
        total[holder] = others[position] + fresh[position]
        share[position] = fresh[position]
    return moved if moved > 2 * len(holders) else 0


def fill(loads: Sequence[int], amount: int, rates: Sequence[int]) -> list[int]:
    """Pour `amount` onto `loads` so that the highest level, load / rate, is least. Returns what each got; the sum is
    `amount`."""
    unit = lcm(*rates)
    levels = [load * (unit // rate) for load, rate in zip(loads, rates, strict=True)]
    order = sorted(range(len(loads)), key=lambda i: (levels[i], i))
    below, width, count = 0, 0, 0
    for position, index in enumerate(order):
        if position and levels[index] * width >= (below + amount) * unit:
            break
        below, width, count = below + loads[index], width + rates[index], position + 1
    got = [0] * len(loads)
    poured, before = amount + below, 0
    for index in order[:count]:
        after = before + rates[index]
        got[index] = poured * after // width - poured * before // width - loads[index]
        before = after
    return got


def cut_points(shares: Sequence[int], num_rows: int) -> tuple[int, ...]:
    """Turn shares into row boundaries: holder `i` gets rows `[cuts[i], cuts[i + 1])` of `num_rows`."""
    total = sum(shares)
    cuts, running = [0], 0
    for share in shares:
        running += share
        cuts.append((num_rows * running + total // 2) // total if total else num_rows)
    return tuple(cuts)

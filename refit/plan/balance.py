"""Source choice: how many bytes each holder sends, so that the busiest sender has as little to do as
possible.

Integers only: every rank must come to the same numbers.
"""

from collections.abc import Mapping, Sequence

MAX_SWEEPS = 40


def share_out(
    demands: Mapping[tuple[int, ...], int], loads: Mapping[int, int] | None = None
) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Split each demand over its holders. `demands[holders]` bytes may come from any rank of `holders`.

    `loads` are bytes that ranks send anyway. Result: bytes per holder, in the order of `holders`, adding up
    to the demand. Each sweep re-levels one holder set after the other against the load of all others; this
    is coordinate descent on the sum of squared loads, whose minimum also has the least maximum. One sweep is
    exact where any two holder sets are disjoint or nested (smaller sets first); otherwise sweeps go on until
    none moves a byte.
    """
    total = dict(loads or {})
    order = sorted(demands, key=lambda holders: (len(holders), holders))
    shares: dict[tuple[int, ...], list[int]] = {holders: [0] * len(holders) for holders in order}
    open_sets = [holders for holders in order if len(holders) > 1]
    for holders in order:
        _level(holders, demands[holders], shares[holders], total)
    for _ in range(MAX_SWEEPS if len(open_sets) > 1 else 0):
        moved = sum(_level(holders, demands[holders], shares[holders], total) for holders in open_sets)
        if moved == 0:
            break
    return {holders: tuple(share) for holders, share in shares.items()}


def _level(holders: Sequence[int], demand: int, share: list[int], total: dict[int, int]) -> int:
    """Water-fill one demand over its holders given all other loads. Returns the bytes that moved, less
    rounding."""
    others = [total.get(holder, 0) - old for holder, old in zip(holders, share, strict=True)]
    fresh = fill(others, demand)
    moved = sum(abs(new - old) for new, old in zip(fresh, share, strict=True))
    for position, holder in enumerate(holders):
        total[holder] = others[position] + fresh[position]
        share[position] = fresh[position]
    return moved if moved > 2 * len(holders) else 0


def fill(loads: Sequence[int], amount: int) -> list[int]:
    """Pour `amount` onto `loads` so that the highest level is least. Returns what each got; the sum is
    `amount`."""
    order = sorted(range(len(loads)), key=lambda i: (loads[i], i))
    below, count = 0, 0
    for position, index in enumerate(order):
        if position and loads[index] * position - below >= amount:
            break
        below += loads[index]
        count = position + 1
    level, rest = divmod(amount + below, count)
    got = [0] * len(loads)
    for position, index in enumerate(order[:count]):
        got[index] = level - loads[index] + (1 if position < rest else 0)
    return got


def cut_points(shares: Sequence[int], num_rows: int) -> tuple[int, ...]:
    """Turn shares into row boundaries: holder `i` gets rows `[cuts[i], cuts[i + 1])` of `num_rows`."""
    total = sum(shares)
    cuts, running = [0], 0
    for share in shares:
        running += share
        cuts.append((num_rows * running + total // 2) // total if total else num_rows)
    return tuple(cuts)

"""How much better an answer was than the other answers to the same prompt."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

MIN_SPREAD = 1e-4


def group_advantages(rewards: Sequence[float], group_size: int, *, scale: bool) -> tuple[float, ...]:
    """One advantage per reward; rewards of one prompt stand together, `group_size` of them.

    Reward minus the group's mean, divided by the group's standard deviation + 1e-4 when `scale` (GRPO: Shao et al.
    2024, DeepSeekMath, section 4.1). A group with equal rewards has nothing to teach: its advantages are 0.
    Raises ValueError if the rewards do not fill whole groups of at least two.
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not fill groups of {group_size} (at least 2)")
    advantages: list[float] = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        mean = statistics.fmean(group)
        spread = statistics.stdev(group) + MIN_SPREAD if scale else 1.0
        advantages += [(reward - mean) / spread for reward in group]
    return tuple(advantages)

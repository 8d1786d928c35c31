"""Values that a loader stores as a function of what a checkpoint holds, computed back: Mamba keeps -exp(A_log).

The steps are undone in float64. Of the numbers next to the result that one counts which the steps lead back to exactly
what is stored, one of bfloat16 before any other. So the answer is proved to load as what the engine holds. It is what
was loaded, bit for bit, if that was in bfloat16 and its magnitude above 2^-13; other values may differ from it by up to
RESOLUTION, which is as far apart as values can be that an engine stores as one (exp being right to one unit in the
last place).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

RESOLUTION = 2.0**-22
MAX_UNITS = 3  # how far from the rounded result a number is looked for, in units in the last place
_STEPS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "exp": (torch.exp, torch.log),
    "neg": (torch.neg, torch.neg),
}
STEPS = frozenset(_STEPS)


def replay(steps: Sequence[str], values: Tensor) -> Tensor:
    """What a loader stores of `values`."""
    for step in steps:
        values = _STEPS[step][0](values)
    return values


def undo(steps: Sequence[str], stored: Tensor) -> Tensor | None:
    """Finite values, in the dtype of `stored`, that `steps` lead to exactly `stored`; None where there are none."""
    exact = stored.double()
    for step in reversed(steps):
        exact = _STEPS[step][1](exact)
    found, open_ = torch.zeros_like(stored), torch.ones_like(stored, dtype=torch.bool)
    for candidate in _near(exact, stored.dtype):
        hits = open_ & candidate.isfinite() & (replay(steps, candidate) == stored) & _tells(stored)
        found, open_ = torch.where(hits, candidate, found), open_ & ~hits
    return None if bool(open_.any()) else found


def _tells(stored: Tensor) -> Tensor:
    """Where the result did not run out of the dtype's range: beyond it all values are stored as one."""
    return stored.isfinite() & (stored.abs() >= torch.finfo(stored.dtype).tiny)


def _near(exact: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Candidates around a float64 result, the likeliest first."""
    yield exact.to(torch.bfloat16).to(dtype)
    below = above = exact.to(dtype)
    yield below
    infinity = torch.tensor(torch.inf, dtype=dtype, device=exact.device)
    for _ in range(MAX_UNITS):
        below, above = torch.nextafter(below, -infinity), torch.nextafter(above, infinity)
        yield below
        yield above

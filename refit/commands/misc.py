"""Why tensors are not bulk, told once for all layers."""

import re
from collections.abc import Iterable


def by_reason(misc: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names of tensors by reason, from pairs (name, reason); the numbers of layers are N in both. Sorted."""
    found: dict[str, set[str]] = {}
    for name, reason in misc:
        found.setdefault(re.sub(r"\d+", "N", reason), set()).add(re.sub(r"\d+", "N", name))
    return {reason: sorted(found[reason]) for reason in sorted(found)}


def lines(misc: Iterable[tuple[str, str]]) -> list[str]:
    """The same as text, a line per reason."""
    return [f"not bulk, {reason}: {', '.join(names)}" for reason, names in by_reason(misc).items()]

"""The two errors of input. Both are `ValueError`s, so that a caller may treat them alike."""

from collections.abc import Iterable

MAX_SHOWN_PROBLEMS = 12


class PlanError(ValueError):
    """A manifest, a wire document or a plan is wrong. `problems` holds every fault that was found."""

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        self.problems = tuple(problems) or (message,)
        super().__init__(message)

    @classmethod
    def collected(cls, subject: str, problems: Iterable[str]) -> "PlanError":
        """One error for many faults: the first MAX_SHOWN_PROBLEMS are printed, all are kept in `problems`."""
        found = tuple(problems)
        shown = "".join(f"\n  - {problem}" for problem in found[:MAX_SHOWN_PROBLEMS])
        hidden = len(found) - MAX_SHOWN_PROBLEMS
        more = f"\n  ... and {hidden} more" if hidden > 0 else ""
        return cls(f"{subject}: {len(found)} problem(s){shown}{more}", found)


class ConfigError(ValueError):
    """An option or a configuration key has a value that cannot work. The message names key, value and way
    out."""

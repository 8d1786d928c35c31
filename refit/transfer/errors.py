"""The two errors of operation. Both are `RuntimeError`s: the input was right, the run of it was not."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass


class TransportError(RuntimeError):
    """Bytes or messages did not arrive. The message names the peer or key, the phase, and the seconds waited."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The first failure of a run, as its finder reported it. `who` is a rank or actor such as "gen 1"."""

    phase: str
    who: str
    message: str

    def __str__(self) -> str:
        return f"refit failed in phase {self.phase!r}, reported by {self.who}: {self.message}"


class RefitFailed(RuntimeError):  # noqa: N818 - the contract between the rooms names it so
    """Somebody reported a failure, so this round is over for everybody. `failure` is the root cause."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(str(failure))

    def __reduce__(self) -> tuple[type["RefitFailed"], tuple[Failure]]:
        return (type(self), (self.failure,))


def take_all(steps: Iterable[Callable[[], object]]) -> None:
    """Take every step, also after one that failed; then raise the first failure."""
    failures = []
    for step in steps:
        try:
            step()
        except RuntimeError as error:  # TransportError is one, as are torch's own
            failures.append(error)
    if failures:
        raise failures[0]

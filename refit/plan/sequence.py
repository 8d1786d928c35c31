"""Which rows of a sequence each rank of a sequence-parallel group works on.

The sequence is padded to whole chunks: rank `r` of `S` takes rows `[r*L, (r+1)*L)` with `L = ceil(n / S)`. Rows count
tokens of the padded sequence; those at `n` and after it are padding, which may fill whole ranks (5 tokens on 4 ranks:
L = 2, the last rank has none). vLLM cuts so in `sequence_parallel_chunk` and in its sequence-parallel pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from refit.plan.errors import PlanError


@dataclass(frozen=True, slots=True)
class SequenceCut:
    """A sequence of `num_tokens` tokens over `num_ranks` ranks."""

    num_tokens: int
    num_ranks: int

    def __post_init__(self) -> None:
        if self.num_tokens < 0 or self.num_ranks < 1:
            raise PlanError(
                f"{self.num_tokens} tokens over {self.num_ranks} ranks: give at least 0 tokens and 1 rank"
            )

    @property
    def rows_per_rank(self) -> int:
        """Rows of every rank, padding included."""
        return -(-self.num_tokens // self.num_ranks)

    @property
    def num_rows(self) -> int:
        """Rows of the padded sequence."""
        return self.rows_per_rank * self.num_ranks

    def rows(self, rank: int) -> range:
        """The rank's rows of the padded sequence."""
        if not 0 <= rank < self.num_ranks:
            raise PlanError(f"rank {rank} is not one of the {self.num_ranks} ranks of this cut")
        return range(rank * self.rows_per_rank, (rank + 1) * self.rows_per_rank)

    def tokens(self, rank: int) -> range:
        """Its rows without the padding; empty where all of them are."""
        rows = self.rows(rank)
        return range(min(rows.start, self.num_tokens), min(rows.stop, self.num_tokens))

    def rank_of(self, token: int) -> int:
        """The one rank that works on a token."""
        if not 0 <= token < self.num_tokens:
            raise PlanError(f"token {token} is not one of the {self.num_tokens} tokens of this cut")
        return token // self.rows_per_rank

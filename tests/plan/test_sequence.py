"""The slices of a sequence-parallel group, against the list they are slices of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refit.plan import PlanError
from refit.plan.sequence import SequenceCut

CUTS = st.builds(SequenceCut, st.integers(0, 200), st.integers(1, 16))
PAD = None


def gathered(cut):
    """What the ranks hold of a padded sequence, one after another."""
    padded = [*range(cut.num_tokens), *[PAD] * (cut.num_rows - cut.num_tokens)]
    return [padded[row] for rank in range(cut.num_ranks) for row in cut.rows(rank)]


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_gathering_all_slices_and_cutting_to_the_length_is_the_identity_for_every_length(num_ranks):
    for num_tokens in range(1, 4 * num_ranks + 1):
        whole = gathered(SequenceCut(num_tokens, num_ranks))
        assert whole[:num_tokens] == list(range(num_tokens))
        assert whole[num_tokens:] == [PAD] * (len(whole) - num_tokens)


def test_a_cut_whose_slices_always_start_at_0_is_found(monkeypatch):
    monkeypatch.setattr(SequenceCut, "rows", lambda cut, rank: range(cut.rows_per_rank))
    for num_ranks in range(2, 9):
        wrong = [
            n for n in range(2, 4 * num_ranks + 1) if gathered(SequenceCut(n, num_ranks))[:n] != [*range(n)]
        ]
        assert wrong == [*range(2, 4 * num_ranks + 1)], "every length of two tokens or more shows it"


@given(CUTS)
def test_every_rank_has_as_many_rows_and_no_more_are_padded_than_ranks_need(cut):
    assert {len(cut.rows(rank)) for rank in range(cut.num_ranks)} == {cut.rows_per_rank}
    assert 0 <= cut.num_rows - cut.num_tokens < cut.num_ranks


@given(CUTS)
def test_each_token_is_worked_on_by_exactly_the_rank_that_is_named_for_it(cut):
    owners = [rank for rank in range(cut.num_ranks) for _ in cut.tokens(rank)]
    assert [token for rank in range(cut.num_ranks) for token in cut.tokens(rank)] == list(
        range(cut.num_tokens)
    )
    assert owners == [cut.rank_of(token) for token in range(cut.num_tokens)]
    assert all(set(cut.tokens(rank)) <= set(cut.rows(rank)) for rank in range(cut.num_ranks))


def test_whole_ranks_may_be_padding():
    cut = SequenceCut(5, 4)
    assert [len(cut.tokens(rank)) for rank in range(4)] == [2, 2, 1, 0]
    assert cut.rows(3) == range(6, 8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SequenceCut(-1, 2), "-1 tokens"),
        (lambda: SequenceCut(4, 0), "0 ranks"),
        (lambda: SequenceCut(4, 2).rows(2), "rank 2"),
        (lambda: SequenceCut(4, 2).rank_of(4), "token 4"),
    ],
)
def test_what_is_outside_of_a_cut_is_refused_by_name(make, words):
    with pytest.raises(PlanError, match=words):
        make()

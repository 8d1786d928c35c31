"""Rows are the same copies as one memmove per run, and only those runs become rows that may."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.plan import Region, Segment
from refit.transfer.compiled import Move
from refit.transfer.rows import FEWEST_ROWS, LONGEST_ROW_BYTES, rows_of
from refit.transfer.runs import LiveParams, RunsInMaking

CPU = torch.device("cpu")


def compiled(spans: list[tuple[int, int, int]]):
    """Runs of (bytes into the param, bytes into the parcel, bytes), one uint8 param each."""
    making = RunsInMaking({f"p{i}": "uint8" for i in range(len(spans))}, CPU)
    moves = []
    for number, (at, start_byte, size) in enumerate(spans):
        making.dtype(f"p{number}")
        part = Segment("t", Region((0,), (size,)), f"p{number}", at, (size,), (1,), "uint8", start_byte)
        moves.append(Move.of(part, 0, torch.uint8))
    return making, making.of(moves)[0]


def memory_of(spans: list[tuple[int, int, int]], shift: int) -> dict[str, torch.Tensor]:
    """Random params that begin `shift` bytes after an aligned address, with room behind what is copied."""
    sizes = [at + size + 9 for at, _, size in spans]
    return {
        f"p{i}": torch.randint(0, 256, (n + shift,), dtype=torch.uint8)[shift:] for i, n in enumerate(sizes)
    }


@st.composite
def layouts(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """A few kinds of runs, each repeated, at distances that change now and then."""
    spans, end = [], 0
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.sampled_from([8, 16, 24, 40, 7]))
        for _ in range(draw(st.integers(1, 3 * FEWEST_ROWS))):
            spans.append((draw(st.sampled_from([0, 8, 16, 3])), end, size))
            end += -(-size // 16) * 16 + draw(st.sampled_from([0, 0, 0, 0, 0, 0, 16]))
    return spans


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from([0, 0, 1]), st.sampled_from([0, 0, 4]))
def test_rows_and_single_runs_together_copy_what_memmove_copies(spans, param_shift, parcel_shift):
    making, runs = compiled(spans)
    assert sum(rows.params.numel() for rows in runs.rows) + len(runs.rest.num_bytes) == len(runs.num_bytes)
    params = memory_of(spans, param_shift)
    size = spans[-1][1] + spans[-1][2]
    packed = torch.full((size + parcel_shift,), 255, dtype=torch.uint8)[parcel_shift:]
    expected = packed.clone()
    runs.copy(LiveParams(params, making.dtypes, making.reach_bytes), packed, is_pack=True)
    blank = {name: torch.zeros_like(param) for name, param in params.items()}
    wanted = {name: torch.zeros_like(param) for name, param in params.items()}
    for number, (at, start, num_bytes) in enumerate(spans):
        part = params[f"p{number}"][at : at + num_bytes]
        expected[start : start + num_bytes] = part
        wanted[f"p{number}"][at : at + num_bytes] = part
    assert torch.equal(packed, expected), "bytes between runs must stay as they were"
    runs.copy(LiveParams(blank, making.dtypes, making.reach_bytes), packed, is_pack=False)
    assert all(torch.equal(blank[name], wanted[name]) for name in params)


@pytest.mark.parametrize(
    ("count", "in_param", "size", "num_rows"),
    [
        (FEWEST_ROWS, 8, 64, FEWEST_ROWS),
        (FEWEST_ROWS - 1, 8, 64, 0),
        (FEWEST_ROWS, 4, 64, 0),
        (FEWEST_ROWS, 8, 60, 0),
        (FEWEST_ROWS, 8, LONGEST_ROW_BYTES, FEWEST_ROWS),
        (FEWEST_ROWS, 8, LONGEST_ROW_BYTES + 8, 0),
    ],
)
def test_many_short_runs_of_whole_words_at_equal_distances_are_rows(count, in_param, size, num_rows):
    distance = -(-size // 16) * 16
    runs = [(number, in_param, number * distance, size) for number in range(count)]
    rows, rest = rows_of(runs)
    assert sum(found.params.numel() for found in rows) == num_rows
    assert len(rest) == count - num_rows

"""The record of where a rank's time went."""

import itertools

import pytest

from refit.transfer.report import DIGEST, PACK, UNPACK, WIRE, Span, Tally, condensed


def rounds(num_rounds):
    """Spans as a stage makes them: each takes as many milliseconds as its number, with a pause between rounds."""
    found, at = [], 10.0
    for number in range(num_rounds):
        for phase in (PACK, WIRE, UNPACK, DIGEST):
            found.append(Span(phase, 0, 0, at, at + 0.001 * (len(found) + 1)))
            at = found[-1].stop_s
        at += 0.5 * (number % 2)
    return found


@pytest.mark.parametrize("num_rounds", [1, 16, 17, 500])
def test_condensed_spans_are_few_do_not_overlap_and_keep_the_seconds_of_each_phase(num_rounds):
    spans = rounds(num_rounds)
    found = condensed(spans, 64)
    assert len(found) <= 64
    assert found == tuple(spans) or num_rounds > 16
    for phase in (PACK, WIRE, UNPACK, DIGEST):
        kept = sum(span.stop_s - span.start_s for span in found if span.phase == phase)
        assert kept == pytest.approx(sum(s.stop_s - s.start_s for s in spans if s.phase == phase))
    assert all(a.stop_s <= b.start_s + 1e-9 for a, b in itertools.pairwise(found))
    assert found[0].start_s == spans[0].start_s
    assert found[-1].stop_s <= spans[-1].stop_s + 1e-9


def test_a_tally_keeps_a_span_for_every_stretch_it_clocks():
    tally = Tally()
    then = tally.clock(PACK, 0.0)
    tally.clock(WIRE, then)
    report = tally.report().placed(stage=3, lane=1)
    assert [(s.phase, s.stage, s.lane) for s in report.spans] == [(PACK, 3, 1), (WIRE, 3, 1)]
    assert report.spans[0].stop_s == report.spans[1].start_s == then
    assert report.seconds[PACK] == report.spans[0].stop_s

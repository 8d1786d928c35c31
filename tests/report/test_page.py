"""The report page: made by the command from a recorded run, read back as HTML."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from refit.cli import main
from refit.report import charts
from refit.report.reader import read_run
from tests.report.runs import LINKS, recorded_run

SECTIONS = {"reward", "phases", "rank-phases", "timeline", "traffic", "memory", "refits", "ranks"}


class Page(HTMLParser):
    """Ids, addresses that a browser would fetch, and the text outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.fetched, self.text, self._quiet = [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag in ("script", "img", "iframe", "source", "link"):
            self.fetched += [attrs[key] for key in ("src", "href") if key in attrs]
        self._quiet = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._quiet = False

    def handle_data(self, words):
        if not self._quiet:
            self.text += words + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return recorded_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(folder):
    assert main(["report", str(folder)]) == 0
    return Page((folder / "report.html").read_text())


def test_the_page_has_every_section_and_fetches_nothing(page):
    assert set(page.ids) >= SECTIONS
    assert page.fetched == ["data:,"], "the empty icon, which keeps a browser from asking for one"
    assert "Nothing was recorded" not in page.text
    assert {
        "chart-reward",
        "chart-phase-driver",
        "chart-phase-rank",
        "chart-traffic-0",
        "chart-timeline-0",
    } <= set(page.ids)


def test_the_page_tells_of_refits_that_were_not_committed_and_escapes_their_words(page):
    assert "NOT COMMITTED: norm.weight differs" in page.text
    assert "NOT COMMITTED: no sign of life from <gen 1>" in page.text
    assert re.search(r"2\nrefits not committed", page.text)
    assert "1 of 2 differ" in page.text and "2 equal" in page.text


def test_what_goes_by_broadcast_is_named_with_its_reason(page):
    assert "model.norm.weight\n2\nthe whitelist leaves <it> out" in page.text


def test_rates_and_their_share_of_the_line_rate_are_told_by_rank_and_as_a_whole(page):
    assert "388.9 kB/s\n77.8 %" in page.text, "train 1: 7,000 bytes in 18 ms, of 500,000 bytes/s"
    assert "200 kB/s\n40 %" in page.text, "gen 1: 6,000 bytes in 30 ms"
    assert re.search(r"46\.7 %\nof line rate, median", page.text), (
        "7,000 bytes on the busiest link, 30 ms for all"
    )


def test_the_traffic_matrix_shows_each_link(folder):
    run = read_run(folder)
    (plan,) = run.plans.values()
    (heat,) = charts.traffic(plan).data
    assert [list(row) for row in heat.z] == [[1000, 2000], [3000, 4000]]
    assert sum(num_bytes for _, _, num_bytes in LINKS) == sum(map(sum, heat.z))


def test_the_share_of_bulk_that_deltas_sent_is_told_by_refit_and_as_a_whole(tmp_path):
    folder = recorded_run(tmp_path)
    lines = [json.loads(line) for line in (folder / "refits.jsonl").read_text().splitlines()]
    for line, share in zip(lines, (1.0, 0.0123, 0.0123), strict=False):
        line["delta_share"] = share
    (folder / "refits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(folder)]) == 0
    text = Page((folder / "report.html").read_text()).text
    assert re.search(r"1\.23 %\nof bulk sent as deltas, median", text)
    assert text.count("1.23 %\n") == 3, "in the tile and in two rows"


def test_the_timeline_has_a_row_per_rank_and_stream_and_a_bar_per_stretch(folder):
    refit = read_run(folder).reported[0]
    figure = charts.timeline(refit)
    rows = [row for bar in figure.data for row in bar.y]
    assert set(rows) == {"train 0 stream 0", "train 1 stream 0"} | {
        f"gen {rank} stream {lane}" for rank in (0, 1) for lane in (0, 1)
    }
    assert len(rows) == sum(len(rank["spans"]) for rank in refit["ranks"])
    by_phase = {bar.name: bar for bar in figure.data}
    assert by_phase["finalize"].base[0] == pytest.approx(60.0)
    assert by_phase["unpack"].x[-1] == pytest.approx(20.0), "milliseconds of the straggler"


def test_the_time_between_staging_and_processing_is_shaded(folder):
    first, *_, discarded = read_run(folder).reported[:5]
    (shade,) = charts.timeline(first).layout.shapes
    assert (shade.x0, shade.x1) == (pytest.approx(30.0), pytest.approx(60.0))
    assert charts.timeline(discarded).layout.shapes == (), "nothing was processed"


def test_steps_and_versions_have_whole_numbers_on_their_axes(folder):
    run = read_run(folder)
    for figure in (
        charts.reward_and_kl(run),
        charts.phase_bars(run, charts.PHASES, "stack"),
        charts.memory(run),
    ):
        assert figure.layout.xaxis.dtick == 1
    assert charts.counted(charts.memory(run), range(100)).layout.xaxis.dtick is None


def test_what_happened_to_replicas_and_how_long_answers_waited_is_told(tmp_path):
    folder = recorded_run(tmp_path)
    lines = [json.loads(line) for line in (folder / "refits.jsonl").read_text().splitlines()]
    lines[1]["incidents"] = ["left out generator 1: dead"]
    for line in lines[:3]:
        line["seconds"]["halt"] = 0.0125
    (folder / "refits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(folder)]) == 0
    text = Page((folder / "report.html").read_text()).text
    assert "left out generator 1: dead" in text
    assert re.search(r"12\.5 ms\nanswers wait, median", text)
    bars = charts.phase_bars(read_run(folder), (*charts.RANK_PHASES, charts.HALT), "group")
    (halt,) = [bar for bar in bars.data if bar.name == "halt"]
    assert list(halt.y[:4]) == [12.5, 12.5, 12.5, 0.0]


def test_stacked_phases_add_up_to_each_refit(folder):
    run = read_run(folder)
    figure = charts.phase_bars(run, charts.PHASES, "stack")
    assert figure.layout.barmode == "stack"
    for number, refit in enumerate(run.reported):
        assert sum(bar.y[number] for bar in figure.data) == pytest.approx(1e3 * refit["total_s"])


def test_timelines_are_offered_of_the_last_the_slowest_and_every_discarded_refit(folder):
    chosen = {reason: refit["version"] for reason, refit in charts.chosen_refits(read_run(folder))}
    assert chosen == {"last": 6, "quickest": 1, "discarded": 5}


def test_a_run_that_goes_on_is_reported_without_its_half_written_line(tmp_path):
    folder = recorded_run(tmp_path)
    with (folder / "steps.jsonl").open("a") as stream:
        stream.write('{"step": 7, "rew')
    assert len(read_run(folder).steps) == 6


def test_a_folder_without_a_run_and_a_broken_file_are_refused_by_name(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "steps.jsonl" in capsys.readouterr().err
    recorded_run(tmp_path)
    lines = (tmp_path / "refits.jsonl").read_text().splitlines()
    (tmp_path / "refits.jsonl").write_text("\n".join([lines[0], "{", *lines[2:], ""]))
    assert main(["report", str(tmp_path)]) == 2
    assert "refits.jsonl line 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("steps.jsonl", '{"reward": 1.0}\n', "steps.jsonl line 1 is not what this version of refit writes"),
        ("refits.jsonl", "[3]\n", "refits.jsonl line 1 is not what"),
        (
            "plans/mine.json",
            "{}",
            "plans/mine.json is not what this version of refit writes, it lacks digest",
        ),
    ],
)
def test_a_file_of_another_program_or_version_is_refused_by_name(tmp_path, capsys, name, text, says):
    recorded_run(tmp_path, num_steps=2)
    (tmp_path / name).write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err


def test_a_run_of_the_conventional_path_has_no_links_and_still_a_page(tmp_path):
    folder = recorded_run(tmp_path)
    (plan_file,) = (folder / "plans").glob("*.json")
    plan_file.write_text(json.dumps(json.loads(plan_file.read_text()) | {"links": []}))
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert "Nothing was recorded for this." in Page((tmp_path / "page.html").read_text()).text

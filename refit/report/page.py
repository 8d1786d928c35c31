"""The page itself: text, tables, figures and the plotting library, all in one HTML document."""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.io  # type: ignore[import-untyped]
import plotly.offline  # type: ignore[import-untyped]

from refit.report import charts
from refit.report.reader import Run

MAX_ROWS = 200
STYLE = """
:root { color-scheme: light; --ink: #1c2733; --soft: #5d6b7a; --line: #dde3ea; --card: #ffffff; --ground: #f4f6f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 0 0 2px; }
p { margin: 0 0 10px; color: var(--soft); } code { font-size: 13px; overflow-wrap: anywhere; }
section, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 16px 18px; margin-top: 18px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin-top: 18px; }
.tile { padding: 12px 14px; } .tile b { display: block; font-size: 20px; } .tile span { color: var(--soft); }
.scroll { overflow-x: auto; max-height: 520px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 7px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { position: sticky; top: 0; background: var(--card); }
th:first-child, td:first-child { text-align: left; } .bad { color: #b4472f; font-weight: 600; }
select { font: inherit; padding: 3px 6px; margin-bottom: 6px; }
.missing { color: var(--soft); font-style: italic; padding: 12px 0; }
"""
SWITCH = """
document.querySelectorAll('select[data-group]').forEach(function (select) {
  select.addEventListener('change', function () {
    document.querySelectorAll('[data-of="' + select.dataset.group + '"]').forEach(function (panel) {
      panel.hidden = panel.id !== select.value;
      if (!panel.hidden) panel.querySelectorAll('.js-plotly-plot').forEach(function (p) { Plotly.Plots.resize(p); });
    });
  });
});
"""


def page(run: Run) -> str:
    """The whole document, about 5 MB, nearly all of it the plotting library."""
    name = html.escape(run.folder.resolve().name)
    body = "\n".join([*_sections(run), *_tables(run)])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>refit report: {name}</title><style>{STYLE}</style>'
        f"<script>{plotly.offline.get_plotlyjs()}</script></head>\n"
        f"<body><main><h1>refit report: {name}</h1>{_subtitle(run)}{_tiles(run)}{body}</main>"
        f"<script>{SWITCH}</script></body></html>\n"
    )


def _sections(run: Run) -> Iterable[str]:
    yield _section(
        "reward",
        "Reward and generation KL",
        "Step s samples with the version that refit s - 1 brought; a refit that goes wrong shows here first.",
        _figure(charts.reward_and_kl(run), "reward"),
    )
    yield _section(
        "phases",
        "Refits by phase",
        "Stage moves the weights beside those that serve, verify compares digests, commit puts them to use. They "
        "follow each other and add up to the whole refit.",
        _figure(charts.phase_bars(run, charts.PHASES, "stack"), "phase-driver"),
    )
    yield _section(
        "rank-phases",
        "Inside stage and commit",
        "The slowest rank of each phase. Ranks and streams work side by side, so these do not add up. Time on the wire "
        "includes waiting for the other end. Halt is the part of commit in which no token is sampled.",
        _figure(charts.phase_bars(run, (*charts.RANK_PHASES, charts.HALT), "group"), "phase-rank"),
    )
    yield _section(
        "timeline",
        "Timeline by rank and stream",
        "Where each rank's time went in one refit: a row per rank and stream, a bar per stretch of work.",
        _timelines(run),
    )
    yield _section(
        "traffic",
        "Traffic matrix",
        "Bytes of one refit from each trainer rank to each generator rank, point to point, as the plan says.",
        _matrices(run),
    )
    yield _section(
        "memory",
        "Extra memory",
        "The rank with the most, per refit: the new version beside the one that serves, and the buffers of the move.",
        _figure(charts.memory(run), "extra-memory"),
    )


def _tables(run: Run) -> Iterable[str]:
    yield _section("refits", "All refits", "", _refit_table(run))
    yield _section("ranks", "Ranks of the last refit", "", _rank_table(run))
    if run.config:
        text = html.escape(json.dumps(run.config, indent=2))
        yield _section(
            "config", "Configuration", "", f'<div class="scroll"><pre><code>{text}</code></pre></div>'
        )


def _section(name: str, title: str, words: str, content: str) -> str:
    note = f"<p>{html.escape(words)}</p>" if words else ""
    return f'<section id="{name}"><h2>{html.escape(title)}</h2>{note}{content}</section>'


def _figure(figure: Any | None, name: str) -> str:
    if figure is None:
        return '<div class="missing">Nothing was recorded for this.</div>'
    drawn: str = plotly.io.to_html(
        figure,
        include_plotlyjs=False,
        full_html=False,
        div_id=f"chart-{name}",
        config={"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["lasso2d", "select2d"]},
    )
    return drawn


def _timelines(run: Run) -> str:
    panels, options = [], []
    for number, (reason, refit) in enumerate(charts.chosen_refits(run)):
        name = f"timeline-{number}"
        label = f"version {refit['version']} ({reason}, {1e3 * refit['total_s']:.0f} ms)"
        options.append(f'<option value="{name}">{html.escape(label)}</option>')
        hidden = " hidden" if number else ""
        drawn = _figure(charts.timeline(refit), name)
        panels.append(f'<div id="{name}" data-of="timelines"{hidden}>{drawn}</div>')
    if not panels:
        return _figure(None, "timeline")
    return f'<select data-group="timelines" aria-label="refit">{"".join(options)}</select>{"".join(panels)}'


def _matrices(run: Run) -> str:
    used = dict.fromkeys(refit["plan"] for refit in run.refits)
    found = [run.plans[digest] for digest in used if digest in run.plans]
    parts = []
    for number, plan in enumerate(found):
        words = (
            f"Plan {plan['digest'][:12]}: {plan['num_bulk']} bulk tensors of {_amount(plan['bulk_bytes'])}, "
            f"{plan['num_misc']} misc tensors of {_amount(plan['misc_bytes'])} by broadcast; busiest link "
            f"{plan['busiest_link']}, {plan['bound_ratio']:.3f} of the lower bound ({plan['bound_link']})."
        )
        parts.append(f"<p>{html.escape(words)}</p>{_figure(charts.traffic(plan), f'traffic-{number}')}")
        rows = [
            (name, str(count), reason) for reason, count, name in plan.get("misc", ())
        ]  # not in older runs
        if rows:
            parts.append(_table(("by broadcast, for example", "tensors", "why"), rows))
    return "".join(parts) or _figure(None, "traffic")


def _subtitle(run: Run) -> str:
    command = " ".join(run.config.get("command", ())) or "(no arguments)"
    state = "" if run.summary else " The run has no summary: it is still going on, or it failed."
    return f"<p>python -m refit.run <code>{html.escape(command)}</code>.{state}</p>"


def _tiles(run: Run) -> str:
    tiles: list[tuple[str, str]] = []
    if run.steps:
        last = run.steps[-1]
        tiles += [("mean reward, last rollout", f"{last['reward']:.3f}"), ("steps", str(_num_trained(run)))]
        tiles += [("largest generation KL", f"{max(step['gen_kl'] for step in run.steps):.2g}")]
    if run.reported:
        times = sorted(refit["total_s"] for refit in run.reported)
        newest = run.reported[-1]
        tiles += [
            ("refit, median", _milliseconds(times[len(times) // 2])),
            ("version", str(newest["version"])),
            ("bytes point to point", _amount(newest["bulk_bytes"])),
            ("bytes by broadcast", _amount(newest["misc_bytes"])),
            ("busiest link / lower bound", f"{newest['bound_ratio']:.3f}"),
        ]
        halts = sorted(
            refit["seconds"][charts.HALT] for refit in run.reported if charts.HALT in refit["seconds"]
        )
        if halts:
            tiles.insert(-4, ("answers wait, median", _milliseconds(halts[len(halts) // 2])))
        shares = [refit["line_share"] for refit in run.reported if refit.get("line_share") is not None]
        if shares:
            tiles.append(("of line rate, median", _share(statistics.median(shares))))
        sent = [refit["delta_share"] for refit in run.reported if refit.get("delta_share") is not None]
        if sent:
            tiles.append(("of bulk sent as deltas, median", _share(statistics.median(sent))))
    if run.refits:
        tiles.append(("refits not committed", str(sum(not refit["committed"] for refit in run.refits))))
    cells = "".join(
        f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'
        for name, value in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _num_trained(run: Run) -> int:
    return sum(step["train"] is not None for step in run.steps)


def _refit_table(run: Run) -> str:
    audits = {
        step["refit"]["version"]: step["refit"]["verified"] for step in run.steps if step["refit"] is not None
    }
    headings = (
        "version",
        "attempt",
        "outcome",
        "total",
        *charts.PHASES,
        "bulk",
        "of it sent",
        "misc",
        "bound ratio",
        "straggler",
        "behind the median",
        "digests",
        "audit",
        "incidents",
    )
    rows = [_refit_row(refit, audits.get(refit["version"])) for refit in run.refits[-MAX_ROWS:]]
    return _table(headings, rows)


def _refit_row(refit: Mapping[str, Any], audit: bool | None) -> list[str]:
    differing, compared = refit["digests_differing"], refit["digests_compared"]
    digests = f"{differing} of {compared} differ" if differing else f"{compared} equal"
    outcome = "committed" if refit["committed"] else "NOT COMMITTED: " + refit["reason"][:160]
    return [
        str(refit["version"]),
        str(refit["attempt"]),
        outcome,
        _milliseconds(refit["total_s"]),
        *[_milliseconds(refit["seconds"].get(phase, 0.0)) for phase in charts.PHASES],
        _amount(refit["bulk_bytes"]),
        _share(refit.get("delta_share")),  # not in older runs, and empty without deltas
        _amount(refit["misc_bytes"]),
        f"{refit['bound_ratio']:.3f}",
        refit["straggler"],
        _milliseconds(refit["straggler_s"]),
        digests,
        {None: "", True: "equal", False: "FAILED"}[audit],
        "; ".join(refit["incidents"])[:300],
    ]


def _rank_table(run: Run) -> str:
    if not run.reported:
        return _figure(None, "ranks")
    headings = (
        "rank",
        "began late",
        "sent",
        "received",
        "misc",
        "rate",
        "of line rate",
        *charts.RANK_PHASES,
        "buffers",
        "staged",
    )
    rows = [
        [
            rank["name"],
            _milliseconds(rank["late_s"]),
            *[_amount(rank[key]) for key in ("bytes_sent", "bytes_received", "misc_bytes")],
            _rate(rank.get("bytes_per_s")),  # not in older runs, nor is the next
            _share(rank.get("line_share")),
            *[_milliseconds(rank["seconds"].get(phase, 0.0)) for phase in charts.RANK_PHASES],
            _amount(rank["peak_extra_bytes"]),
            _amount(rank["staged_bytes"]),
        ]
        for rank in run.reported[-1]["ranks"][:MAX_ROWS]
    ]
    return _table(headings, rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    kind = ' class="bad"' if text.startswith(("NOT", "FAILED")) else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.1f} ms"


def _rate(bytes_per_s: float | None) -> str:
    return "" if bytes_per_s is None else f"{_amount(bytes_per_s)}/s"


def _share(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3g} %"


def _amount(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} TB"

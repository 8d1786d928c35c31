"""The pictures of the page, as plotly figures. Each takes the run; it returns None where there is nothing to show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped]
from plotly.subplots import make_subplots  # type: ignore[import-untyped]

from refit.report.reader import Run

PHASES = ("pause", "stage", "verify", "commit")
RANK_PHASES = ("pack", "wire", "unpack", "digest", "misc", "finalize")
HALT = "halt"  # the part of commit in which a replica samples no token; the driver measures it
COLOURS = {
    "pause": "#9aa4b2",
    "stage": "#3b6ea5",
    "verify": "#c9a227",
    "commit": "#4f8a5b",
    "pack": "#5b8fc7",
    "wire": "#23395b",
    "unpack": "#5fb3a8",
    "digest": "#c9a227",
    "misc": "#8c5fa8",
    "finalize": "#4f8a5b",
    "halt": "#b4472f",
}
MAX_TIMELINE_ROWS = 64
MAX_TIMELINES = 5
MAX_TICKS = 25  # up to so many steps or versions, each has a tick of its own
REWARD_COLOUR, KL_COLOUR = "#3b6ea5", "#b4472f"


def styled(figure: Any, height: int, x_title: str, y_title: str) -> Any:
    """One look for all."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 80, "r": 24, "t": 34, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1c2733"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        hoverlabel={"namelength": -1},
    )
    figure.update_xaxes(title_text=x_title)
    figure.update_yaxes(title_text=y_title)
    return figure


def counted(figure: Any, numbers: Sequence[int]) -> Any:
    """Whole numbers on the x axis: steps and versions have no fractions."""
    few = numbers[-1] - numbers[0] < MAX_TICKS
    figure.update_xaxes(tickformat="d", dtick=1 if few else None)
    return figure


def reward_and_kl(run: Run) -> Any | None:
    """Mean reward with its spread, and generation KL below it, over the same steps."""
    if not run.steps:
        return None
    x = [step["step"] for step in run.steps]
    reward = [step["reward"] for step in run.steps]
    spread = [step["reward_stdev"] for step in run.steps]
    low = [mean - stdev for mean, stdev in zip(reward, spread, strict=True)]
    high = [mean + stdev for mean, stdev in zip(reward, spread, strict=True)]
    figure = make_subplots(rows=2, shared_xaxes=True, row_heights=[0.6, 0.4], vertical_spacing=0.06)
    figure.add_traces(_band(x, low, high))
    for row, name, y, colour in (
        (1, "mean reward", reward, REWARD_COLOUR),
        (2, "generation KL per token", [max(step["gen_kl"], 0.0) for step in run.steps], KL_COLOUR),
    ):
        look = {"color": colour, "width": 2}
        figure.add_scatter(x=x, y=y, mode="lines+markers", name=name, line=look, row=row, col=1)
    styled(figure, 460, "", "mean reward")
    figure.update_xaxes(title_text="step", row=2)
    figure.update_yaxes(
        title_text="generation KL<br>per token",
        rangemode="tozero",
        exponentformat="e",
        tickformat=".1e",
        row=2,
    )
    return counted(figure, x)


def _band(x: Sequence[int], low: Sequence[float], high: Sequence[float]) -> list[Any]:
    """Two curves with the space between them shaded."""
    line = {"width": 0}
    upper = go.Scatter(x=x, y=high, mode="lines", line=line, hoverinfo="skip", showlegend=False)
    lower = go.Scatter(
        x=x,
        y=low,
        mode="lines",
        line=line,
        fill="tonexty",
        fillcolor="rgba(59,110,165,0.15)",
        hoverinfo="skip",
        name="one standard deviation",
    )
    return [upper, lower]


def phase_bars(run: Run, phases: Sequence[str], mode: str) -> Any | None:
    """A bar per refit and phase: `mode` "stack" where phases follow each other, "group" where they overlap."""
    refits = run.reported
    shown = [phase for phase in phases if any(refit["seconds"].get(phase) for refit in refits)]
    if not shown:
        return None
    figure = go.Figure()
    for phase in shown:
        figure.add_bar(
            x=[refit["version"] for refit in refits],
            y=[1e3 * refit["seconds"].get(phase, 0.0) for refit in refits],
            name=phase,
            marker_color=COLOURS[phase],
            hovertemplate="version %{x}<br>" + phase + " %{y:.3g} ms<extra></extra>",
        )
    figure.update_layout(barmode=mode, bargap=0.25)
    return counted(styled(figure, 340, "version", "milliseconds"), [refit["version"] for refit in refits])


def traffic(plan: Mapping[str, Any]) -> Any | None:
    """Bytes from each trainer rank (row) to each generator rank (column), point to point."""
    num_train, num_gen = plan["num_train"], plan["num_gen"]
    if not plan["links"]:
        return None
    cells = [[0] * num_gen for _ in range(num_train)]
    for src, dst, num_bytes in plan["links"]:
        cells[src][dst - num_train] = num_bytes
    is_small = num_train * num_gen <= 256
    figure = go.Figure(
        go.Heatmap(
            z=cells,
            x=[f"gen {rank}" for rank in range(num_gen)],
            y=[f"train {rank}" for rank in range(num_train)],
            colorscale="Blues",
            zmin=0,
            zmax=max(map(max, cells)),
            colorbar={"title": {"text": "bytes"}, "exponentformat": "SI"},
            texttemplate="%{z:.3s}B" if is_small else None,
            hovertemplate="%{y} to %{x}: %{z:,} bytes<extra></extra>",
        )
    )
    styled(figure, max(260, min(900, 120 + 44 * num_train)), "", "")
    figure.update_yaxes(autorange="reversed")
    return figure


def memory(run: Run) -> Any | None:
    """Extra memory per refit, the rank with the most: transfer buffers, and the staged version on generators."""
    refits = run.reported
    if not refits:
        return None
    figure = go.Figure()
    x = [refit["version"] for refit in refits]
    for key, name, colour, dash in (
        ("staged_bytes", "staged version", COLOURS["commit"], "solid"),
        ("peak_extra_bytes", "buffers", COLOURS["misc"], "dot"),  # often as large: both must be seen
    ):
        figure.add_scatter(
            x=x,
            y=[refit[key] / 1e6 for refit in refits],
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": dash},
            hovertemplate="version %{x}: %{y:.4g} MB<extra>" + name + "</extra>",
        )
    figure.update_yaxes(rangemode="tozero")
    return counted(styled(figure, 280, "version", "MB"), x)


def chosen_refits(run: Run) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """The refits worth a timeline, with the reason: the last, the slowest, the quickest, the first, discarded ones."""
    refits = run.reported
    if not refits:
        return ()
    by_time = sorted(refits, key=lambda refit: refit["total_s"])
    wanted = [("last", refits[-1]), ("slowest", by_time[-1]), ("quickest", by_time[0]), ("first", refits[0])]
    wanted += [("discarded", refit) for refit in refits if not refit["committed"]]
    found: dict[tuple[int, int], tuple[str, Mapping[str, Any]]] = {}
    for reason, refit in wanted:
        found.setdefault((refit["version"], refit["attempt"]), (reason, refit))
    return tuple(found.values())[:MAX_TIMELINES]


def timeline(refit: Mapping[str, Any]) -> Any:
    """A row per rank and stream, a bar per stretch of a phase. At most MAX_TIMELINE_ROWS rows, evenly chosen."""
    bars: dict[str, list[tuple[str, float, float, str]]] = {}
    rows: list[str] = []
    for row, phase, start_ms, length_ms, words in _stretches(refit):
        if row not in rows:
            rows.append(row)
        bars.setdefault(phase, []).append((row, start_ms, length_ms, words))
    step = -(-len(rows) // MAX_TIMELINE_ROWS)
    kept = rows[::step]
    figure = go.Figure()
    for phase in RANK_PHASES:
        shown = [bar for bar in bars.get(phase, []) if bar[0] in kept]
        if shown:
            figure.add_bar(
                orientation="h",
                y=[bar[0] for bar in shown],
                base=[bar[1] for bar in shown],
                x=[bar[2] for bar in shown],
                customdata=[bar[3] for bar in shown],
                name=phase,
                marker={"color": COLOURS[phase], "line": {"width": 0}},
                hovertemplate="%{y}<br>" + phase + " %{customdata}<extra></extra>",
            )
    figure.update_layout(barmode="overlay", bargap=0.3)
    styled(figure, 130 + 26 * len(kept), "milliseconds since the first rank began", "")
    figure.update_yaxes(categoryorder="array", categoryarray=kept[::-1], automargin=True)
    _mark_decision(figure, refit)
    return figure


def _mark_decision(figure: Any, refit: Mapping[str, Any]) -> None:
    """Shade what lies between the last rank's staging and the first engine's processing: nothing moves there."""
    spans = [span for rank in refit["ranks"] for span in rank["spans"]]
    staged_s = [span["stop_s"] for span in spans if span["phase"] != "finalize"]
    begun_s = [span["start_s"] for span in spans if span["phase"] == "finalize"]
    if staged_s and begun_s and min(begun_s) > max(staged_s):
        figure.add_vrect(
            x0=1e3 * max(staged_s),
            x1=1e3 * min(begun_s),
            fillcolor=COLOURS["pause"],
            opacity=0.18,
            line_width=0,
            annotation_text="digests compared, decision told",
            annotation_position="top left",
            annotation_font_size=11,
        )


def _stretches(refit: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float, str]]:
    """(row, phase, start, length, words) of every span; milliseconds."""
    for rank in refit["ranks"]:
        for span in sorted(rank["spans"], key=lambda span: (span["lane"], span["start_s"])):
            row = f"{rank['name']} stream {span['lane']}"
            start_ms, length_ms = 1e3 * span["start_s"], 1e3 * (span["stop_s"] - span["start_s"])
            stage = f", stage {span['stage']}" if span["stage"] >= 0 else ""
            yield row, span["phase"], start_ms, length_ms, f"{length_ms:.3g} ms from {start_ms:.3g} ms{stage}"

"""The report page in a real headless Chromium: everything is drawn, nothing is fetched, the console stays quiet."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from refit.cli import main
from tests.report.runs import recorded_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        BROWSER is None, reason="no chromium on the PATH; on Debian: apt-get install chromium"
    ),
]


def browse(page, profile, *arguments):
    """(standard output, console lines) of a headless visit. No network: every host is unresolvable."""
    done = subprocess.run(
        [
            BROWSER,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={profile}",
            "--virtual-time-budget=8000",
            *arguments,
            page.resolve().as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_draws_every_chart_without_a_console_message(tmp_path):
    folder = recorded_run(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    page = folder / "report.html"
    dom, console = browse(page, tmp_path / "profile", "--dump-dom")
    assert not console
    body = dom[dom.index("<body>") :]
    drawn = re.findall(r'id="(chart-[\w-]+)" class="plotly-graph-div js-plotly-plot"', body)
    assert len(drawn) == len(re.findall(r'<div id="chart-', body)) >= 7
    assert body.count('class="main-svg"') >= len(drawn)
    assert "train 0 stream 0" in body and "generation KL per token" in body


def test_a_script_that_fails_shows_in_the_console(tmp_path):
    page = tmp_path / "broken.html"
    page.write_text("<!doctype html><body><script>Plotly.newPlot('a')</script></body>")
    assert browse(page, tmp_path / "profile", "--dump-dom")[1], "else the test above proves nothing"

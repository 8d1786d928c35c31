"""`report`: one HTML page about a run, from its folder; no network, no framework."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from refit.plan import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="the run_dir of a job, also while it runs"
    )
    parser.add_argument(
        "--out", type=Path, default=None, metavar="FILE.html", help="default: RUN_DIR/report.html"
    )


def run(arguments: argparse.Namespace) -> int:
    if find_spec("plotly") is None:
        raise ConfigError("the report needs plotly, which is not installed: pip install 'refit[report]'")
    from refit.report.page import page
    from refit.report.reader import read_run

    out: Path = arguments.out or arguments.run_dir / "report.html"
    text = page(read_run(arguments.run_dir))
    try:
        out.write_text(text)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}; name another file") from error
    print(f"{out} ({len(text) / 1e6:.1f} MB)")
    return 0

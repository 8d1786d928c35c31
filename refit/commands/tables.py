"""Tables for people: with rich where it is installed, plain columns where it is not."""

import sys
from collections.abc import Sequence

FILE_WIDTH = 160
"""Columns where no terminal says how wide it is."""


def show(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table. Numbers are right-aligned. Brackets are text, not rich's markup."""
    text = [[str(cell) for cell in row] for row in rows]
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        _plain(title, headings, text)
        return
    table = Table(title=escape(title), title_justify="left")
    for column, heading in enumerate(headings):
        numeric = bool(rows) and all(isinstance(row[column], (int, float)) for row in rows)
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in text:
        table.add_row(*map(escape, row))
    Console(width=None if sys.stdout.isatty() else FILE_WIDTH).print(table)


def _plain(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    print(title)
    for row in (headings, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def amount(num_bytes: float) -> str:
    """Bytes in a readable unit (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} TB"


def seconds(value: float) -> str:
    """Seconds in a readable unit."""
    return f"{value:.3f} s" if value >= 1 else f"{value * 1000:.3g} ms"

"""The sizes that keep the rooms small, and the walls that no linter knows."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "refit").rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 40


def test_no_source_file_is_longer_than_400_lines() -> None:
    too_long = {
        path.name: size for path in SOURCES if (size := len(path.read_text().splitlines())) > MAX_FILE_LINES
    }
    assert not too_long


def test_no_function_is_longer_than_40_lines_beside_its_docstring() -> None:
    too_long = {
        f"{path.relative_to(ROOT)}:{node.name}": size
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (size := body_lines(node)) > MAX_FUNCTION_LINES
    }
    assert not too_long


def test_sources_are_ascii() -> None:
    assert not [path.name for path in SOURCES if not path.read_text().isascii()]


def test_the_words_of_the_generator_layout_stay_on_the_generator_side() -> None:
    elsewhere = [path for path in SOURCES if not path.is_relative_to(ROOT / "refit" / "gen_side")]
    assert not [
        path.name for path in elsewhere if any(word in path.read_text() for word in ("w13", "w2_weight"))
    ]


@pytest.mark.parametrize("module", ["refit.plan", "refit.cli"])
def test_the_planner_and_its_commands_import_no_framework(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "roots = {name.partition('.')[0] for name in sys.modules}; "
        "print(sorted(roots & {'torch', 'ray', 'vllm', 'megatron', 'numpy', 'hydra'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, the docstring left out."""
    size = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        size -= (first.end_lineno or first.lineno) - first.lineno + 1
    return size

"""The pages: links lead somewhere, each page is found from the README, and what they name exists."""

from __future__ import annotations

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from refit import run
from refit.cli import COMMANDS
from refit.run import load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FOLDERS = ("refit", "docs", "launch", "tests", "configs", "examples", "benchmarks", "requirements")
FILE = re.compile(rf"(?<![\w/.])((?:{'|'.join(FOLDERS)})/[\w/.-]*\w\.(?:py|sh|sub|md|yaml|toml|txt|in|svg))")


def links(page: Path) -> list[str]:
    return LINK.findall(page.read_text())


def anchors(page: Path) -> set[str]:
    """What GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_inside_the_repository_leads_somewhere(page: Path) -> None:
    for link in links(page):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    missing = [name for name in FILE.findall(page.read_text()) if not (ROOT / name).exists()]
    assert not missing, page.name


def test_the_readme_leads_to_every_page() -> None:
    linked = {(ROOT / link).resolve() for link in links(ROOT / "README.md") if "://" not in link}
    assert set((ROOT / "docs").glob("*.md")) <= linked


def test_every_command_is_told_of_in_the_pages() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    assert [name for name in COMMANDS if f"python -m refit {name}" not in text] == []


def commands(module: str) -> list[tuple[str, list[str]]]:
    """(page, words) of every call of a module in a block of shell, continued lines joined."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if ["-m", module] in [words[i : i + 2] for i in range(len(words))]:
                    found.append((page.name, words[words.index(module) + 1 :]))
    return found


def test_every_command_line_in_the_pages_has_options_that_its_command_takes() -> None:
    called = commands("refit")
    assert len(called) > 15
    for page, (name, *words) in called:
        parser = argparse.ArgumentParser(prog=f"{page}: {name}", exit_on_error=False, allow_abbrev=False)
        import_module(COMMANDS[name][0]).add_arguments(parser)
        parser.parse_args(words)


def test_every_job_in_the_pages_has_a_configuration_that_composes() -> None:
    called = commands("refit.run")
    assert len(called) > 4
    for _, words in called:
        arguments = run._parser().parse_intermixed_args(words)
        load_config(arguments.config_name, arguments.overrides)

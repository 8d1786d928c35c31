"""A run folder as plain values. Nothing of the job is imported: the JSON files are the interface."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refit.plan.errors import ConfigError

STEPS_FILE, REFITS_FILE, PLANS_FOLDER = "steps.jsonl", "refits.jsonl", "plans"
SUMMARY_FILE, CONFIG_FILE = "summary.json", "config.json"


@dataclass(frozen=True, slots=True)
class Run:
    """What a run has left so far, in order. `summary` is empty while the run goes on or when it failed."""

    folder: Path
    steps: tuple[Mapping[str, Any], ...]
    refits: tuple[Mapping[str, Any], ...]
    plans: Mapping[str, Mapping[str, Any]]
    summary: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def reported(self) -> tuple[Mapping[str, Any], ...]:
        """The refits whose ranks have all reported; one that was cut short has no spans and no bytes."""
        return tuple(refit for refit in self.refits if refit["ranks"])


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises ConfigError where it is none, or a file of it is broken in the middle.

    The last line of a file may be half written while the run goes on; it is then left out.
    """
    if not (folder / STEPS_FILE).is_file():
        raise ConfigError(
            f"{folder} holds no {STEPS_FILE}: give the run_dir of a job; its log says 'files in RUN_DIR'"
        )
    plans = [_document(path) for path in sorted((folder / PLANS_FOLDER).glob("*.json"))]
    run = Run(
        folder=folder,
        steps=_lines(folder / STEPS_FILE),
        refits=_lines(folder / REFITS_FILE),
        plans={plan["digest"]: plan for plan in plans},
        summary=_document(folder / SUMMARY_FILE),
        config=_document(folder / CONFIG_FILE),
    )
    if not run.steps and not run.refits:
        raise ConfigError(f"{folder} holds no finished step and no refit yet; try again later")
    return run


def _lines(path: Path) -> tuple[Mapping[str, Any], ...]:
    if not path.is_file():
        return ()
    found: list[Mapping[str, Any]] = []
    texts = path.read_text().split("\n")
    for number, text in enumerate(texts, start=1):
        if not text or number == len(texts):
            continue  # what follows the last line end is not a whole line
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} line {number} is not JSON: {error}") from error
    return tuple(found)


def _document(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        document: Mapping[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    return document

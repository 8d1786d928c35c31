"""A run folder as plain values. Nothing of the job is imported: the JSON files are the interface."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refit.plan.errors import ConfigError

STEPS_FILE, REFITS_FILE, PLANS_FOLDER = "steps.jsonl", "refits.jsonl", "plans"
SUMMARY_FILE, CONFIG_FILE = "summary.json", "config.json"
STEP_KEYS = ("step", "reward", "reward_stdev", "gen_kl", "train", "refit")
REFIT_KEYS = (
    *("version", "attempt", "plan", "committed", "reason", "incidents", "seconds", "total_s", "ranks"),
    *("bulk_bytes", "misc_bytes", "line_share", "straggler", "straggler_s"),
    *("digests_compared", "digests_differing"),
)
PLAN_KEYS = ("digest", "num_train", "num_gen", "links")


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
    """Read a run folder. Raises ConfigError where it is none, or a file of it is broken in the middle or another's.

    The last line of a file may be half written while the run goes on; it is then left out.
    """
    if not (folder / STEPS_FILE).is_file():
        raise ConfigError(
            f"{folder} holds no {STEPS_FILE}: give the run_dir of a job; its log says 'files in RUN_DIR'"
        )
    plans = [_document(path, PLAN_KEYS) for path in sorted((folder / PLANS_FOLDER).glob("*.json"))]
    run = Run(
        folder=folder,
        steps=_lines(folder / STEPS_FILE, STEP_KEYS),
        refits=_lines(folder / REFITS_FILE, REFIT_KEYS),
        plans={plan["digest"]: plan for plan in plans},
        summary=_document(folder / SUMMARY_FILE),
        config=_document(folder / CONFIG_FILE),
    )
    if not run.steps and not run.refits:
        raise ConfigError(f"{folder} holds no finished step and no refit yet; try again later")
    return run


def _lines(path: Path, keys: Sequence[str]) -> tuple[Mapping[str, Any], ...]:
    if not path.is_file():
        return ()
    texts = path.read_text().split("\n")
    return tuple(
        _parsed(text, f"{path} line {number}", keys)
        for number, text in enumerate(texts, start=1)
        if text and number < len(texts)  # what follows the last line end is not a whole line
    )


def _document(path: Path, keys: Sequence[str] = ()) -> Mapping[str, Any]:
    return _parsed(path.read_text(), str(path), keys) if path.is_file() else {}


def _parsed(text: str, where: str, keys: Sequence[str]) -> Mapping[str, Any]:
    """A JSON object with all of `keys`."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    missing = (
        [key for key in keys if key not in found] if isinstance(found, dict) else ["the form of an object"]
    )
    if missing:
        raise ConfigError(
            f"{where} is not what this version of refit writes, it lacks {', '.join(missing)}: "
            "make the page with the version that ran the job, or move the file away"
        )
    document: Mapping[str, Any] = found
    return document

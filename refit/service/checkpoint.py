"""The policy on disk while a job runs: always one whole checkpoint, whatever dies in the middle of writing the next."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refit.service.waiting import FIXED_BOUND, collect

FOLDER = "checkpoint"
VERSION_FILE = "refit.json"


def save_checkpoint(trainers: Mapping[str, Any], run_dir: Path, version: int, timeout_s: float) -> Path:
    """Let the trainers write an HF checkpoint of `version` beside the last one, then put it in its place.

    Collective over the trainers. Raises RefitFailed or TransportError, and OSError when the disk is full; the last
    checkpoint is whole then.
    """
    partial = run_dir / f"{FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    collect(
        {who: actor.save.remote(str(partial)) for who, actor in trainers.items()},
        "save",
        timeout_s,
        bound=FIXED_BOUND,
    )
    (partial / VERSION_FILE).write_text(json.dumps({"version": version}) + "\n")
    return put_in_place(run_dir, partial)


def put_in_place(run_dir: Path, partial: Path) -> Path:
    """Make a whole checkpoint the run's newest. At every moment one whole checkpoint is where it is looked for."""
    folder, old = run_dir / FOLDER, run_dir / f"{FOLDER}.old"
    if folder.exists():  # else `old` is the only whole one, left by a crash between the two renames
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def last_checkpoint(run_dir: Path) -> tuple[Path, int] | None:
    """(folder, version) of the newest whole checkpoint of a run, if it has one."""
    for folder in (run_dir / FOLDER, run_dir / f"{FOLDER}.old"):
        if (folder / VERSION_FILE).is_file():
            return folder, int(json.loads((folder / VERSION_FILE).read_text())["version"])
    return None


def way_out(run_dir: Path, started_s: float) -> str:
    """How to go on after a job has ended early that began at `started_s`, by the clock of the run folder's files."""
    found = last_checkpoint(run_dir)
    if found is None:
        return "there is no checkpoint of this run (grpo.checkpoint_every)"
    folder, version = found
    if (folder / VERSION_FILE).stat().st_mtime < started_s:
        return (
            f"there is no checkpoint of this run (grpo.checkpoint_every); {folder} is an earlier run's, of its "
            f"version {version}"
        )
    return f"the policy of version {version} is saved; go on from it with policy.model={folder}"

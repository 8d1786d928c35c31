"""Whatever dies while a checkpoint takes the place of the last, one whole checkpoint is found."""

import json
from pathlib import Path

import pytest

from refit.service.checkpoint import VERSION_FILE, last_checkpoint, put_in_place, way_out


def written(run_dir, version):
    partial = run_dir / "checkpoint.partial"
    partial.mkdir(parents=True)
    (partial / VERSION_FILE).write_text(json.dumps({"version": version}))
    return partial


def test_the_newest_checkpoint_takes_the_place_of_the_last_and_nothing_else_is_left(tmp_path):
    for version in (1, 2, 3):
        folder = put_in_place(tmp_path, written(tmp_path, version))
        assert last_checkpoint(tmp_path) == (folder, version)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    saved_s = (folder / VERSION_FILE).stat().st_mtime
    assert f"policy.model={folder}" in way_out(tmp_path, saved_s)
    words = way_out(tmp_path, saved_s + 1.0)
    assert "no checkpoint of this run" in words and f"{folder} is an earlier run's, of its version 3" in words


@pytest.mark.parametrize("renames", [0, 1])
def test_two_crashes_in_a_row_leave_a_whole_checkpoint(tmp_path, monkeypatch, renames):
    put_in_place(tmp_path, written(tmp_path, 1))
    for version in (2, 3):
        partial = written(tmp_path, version)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="crash"):
            crash_after(renames if version == 2 else 0, patch)
            put_in_place(tmp_path, partial)
        assert last_checkpoint(tmp_path)[1] == 1
        (partial / VERSION_FILE).unlink()
        partial.rmdir()
    put_in_place(tmp_path, written(tmp_path, 4))
    assert last_checkpoint(tmp_path)[1] == 4


def test_a_run_without_a_checkpoint_says_how_to_get_one(tmp_path):
    assert "grpo.checkpoint_every" in way_out(tmp_path, 0.0)


def crash_after(renames, patch):
    done = []
    rename = Path.rename

    def counted(path, target):
        if len(done) == renames:
            raise OSError("crash")
        done.append(path)
        return rename(path, target)

    patch.setattr(Path, "rename", counted)

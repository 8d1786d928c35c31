"""An installed wheel, far from any source tree, finds all that it needs beside its modules."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT_FROM = ("refit", "configs", "pyproject.toml", "README.md")
BUILD_S = 120


def test_a_wheel_composes_a_job_and_plans_where_there_is_no_source_tree(tmp_path):
    source, environment, away = tmp_path / "source", tmp_path / "environment", tmp_path / "away"
    source.mkdir()
    away.mkdir()
    for name in BUILT_FROM:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "wheel", *offline, "--wheel-dir", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(environment)
    python = str(environment / "bin" / "python")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", str(wheel))
    (packages,) = environment.glob("lib/python3*/site-packages")
    (packages / "others.pth").write_text(
        sysconfig.get_paths()["purelib"]
    )  # torch and the rest are not of this test
    where = run(python, "-c", "import refit; print(refit.__file__)", cwd=away)
    assert Path(where.strip()).is_relative_to(environment)
    job = run(python, "-m", "refit.run", "--config-name", "lora", "--cfg", "job", cwd=away)
    assert "lora_rank: 16" in job
    plan = ("plan", "--model", "qwen3-4b", "--train", "tp=2", "--gen", "tp=4")
    assert "bound" in run(python, "-m", "refit", *plan, cwd=away)


def run(*command, cwd=ROOT):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=BUILD_S)
    assert done.returncode == 0, f"{' '.join(command)} ended {done.returncode}:\n{done.stderr[-3000:]}"
    return done.stdout

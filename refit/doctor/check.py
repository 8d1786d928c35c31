"""What a check says, and what all checks look at."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

State = Literal["ok", "warn", "fail"]
GB = 10**9
MIB = 2**20
SHARED_MEMORY = "/dev/shm"  # noqa: S108  not a temporary file of ours


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor: what was looked at, what was found, and what to do about it.

    `fail`: a job will not run, or will do wrong. `warn`: something will be slow, or missing in some jobs. `advice` is
    required for both; with `ok` it says what the finding means here.
    """

    area: str
    name: str
    state: State
    found: str
    advice: str = ""

    def __post_init__(self) -> None:
        assert self.state in get_args(State), (
            f"{self.name}: state {self.state!r} is none of {get_args(State)}"
        )
        assert self.state == "ok" or self.advice, f"{self.name}: {self.state} without saying what to do"


@dataclass(frozen=True, slots=True)
class Host:
    """A machine as checks see it. `root` is where its /proc, /sys and /dev lie; tests put a tree of their own there."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def path(self, name: str) -> Path:
        """`name` is absolute: "/proc/meminfo"."""
        return self.root / name.lstrip("/")

    def text(self, name: str) -> str | None:
        """The content of a file; None where it is not there or not readable."""
        try:
            return self.path(name).read_text(errors="replace")
        except OSError:
            return None

    def processes(self) -> Iterator[Process]:
        """Processes of this user that still run, this one left out."""
        for folder in self.path("/proc").glob("[0-9]*"):
            if folder.name != str(os.getpid()):
                try:
                    process = Process.read(folder)
                except (OSError, ValueError, IndexError):
                    continue  # it has ended meanwhile
                if process.uid == os.getuid() and process.state != "Z":
                    yield process


@dataclass(frozen=True, slots=True)
class Process:
    """A line of /proc. `age_s` counts from the start of the process; `command` has no arguments cut."""

    pid: int
    uid: int
    state: str
    command: str
    age_s: float
    folder: Path

    @classmethod
    def read(cls, folder: Path) -> Process:
        """Raises OSError, ValueError or IndexError where the process has ended."""
        words = (folder / "stat").read_text().rpartition(")")[2].split()
        up_s = float((folder.parent / "uptime").read_text().split()[0])
        return cls(
            pid=int(folder.name),
            uid=folder.stat().st_uid,
            state=words[0],
            command=(folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip(),
            age_s=up_s - int(words[19]) / os.sysconf("SC_CLK_TCK"),
            folder=folder,
        )

    def mapped(self) -> str:
        """Its /proc/<pid>/maps; empty where it has ended or belongs to somebody else."""
        try:
            return (self.folder / "maps").read_text(errors="replace")
        except OSError:
            return ""


def amount(num_bytes: float) -> str:
    """Bytes in a readable unit (powers of 1000)."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"

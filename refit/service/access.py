"""From outside to a running engine: by the run folder of a job, or by the address of a vLLM server.

A job keeps the address of its control store in `RUN_DIR/control.json` while it runs; it is on loopback unless the job
is on an existing cluster. For a server the reader hosts a control store itself, on loopback unless told otherwise.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refit.gen_side.live.desk import RUN_ID as DESK
from refit.plan import ConfigError
from refit.service.gate.check import answers
from refit.service.http_engine import HttpEngine
from refit.service.reader import TIMEOUT_S, JobEngine, Reader, ServerEngine
from refit.transfer.errors import TransportError
from refit.transfer.rendezvous import ControlStore

FILE = "control.json"
RUNS = Path("runs")  # where configs/default.yaml puts run folders
WAY_OUT = "give --run-dir of a running job, or --server URL of a vLLM server"
LOOPBACK = "127.0.0.1"
JOIN_S = 5.0
STEP_S = 1800.0  # longest wait for a job to come to the end of a step


@dataclass(frozen=True, slots=True)
class JobAddress:
    """Where a running job takes reads."""

    store: str
    engines: int
    workers_per_engine: int

    def write(self, run_dir: Path) -> None:
        (run_dir / FILE).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def of(cls, run_dir: Path) -> JobAddress:
        """Raises ConfigError when no job runs there, or its file is not what a job writes."""
        try:
            return cls(**json.loads((run_dir / FILE).read_text()))
        except OSError as error:
            raise ConfigError(
                f"no job runs in {run_dir}: it has no {FILE} ({error.strerror}); {WAY_OUT}"
            ) from error
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{run_dir / FILE} is not what a job of this version writes: {error}; {WAY_OUT}"
            ) from error

    @property
    def is_running(self) -> bool:
        """Whether somebody listens where the job's control store was; a killed job leaves its file behind."""
        return answers(self.store)

    def join(self) -> ControlStore:
        """Raises TransportError when the job is gone without having removed its file."""
        if (
            not self.is_running
        ):  # the store itself would try for as long as it may, and say so on standard error
            raise TransportError(f"no control store answers at {self.store}: that job has ended; {WAY_OUT}")
        host, _, port = self.store.rpartition(":")
        return ControlStore.join(host, int(port), f"reader-{secrets.token_hex(4)}", JOIN_S)


def only_running_job(runs: Path = RUNS) -> Path:
    """The folder of the job that runs with a run folder in `runs`. Raises ConfigError unless there is exactly one."""
    folders = sorted(file.parent for file in runs.glob(f"*/{FILE}"))
    found = [folder for folder in folders if JobAddress.of(folder).is_running]
    if not found:
        raise ConfigError(f"no job runs in a folder of {runs.resolve()}; {WAY_OUT}")
    if len(found) > 1:
        raise ConfigError(f"{len(found)} jobs run, in {', '.join(map(str, found))}; give --run-dir of one")
    return found[0]


@contextlib.contextmanager
def job_reader(run_dir: Path | None, place: int = 0, timeout_s: float = TIMEOUT_S) -> Iterator[Reader]:
    """A reader of the `place`-th engine of the job that runs in a folder; None: of the only one that runs."""
    address = JobAddress.of(run_dir or only_running_job())
    if not 0 <= place < address.engines:
        raise ConfigError(f"engine {place} is not there: the job has engines 0 to {address.engines - 1}")
    control = address.join()
    try:
        yield Reader(JobEngine(control, place, address.workers_per_engine), control, timeout_s)
    finally:
        control.close()


@contextlib.contextmanager
def server_reader(url: str, address: str = LOOPBACK, timeout_s: float = TIMEOUT_S) -> Iterator[Reader]:
    """A reader of a vLLM server with the refit backend. Its workers answer to a store at `address` of this machine."""
    engine = ServerEngine.of(HttpEngine(url, timeout_s))
    control = ControlStore.host(address, run_id="reader")
    try:
        yield Reader(engine, control, timeout_s)
    finally:
        control.close()


def ask_trainers(run_dir: Path | None, place: int, pattern: str, timeout_s: float = STEP_S) -> Any:
    """A diff of a job's trainers against an engine of it, made by the job at the end of its step; as JSON.

    `run_dir` as in `job_reader`.
    """
    control = JobAddress.of(run_dir or only_running_job()).join()
    try:
        desk = control.under(DESK)
        number = desk.count("asks/trainer", 1)
        desk.put(f"ask/trainer/{number}", {"place": place, "pattern": pattern})
        return desk.get(f"done/trainer/{number}", timeout_s)
    finally:
        control.close()

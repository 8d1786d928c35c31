"""Many faults, one after the other, on one crew; what serves is compared with the oracle all the time."""

from __future__ import annotations

import contextlib
import errno
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from refit.chaos import model
from refit.chaos.crew import START_S, Crew
from refit.chaos.faults import DRIVER, FULL_DISK, Fault, draw
from refit.chaos.judge import ENDED, Outcome, broken_by, due, ending_of
from refit.chaos.sampler import SAMPLE_S, Sampler, expected_digest
from refit.service.config import ClusterConfig, GenerationConfig, JobConfig, PolicyConfig, RefitConfig
from refit.service.coordinator import Coordinator
from refit.service.record import REFITS_FILE, RunRecord
from refit.service.rounds import settle_s
from refit.service.waiting import collect
from refit.transfer.errors import Failure, RefitFailed, TransportError
from refit.transfer.protocol import AUTO

FULL_CREW_S = 300.0
NUM_TRAINERS = 2
BUCKET_BYTES = 64 * 1024


def config_of(num_replicas: int, timeout_s: float, transport: str = AUTO) -> JobConfig:
    """The job that the service believes to run; `transport` carries bulk."""
    return JobConfig(
        policy=PolicyConfig(pipeline_parallel=NUM_TRAINERS, nccl_xfer_refit=True),
        generation=GenerationConfig(tensor_parallel=1, replicas=num_replicas),
        cluster=ClusterConfig(),
        refit=RefitConfig(
            buffer_bytes=BUCKET_BYTES, timeout_s=timeout_s, force_misc=(model.NORMS,), transport=transport
        ),
    )


class Campaign:
    """One crew under one service; `strike` is one fault and all that follows from it."""

    def __init__(self, crew: Crew, config: JobConfig, run_dir: Path) -> None:
        self._crew = crew
        self._config = config
        self._run_dir = run_dir
        self._record = RunRecord.open(run_dir)
        self._unwritten: list[int] = []
        self._committed: list[int] = []
        self.sampler = Sampler()
        self.version = 0
        self.num_jobs = 0
        self.outcomes: list[Outcome] = []
        self.wrong: list[str] = []
        self._coordinator = self._new_job()
        self._refit()

    @property
    def limit_s(self) -> float:
        """A fault may cost: a round, its trainers' delay and its finish by their deadlines, and each settling."""
        return 4 * self._config.refit.timeout_s + 5 * settle_s(self._config.refit.timeout_s)

    def run(self, num_faults: int, seed: int, on_outcome: Callable[[Outcome], None]) -> None:
        """`num_faults` random faults; `on_outcome` is told of each."""
        rng = random.Random(seed)  # noqa: S311  not for secrets
        for _ in range(num_faults):
            on_outcome(self.strike(draw(rng, NUM_TRAINERS, range(self._config.generation.replicas))))

    def strike(self, fault: Fault) -> Outcome:
        """Arm, refit to the next version, judge what serves, and repair."""
        self.await_everybody()
        self.sampler.take_failures()  # of those who were replaced
        mark = self._run_dir / f"struck-{len(self.outcomes) + 1}"
        before = self._committed[-1]  # a version that was tried and given up never served
        with self._struck_by(fault, mark):
            if fault.phase == "prepare":
                self._coordinator.reopen()
            started_s = time.monotonic()
            ending, detail = self._outcome_of(fault)
            seconds = time.monotonic() - started_s
        answers = self.sampler.look(self._coordinator, self._config.refit.timeout_s)
        served = {who: (v, digest == expected_digest(v)) for who, (v, digest, _) in answers.results.items()}
        outcome = Outcome(
            fault,
            mark.exists(),
            ending,
            seconds,
            detail,
            before,
            self.version,
            self._coordinator.states(),
            served,
            self.sampler.take_failures(),
        )
        self.outcomes.append(outcome)
        self.wrong += [f"{fault}: {words}" for words in broken_by(outcome, self.limit_s)]
        if ending == ENDED:
            self._coordinator.close()
            self._crew.hire_trainers()
            self._coordinator = self._new_job()
        return outcome

    def await_everybody(self) -> None:
        """Let replacements join, so that each fault meets a full crew."""
        deadline_s = time.monotonic() + FULL_CREW_S
        while any(state.startswith("failed") for state in self._coordinator.states().values()):
            if time.monotonic() > deadline_s:
                raise TransportError(f"no full crew after {FULL_CREW_S:.0f} s: {self._coordinator.states()}")
            self._refit()
            time.sleep(SAMPLE_S)

    def process_ids(self) -> dict[str, int]:
        """Of every party of the crew, by name."""
        return collect(self._crew.process_ids(), "look", START_S)

    def close(self) -> None:
        self.sampler.close()
        self._coordinator.close()
        self._record.close()
        written = [json.loads(line) for line in (self._run_dir / REFITS_FILE).read_text().splitlines()]
        found = [refit["version"] for refit in written if refit["committed"]]
        wanted = [version for version in self._committed if version not in self._unwritten]
        if found != wanted:
            self.wrong.append(f"{REFITS_FILE} has versions {found}, committed and not lost are {wanted}")

    def _outcome_of(self, fault: Fault) -> tuple[str, str]:
        """The ending of one refit amid a fault, and what was said of it."""
        try:
            if fault.phase == "generate":
                answers = self.sampler.look(self._coordinator, self._config.refit.timeout_s)
                self._coordinator.leave_out(answers, "generate")
            incidents = self._refit()
        except (RefitFailed, TransportError) as error:
            return ENDED, str(error)
        return ending_of(incidents), "; ".join(incidents)

    @contextlib.contextmanager
    def _struck_by(self, fault: Fault, mark: Path) -> Iterator[None]:
        """Inside, the fault waits for its phase. What is alive afterwards is disarmed."""
        if fault.role != DRIVER:
            self._crew.arm(fault, mark)
            yield
            if due(fault) != ENDED:
                self._crew.disarm(self._config.refit.timeout_s)
            return
        self._crew.fill_disks()
        num_lost, kept = len(self._unwritten), self._run_dir / f"{REFITS_FILE}.kept"
        refits = (self._run_dir / REFITS_FILE).rename(kept).parent / REFITS_FILE
        refits.symlink_to(FULL_DISK)
        yield
        kept.replace(refits)
        if len(self._unwritten) > num_lost:
            mark.touch()

    def _new_job(self) -> Coordinator:
        self.num_jobs += 1
        crew = self._crew
        coordinator = Coordinator.prepare(self._config, crew.trainers, crew.generators, crew)
        self.sampler.watch(coordinator)
        return coordinator

    def _refit(self) -> tuple[str, ...]:
        self.version += 1
        record = self._coordinator.refit(self.version)
        try:
            self._record.add_refit(record, self._coordinator.plan_record)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self._unwritten.append(self.version)
        if not record.committed:
            raise RefitFailed(Failure("refit", "coordinator", record.reason))
        self._committed.append(self.version)
        return record.incidents

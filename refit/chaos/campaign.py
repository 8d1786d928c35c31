"""Many faults, one after the other, on one crew; what serves is compared with the oracle all the time."""

from __future__ import annotations

import collections
import functools
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from refit.chaos import model
from refit.chaos.crew import Crew
from refit.chaos.faults import Fault, draw
from refit.service.config import ClusterConfig, GenerationConfig, JobConfig, PolicyConfig, RefitConfig
from refit.service.coordinator import Coordinator
from refit.service.rounds import settle_s
from refit.service.waiting import Answers, gather
from refit.transfer.errors import Failure, RefitFailed, TransportError

SAMPLE_S = 0.25
FULL_CREW_S = 300.0
NUM_TRAINERS = 2
BUCKET_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one fault led to. `ending` is one of committed, committed after a repeat, committed without it, ended."""

    fault: Fault
    ending: str
    seconds: float
    detail: str
    states: Mapping[str, str]


def config_of(num_replicas: int, timeout_s: float) -> JobConfig:
    """The job that the service believes to run."""
    return JobConfig(
        policy=PolicyConfig(pipeline_parallel=NUM_TRAINERS, nccl_xfer_refit=True),
        generation=GenerationConfig(tensor_parallel=1, replicas=num_replicas),
        cluster=ClusterConfig(),
        refit=RefitConfig(buffer_bytes=BUCKET_BYTES, timeout_s=timeout_s, force_misc=(model.NORMS,)),
    )


class Sampler:
    """A thread that asks all who serve, all the time, and compares version and bytes. `torn` must stay empty."""

    def __init__(self) -> None:
        self.num_samples = 0
        self.torn: list[str] = []
        self._newest: dict[int, int] = {}
        self._stop = threading.Event()
        self._coordinator: Coordinator | None = None
        self._thread = threading.Thread(target=self._run, name="chaos-sampler", daemon=True)
        self._thread.start()

    def watch(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def look(self, coordinator: Coordinator, timeout_s: float) -> Answers:
        """One sample of every replica that serves; judged here, returned for those who care who died."""
        calls = {who: actor.sample.remote() for who, actor in coordinator.serving().items()}
        answers = gather(calls, "generate", timeout_s, settle_s=timeout_s)
        for who, (version, digest, pid) in answers.results.items():
            self.num_samples += 1
            if digest != expected_digest(version):
                self.torn.append(f"{who} says version {version}, its bytes are none of it")
            if version < self._newest.get(pid, 0):
                self.torn.append(f"{who} went from version {self._newest[pid]} back to {version}")
            self._newest[pid] = max(version, self._newest.get(pid, 0))
        return answers

    def close(self) -> None:
        self._stop.set()
        self._thread.join(30.0)

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            if self._coordinator is not None:
                self.look(self._coordinator, 2.0)


@functools.cache
def expected_digest(version: int) -> str:
    return model.digest_at(version)


class Campaign:
    """One crew under one service; `strike` is one fault and all that follows from it."""

    def __init__(self, crew: Crew, config: JobConfig) -> None:
        self._crew = crew
        self._config = config
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
        self._crew.arm(fault)
        if fault.phase == "prepare":
            self._coordinator.reopen()
        started_s = time.monotonic()
        try:
            if fault.phase == "generate":
                answers = self.sampler.look(self._coordinator, self._config.refit.timeout_s)
                self._coordinator.leave_out(answers, "generate")
            incidents = self._refit()
            ending = ending_of(incidents)
            detail = "; ".join(incidents)
        except (RefitFailed, TransportError) as error:
            ending, detail = "ended", str(error)
        outcome = Outcome(fault, ending, time.monotonic() - started_s, detail, self._coordinator.states())
        self.outcomes.append(outcome)
        self._judge(outcome)
        self._crew.disarm(self._coordinator.serving(), self._config.refit.timeout_s)
        if ending == "ended":
            self._coordinator.close()
            self._crew.hire_trainers()
            self._coordinator = self._new_job()
        else:
            trainers = {f"train rank {rank}": actor for rank, actor in enumerate(self._crew.trainers)}
            self._crew.disarm(trainers, self._config.refit.timeout_s)
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
        crew = self._crew
        named = {f"train rank {rank}": actor for rank, actor in enumerate(crew.trainers)}
        named |= {f"generator {number}": actor for number, actor in enumerate(crew.generators)}
        calls = {who: actor.process_id.remote() for who, actor in named.items()}
        return dict(gather(calls, "look", self._config.refit.timeout_s).results)

    def close(self) -> None:
        self.sampler.close()
        self._coordinator.close()

    def _new_job(self) -> Coordinator:
        self.num_jobs += 1
        crew = self._crew
        coordinator = Coordinator.prepare(self._config, crew.trainers, crew.generators, crew)
        self.sampler.watch(coordinator)
        return coordinator

    def _refit(self) -> tuple[str, ...]:
        self.version += 1
        record = self._coordinator.refit(self.version)
        if not record.committed:
            raise RefitFailed(Failure("refit", "coordinator", record.reason))
        return record.incidents

    def _judge(self, outcome: Outcome) -> None:
        """Note whatever breaks an invariant. `wrong` must stay empty."""
        answers = self.sampler.look(self._coordinator, self._config.refit.timeout_s)
        if outcome.ending != "ended":
            behind = {who: one[0] for who, one in answers.results.items() if one[0] != self.version}
            if behind or not answers.results:
                self.wrong.append(
                    f"{outcome.fault}: version {self.version} was committed, but {behind} serve"
                )
        elif outcome.fault.role != "trainer":
            self.wrong.append(f"{outcome.fault}: no trainer was lost, but it ended: {outcome.detail}")
        if outcome.seconds > self.limit_s:
            self.wrong.append(f"{outcome.fault}: took {outcome.seconds:.1f} s of {self.limit_s:.1f} s")


def ending_of(incidents: Sequence[str]) -> str:
    if any(incident.startswith("left out") for incident in incidents):
        return "committed without it"
    return "committed after a repeat" if incidents else "committed"


def table_of(outcomes: Sequence[Outcome]) -> list[tuple[str, str, int, str, str]]:
    """Rows of (role, kind, faults, endings, longest seconds)."""
    groups: dict[tuple[str, str], list[Outcome]] = collections.defaultdict(list)
    for outcome in outcomes:
        groups[outcome.fault.role, outcome.fault.kind].append(outcome)
    return [
        (
            role,
            kind,
            len(found),
            ", ".join(f"{number} {ending}" for ending, number in _count(found)),
            f"{max(outcome.seconds for outcome in found):.1f}",
        )
        for (role, kind), found in sorted(groups.items())
    ]


def _count(outcomes: Sequence[Outcome]) -> list[tuple[str, int]]:
    return collections.Counter(outcome.ending for outcome in outcomes).most_common()

"""Who serves what, asked all the time: the version that each replica names, and whether its bytes are that version."""

from __future__ import annotations

import functools
import threading

from refit.chaos import model
from refit.service.coordinator import Coordinator
from refit.service.waiting import Answers, gather

SAMPLE_S = 0.25
ANSWER_S = 2.0


class Sampler:
    """A thread that asks all who serve. `torn` must stay empty; `take_failures` says who could not answer and why."""

    def __init__(self) -> None:
        self.num_samples = 0
        self.torn: list[str] = []
        self._failures: list[tuple[str, str]] = []
        self._newest: dict[int, int] = {}
        self._stop = threading.Event()
        self._coordinator: Coordinator | None = None
        self._looking = threading.Lock()  # of two looks at once the older could be judged last
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="chaos-sampler", daemon=True)
        self._thread.start()

    def watch(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def look(self, coordinator: Coordinator, timeout_s: float) -> Answers:
        """One sample of every replica that serves; judged here, returned for those who care who died."""
        with self._looking:
            calls = {who: actor.sample.remote() for who, actor in coordinator.serving().items()}
            answers = gather(calls, "generate", timeout_s, settle_s=timeout_s)
            for who, (version, digest, pid) in answers.results.items():
                self._judge(who, version, digest, pid)
            failures = [(who, failure.message) for who, (_, failure) in answers.failures.items()]
        with self._lock:
            self._failures += failures
        return answers

    def take_failures(self) -> tuple[tuple[str, str], ...]:
        """(who, why) of every sample that failed since this was last asked."""
        with self._lock:
            taken, self._failures = tuple(self._failures), []
        return taken

    def close(self) -> None:
        self._stop.set()
        self._thread.join(30.0)

    def _judge(self, who: str, version: int, digest: str, pid: int) -> None:
        self.num_samples += 1
        if digest != expected_digest(version):
            self.torn.append(f"{who} says version {version}, its bytes are none of it")
        if version < self._newest.get(pid, 0):
            self.torn.append(f"{who} went from version {self._newest[pid]} back to {version}")
        self._newest[pid] = max(version, self._newest.get(pid, 0))

    def _run(self) -> None:
        try:
            while not self._stop.wait(SAMPLE_S):
                if self._coordinator is not None:
                    self.look(self._coordinator, ANSWER_S)
        except Exception as error:
            self.torn.append(f"nobody looks any more: {type(error).__name__}: {error}")


@functools.cache
def expected_digest(version: int) -> str:
    """The digest of a replica that serves `version`, from the oracle."""
    return model.digest_at(version)

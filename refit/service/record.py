"""What a run leaves behind: one JSON line per step and per refit, each plan by link, TensorBoard scalars, and the
summary that ends standard output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from refit.service.refit_record import PlanRecord, RefitRecord

REWARD_WINDOW_STEPS = 5
STEPS_FILE = "steps.jsonl"
SUMMARY_FILE = "summary.json"
REFITS_FILE = "refits.jsonl"
PLANS_FOLDER = "plans"
CURVES_FOLDER = "tensorboard"


@dataclass(frozen=True, slots=True)
class TrainRecord:
    """What the optimizer step returned."""

    loss: float
    kl_to_reference: float
    grad_norm: float
    clip_fraction: float
    lr: float


@dataclass(frozen=True, slots=True)
class RefitStepRecord:
    """What a step says of its refit: the numbers of its RefitRecord that are worth a curve, and the audit if any."""

    version: int
    total_s: float
    seconds: Mapping[str, float]
    bulk_bytes: int
    misc_bytes: int
    bulk_share: float
    verified: bool | None
    wire_bytes: int = 0
    bound_ratio: float = 1.0
    peak_extra_bytes: int = 0
    staged_bytes: int = 0
    straggler: str = ""
    straggler_s: float = 0.0
    digests_compared: int = 0
    line_share: float | None = None
    delta_share: float | None = None

    @classmethod
    def of(cls, refit: RefitRecord, verified: bool | None) -> RefitStepRecord:
        """The short form of `refit`."""
        names = {key.name for key in dataclasses.fields(cls)} - {"verified"}
        return cls(verified=verified, **{name: getattr(refit, name) for name in names})


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step. `weight_version` sampled the rollout, so reward and generation KL judge the refit that brought it.

    It is the oldest one of the rollout, `staleness` versions behind the policy that trained on it; `mixed_samples` says
    how many samples have tokens of several versions.

    The last record of a run has `train` and `refit` None: a rollout that judges the last refit.
    """

    step: int
    weight_version: int
    reward: float
    reward_stdev: float
    solved_share: float
    response_tokens: int
    gen_kl: float
    gen_kl_token_max: float
    gen_logprob_gap_mean: float
    gen_logprob_gap_max: float
    seconds: Mapping[str, float] = field(default_factory=dict)
    train: TrainRecord | None = None
    refit: RefitStepRecord | None = None
    staleness: int = 0
    mixed_samples: int = 0


class Metrics(Protocol):
    """Who else wants to hear of every record; `refit.service.metrics.JobMetrics` is one."""

    def add_refit(self, refit: RefitRecord) -> None: ...

    def add_step(self, step: StepRecord) -> None: ...


class RunRecord:
    """The files of one run folder; `steps` are the records so far."""

    def __init__(self, run_dir: Path, writer: Any, metrics: Metrics | None) -> None:
        self.run_dir = run_dir
        self.steps: list[StepRecord] = []
        self._writer = writer
        self._metrics = metrics

    @classmethod
    def open(cls, run_dir: Path, metrics: Metrics | None = None) -> RunRecord:
        """Start empty files in `run_dir`, which is made if need be. `metrics` hears of every record too.

        What an earlier run has left of these files goes: its summary and curves would pass for those of this run.
        """
        from torch.utils.tensorboard import SummaryWriter

        run_dir.mkdir(parents=True, exist_ok=True)
        for stale in (run_dir / SUMMARY_FILE, *(run_dir / CURVES_FOLDER).glob("events.out.tfevents.*")):
            stale.unlink(missing_ok=True)
        for name in (STEPS_FILE, REFITS_FILE):
            (run_dir / name).write_text("")
        return cls(run_dir, SummaryWriter(str(run_dir / CURVES_FOLDER)), metrics)  # type: ignore[no-untyped-call]

    def add(self, record: StepRecord) -> None:
        """Append one step to the file, on disk before this returns, and to TensorBoard. OSError if it is full."""
        self.steps.append(record)
        if self._metrics is not None:
            self._metrics.add_step(record)
        _append(self.run_dir / STEPS_FILE, dataclasses.asdict(record))
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.step)
        self._writer.flush()

    def add_refit(self, refit: RefitRecord, plan: PlanRecord) -> None:
        """Append one refit, committed or not, with its plan if that is a new one; on disk before this returns.

        Raises OSError on a full disk.
        """
        if self._metrics is not None:
            self._metrics.add_refit(refit)
        plan_file = self.run_dir / PLANS_FOLDER / f"{plan.digest}.json"
        if not plan_file.exists():
            plan_file.parent.mkdir(exist_ok=True)
            try:
                _append(plan_file, dataclasses.asdict(plan))
            except OSError:
                plan_file.unlink(missing_ok=True)  # an empty one would pass for written
                raise
        _append(self.run_dir / REFITS_FILE, dataclasses.asdict(refit))

    def finish(self, summary: Mapping[str, Any]) -> None:
        (self.run_dir / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
        self.close()

    def close(self) -> None:
        self._writer.close()


def _append(path: Path, document: Mapping[str, Any]) -> None:
    """Append one line of JSON, or nothing: half a line, as a full disk leaves it, would spoil the next one too."""
    left = (json.dumps(document) + "\n").encode()
    with path.open("ab", buffering=0) as stream:
        start = stream.tell()
        try:
            while left:
                left = left[stream.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):  # a device, or a disk that is gone, has nothing to take back
                stream.truncate(start)
            raise


def scalars(record: StepRecord) -> dict[str, float]:
    """Every number of a record under a TensorBoard name: "reward", "gen_kl", "train/loss", "refit/seconds/wire", ..."""
    found: dict[str, float] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{prefix}/{key}" if prefix else str(key), inner)
        elif isinstance(value, int | float) and prefix != "step":
            found[prefix] = float(value)  # words, such as the straggler's name, have no curve

    walk("", dataclasses.asdict(record))
    return found


def reward_noise(rewards: Sequence[float]) -> float:
    """The run's own noise: standard deviation of the reward around its trend.

    Half the mean squared difference of neighbouring steps, square root (von Neumann et al. 1941): a slow trend
    cancels in neighbours, noise does not. 0 with fewer than two steps.
    """
    pairs = list(itertools.pairwise(rewards))
    if not pairs:
        return 0.0
    return math.sqrt(statistics.fmean((later - earlier) ** 2 for earlier, later in pairs) / 2.0)


def summarize(steps: Sequence[StepRecord]) -> dict[str, Any]:
    """The numbers that sum a run up. Raises ValueError for a run without a step.

    `reward_first` and `reward_last` are means over REWARD_WINDOW_STEPS steps (fewer in a short run);
    `reward_margin` is their difference in units of `reward_noise`.
    """
    if not steps:
        raise ValueError("a run without a step has nothing to sum up")
    rewards = [record.reward for record in steps]
    window = max(1, min(REWARD_WINDOW_STEPS, len(rewards) // 2))
    first, last = statistics.fmean(rewards[:window]), statistics.fmean(rewards[-window:])
    noise = reward_noise(rewards)
    refits = [record.refit for record in steps if record.refit is not None]
    return {
        "steps": sum(record.train is not None for record in steps),
        "reward_first": round(first, 6),
        "reward_last": round(last, 6),
        "reward_noise": round(noise, 6),
        "reward_margin": round((last - first) / noise, 2) if noise > 0 else None,
        "reward_window_steps": window,
        "solved_share_last": round(statistics.fmean(r.solved_share for r in steps[-window:]), 6),
        "gen_kl_max": max(record.gen_kl for record in steps),
        "gen_kl_token_max": max(record.gen_kl_token_max for record in steps),
        "gen_logprob_gap_max": max(record.gen_logprob_gap_max for record in steps),
        **_summarize_refits(refits),
        "weight_version": steps[-1].weight_version,
    }


def _summarize_refits(refits: Sequence[RefitStepRecord]) -> dict[str, Any]:
    if not refits:
        return {"refit_s_p50": None, "bulk_bytes": 0, "misc_bytes": 0, "bulk_share": None, "audits": 0}
    phases = sorted({phase for refit in refits for phase in refit.seconds})
    return {
        "refit_s_p50": statistics.median(refit.total_s for refit in refits),
        "refit_s_by_phase_p50": {
            phase: statistics.median(refit.seconds[phase] for refit in refits if phase in refit.seconds)
            for phase in phases
        },
        "bulk_bytes": refits[-1].bulk_bytes,
        "misc_bytes": refits[-1].misc_bytes,
        "bulk_share": refits[-1].bulk_share,
        "audits": sum(refit.verified is not None for refit in refits),
    }

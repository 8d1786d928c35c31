"""One job from a checked configuration to its summary: gate, model, actors, prepare, loop, and a clean end."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from refit.plan.errors import ConfigError
from refit.service.access import FILE, JobAddress
from refit.service.checkpoint import way_out
from refit.service.cluster import ENVIRONMENT, Cluster
from refit.service.config import JobConfig
from refit.service.coordinator import Coordinator
from refit.service.gate.check import check, inspect_machine, read_model_config
from refit.service.grpo.loop import GrpoLoop
from refit.service.grpo.sampling import Sampler
from refit.service.grpo.tasks import Task, open_codec
from refit.service.metrics import JobMetrics, metrics_address
from refit.service.progress import JobProgress
from refit.service.record import RunRecord, StepRecord, summarize
from refit.service.refit_record import misc_by_reason
from refit.service.trainer_weights import TrainerDesk
from refit.train_side.tiny_models import TINY_MODELS, make_tiny_model
from refit.transfer.errors import Failure, RefitFailed, TransportError
from refit.transfer.precision.checkpoint import QUANTIZATIONS, quantize_checkpoint

CONFIG_FILE = "config.json"
MAX_REASONS = 5  # in the log; all of them are in plans/<digest>.json
ENGINES_FILE = "engines.json"
NO_METRICS = (
    "not exported, since a client of a cluster belongs to no node of it; the run folder has all numbers"
)


def run_job(config: JobConfig, command: tuple[str, ...], stream: TextIO) -> dict[str, Any]:
    """Run the whole job and return its summary. Raises ConfigError before anything is started or written.

    Progress goes to `stream`, files into `config.run_dir`. Whatever happens, no process of the job is left.
    """
    started_s = time.monotonic()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    model_config = read_model_config(config.policy.model)
    check(config, model_config, inspect_machine(config))
    assert model_config is not None, "the gate lets no job pass without a model"
    with own_run_dir(config, command) as run_dir:
        summary, record = _run_in(run_dir, config, model_config, stream)
        summary["wall_s"] = round(time.monotonic() - started_s, 1)
        try:
            record.finish(summary)
        except OSError as error:
            print(f"refit: the summary could not be written: {error}", file=stream)
    return summary


def _run_in(
    run_dir: Path, config: JobConfig, model_config: Mapping[str, Any], stream: TextIO
) -> tuple[dict[str, Any], RunRecord]:
    """The job itself: its summary but for the time that it took, and the open record of it."""
    with JobProgress.open(stream) as progress, ThreadPoolExecutor(1) as background:
        progress.say(_headline(config, run_dir))
        task = background.submit(Task.open, config.grpo.task, config.grpo.task_seed)
        model_dir = _model_dir(config, run_dir)
        codec = open_codec(model_dir, model_config)
        with running_job(config, model_dir, run_dir, progress) as (cluster, coordinator):
            engines = _record_engines(cluster, run_dir, progress)
            record = RunRecord.open(run_dir, JobMetrics())
            progress.say(f"metrics: {metrics_address() or NO_METRICS}")
            loop = GrpoLoop(
                config,
                cluster.named_trainers(),
                coordinator,
                task.result(),
                codec,
                Sampler(config, coordinator, task.result(), codec),
                record,
                progress.say,
            )
            with progress.stepping(config.grpo.steps) as on_step:
                on_step = _taking_diffs(on_step, config, cluster, coordinator)
                steps = _run_to_the_end(loop, on_step, run_dir)
    return _summary(config, steps, coordinator, run_dir) | {"engines": engines}, record


@contextlib.contextmanager
def running_job(
    config: JobConfig, model_dir: Path, run_dir: Path, progress: JobProgress
) -> Iterator[tuple[Cluster, Coordinator]]:
    """Actors built and prepared for refits; on the way out, whatever the reason, all of it is gone."""
    cluster = None
    coordinator = None
    try:
        with progress.waiting("start Ray", 1):
            cluster = Cluster.open(config, run_dir / "logs")
        if config.cluster.address is not None:
            progress.say(_places(cluster.nodes))
        num_actors = len(cluster.named_actors())
        with progress.waiting("build trainers and engines", num_actors) as tick:
            engine_dir = _engine_dir(config, model_dir, run_dir)
            limit_s = config.cluster.build_timeout_s
            built = cluster.build(str(model_dir), limit_s, tick, str(engine_dir))
        progress.say("built: " + ", ".join(f"{who} {seconds:.1f} s" for who, seconds in built.items()))
        with progress.waiting("prepare the refit", num_actors):
            coordinator = Coordinator.prepare(config, cluster.trainers, cluster.generators, cluster)
        plan, workers = coordinator.plan, config.generation.workers_per_replica
        progress.say(
            f"plan {plan.digest[:12]}: bulk {plan.bulk_bytes} bytes, misc {plan.misc_bytes} bytes, "
            f"{plan.num_train} trainer ranks to {plan.num_gen} generator ranks"
        )
        for reason, number, name in misc_by_reason(plan)[:MAX_REASONS]:
            progress.say(f"misc, {number} tensors such as {name}: {reason}")
        control = coordinator.reader().control
        store = f"{control.address}:{control.port}"
        JobAddress(store, plan.num_gen // workers, workers).write(run_dir)
        yield cluster, coordinator
    finally:
        with _undisturbed():
            (run_dir / FILE).unlink(missing_ok=True)
            if coordinator is not None:
                coordinator.close()
            if cluster is not None:
                cluster.close()


def _places(nodes: Mapping[str, str]) -> str:
    """For example "placed: train rank 0, train rank 1 on n1; generator 0 on n2"."""
    hosts = dict.fromkeys(nodes.values())
    by_host = {host: [who for who, node in nodes.items() if node == host] for host in hosts}
    return "placed: " + "; ".join(f"{', '.join(names)} on {host}" for host, names in by_host.items())


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM for the few seconds that ending everything takes."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


@contextlib.contextmanager
def own_run_dir(config: JobConfig, command: tuple[str, ...]) -> Iterator[Path]:
    """The run folder with config.json in it, made if need be, and inside no other job's.

    Raises ConfigError when it cannot be written, or when a job that runs has it: two would write the same files. The
    lock is the system's, on config.json, and goes with the process that has it.
    """
    run_dir = Path(config.run_dir).resolve()
    document = {"command": list(command), "config": dataclasses.asdict(config)}
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / CONFIG_FILE).open("a")
    except OSError as error:
        raise ConfigError(_no_run_dir(config, error)) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            problem = f"run_dir = {config.run_dir!r}: a job that still runs writes its files there"
            raise ConfigError(f"{problem}. Name another folder, or wait for its end") from error
        except OSError:
            pass  # a file system without locks: two jobs in one folder are not found out there
        try:
            file.truncate(0)
            file.write(json.dumps(document, indent=2) + "\n")
            file.flush()
        except OSError as error:
            raise ConfigError(_no_run_dir(config, error)) from error
        yield run_dir


def _no_run_dir(config: JobConfig, error: OSError) -> str:
    return f"run_dir = {config.run_dir!r} cannot be written: {error}. Name another folder"


def _model_dir(config: JobConfig, run_dir: Path) -> Path:
    """The checkpoint both sides start from; a tiny model is made here, from its seed."""
    if config.policy.model not in TINY_MODELS:
        return Path(config.policy.model).resolve()
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[config.policy.precision]
    return make_tiny_model(config.policy.model, run_dir / "model", seed=config.policy.seed, dtype=dtype)


def _engine_dir(config: JobConfig, model_dir: Path, run_dir: Path) -> Path:
    """The checkpoint as engines of `generation.precision` store it; a quantized one is made here."""
    if config.generation.precision not in QUANTIZATIONS:
        return model_dir
    return quantize_checkpoint(model_dir, run_dir / "engine-model", config.generation.precision)


def _record_engines(cluster: Cluster, run_dir: Path, progress: JobProgress) -> dict[str, dict[str, Any]]:
    """What the engines made of their configuration, by name; a switch that vLLM turned off is off here."""
    engines = cluster.describe_engines()
    (run_dir / ENGINES_FILE).write_text(json.dumps(engines, indent=2) + "\n")
    for name, live in engines.items():
        sequence = "on" if live["sequence_parallel"] else f"off, {live['sequence_off']}"
        progress.say(f"{name}: layers by stage {live['stages']}, sequence parallel {sequence}")
    return engines


def _taking_diffs(
    on_step: Callable[[StepRecord], None], config: JobConfig, cluster: Cluster, coordinator: Coordinator
) -> Callable[[StepRecord], None]:
    """Between two steps, when no trainer is at work, diffs against the trainers are made for who has asked."""
    desk = TrainerDesk(coordinator.reader().control, cluster.named_trainers(), config.refit.timeout_s)

    def stepped(step: StepRecord) -> None:
        on_step(step)
        desk.serve(coordinator.plan, config.generation.workers_per_replica)

    return stepped


def _run_to_the_end(
    loop: GrpoLoop, on_step: Callable[[StepRecord], None], run_dir: Path
) -> tuple[StepRecord, ...]:
    """All steps and the last checkpoint. A failure is raised with what is left to go on from."""
    try:
        steps = loop.run(on_step)
        if loop.config.grpo.save_checkpoint:
            loop.checkpoint(loop.config.grpo.steps)
    except (RefitFailed, TransportError) as error:
        failure = (
            error.failure if isinstance(error, RefitFailed) else Failure("job", "coordinator", str(error))
        )
        message = f"{failure.message}; {way_out(run_dir, (run_dir / CONFIG_FILE).stat().st_mtime)}"
        raise RefitFailed(Failure(failure.phase, failure.who, message)) from error
    return steps


def _headline(config: JobConfig, run_dir: Path) -> str:
    policy, generation = config.policy, config.generation
    return (
        f"{policy.model}: trainers TP{policy.tensor_parallel} PP{policy.pipeline_parallel} "
        f"EP{policy.expert_parallel} DP{policy.data_parallel} -> {generation.replicas} x engine "
        f"TP{generation.tensor_parallel} PP{generation.pipeline_parallel}, {config.path} refit over "
        f"{config.refit.backend}; task {config.grpo.task}, {config.grpo.steps} steps; files in {run_dir}"
    )


def _summary(
    config: JobConfig, steps: tuple[StepRecord, ...], coordinator: Coordinator, run_dir: Path
) -> dict[str, Any]:
    return {
        "path": config.path,
        **summarize(steps),
        "seed": config.policy.seed,
        "task": config.grpo.task,
        "plan": coordinator.plan.digest,
        "run_dir": str(run_dir),
        "python": platform.python_version(),
    }

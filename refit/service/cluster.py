"""Ray's life in a job: opened once, actors placed, everything ended on the way out whatever happened.

The local Ray listens on loopback only, has no dashboard and writes nothing to this terminal. `close` leaves no
process behind: it kills the actors, ends Ray, and then ends by id what is still alive of the processes this job
started (vLLM's workers are children of an actor and outlive its kill for a moment).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import ray

from refit.service.actors import GenActor, TrainActor
from refit.service.config import JobConfig
from refit.service.waiting import collect
from refit.train_side.options import TrainOptions, TrainParallel
from refit.transfer.errors import TransportError

OBJECT_STORE_BYTES = 256 * 2**20
START_TIMEOUT_S = 300.0
SHARED_MEMORY = "/dev/shm/"  # noqa: S108  not a temporary file of ours
START_ATTEMPTS = 2
CLOSE_S = 8.0
LEAVE_S = 10.0
MAX_SEQUENCES = 256  # an engine samples up to this many answers at once
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
}

type Waiting = Callable[[tuple[str, ...]], None]


class Cluster:
    """The actors of one job on one Ray."""

    def __init__(self, config: JobConfig, log_folder: Path) -> None:
        self._config = config
        self._log_folder = log_folder
        self._ray_processes: list[psutil.Process] = []
        self._seen: dict[tuple[int, float], psutil.Process] = {}
        self._segments: set[Path] = set()
        self.trainers: tuple[Any, ...] = ()
        self.generators: tuple[Any, ...] = ()

    @classmethod
    def open(cls, config: JobConfig, log_folder: Path) -> Cluster:
        """Start a local Ray, or connect to `cluster.address`, and create all actors (cheap; they are not built)."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        cluster = cls(config, log_folder)
        try:
            cluster._ray_processes = _start_ray(config)
            cluster.trainers = tuple(
                cluster._actor(TrainActor, rank, f"train-{rank}", 1)
                for rank in range(config.policy.world_size)
            )
            cluster.generators = tuple(
                cluster._actor(GenActor, replica, f"gen-{replica}", config.generation.workers_per_replica)
                for replica in range(config.generation.replicas)
            )
            collect(
                {name: actor.who.remote() for name, actor in cluster.named_actors().items()},
                "start actors",
                START_TIMEOUT_S,
            )
        except BaseException:
            cluster.close()
            raise
        return cluster

    def named_actors(self) -> dict[str, Any]:
        """Every actor by the name that messages use: "train rank 0", ..., "generator 0", ..."""
        return self.named_trainers() | self.named_generators()

    def named_trainers(self) -> dict[str, Any]:
        return {f"train rank {rank}": actor for rank, actor in enumerate(self.trainers)}

    def named_generators(self) -> dict[str, Any]:
        return {f"generator {replica}": actor for replica, actor in enumerate(self.generators)}

    def build(self, model_dir: str, timeout_s: float, on_tick: Waiting | None = None) -> dict[str, float]:
        """Build policy and engines at the same time. Returns the seconds each actor took, by name."""
        meeting = collect({"train rank 0": self.trainers[0].meeting_point.remote()}, "build", START_TIMEOUT_S)
        parallel, options = train_parallel(self._config), train_options(self._config)
        pending = {
            f"train rank {rank}": actor.build.remote(
                model_dir, parallel, options, meeting["train rank 0"], timeout_s
            )
            for rank, actor in enumerate(self.trainers)
        }
        gen_parallel_, gen_options_ = gen_parallel(self._config), gen_options(self._config)
        pending |= {
            f"generator {replica}": actor.build.remote(model_dir, gen_parallel_, gen_options_, timeout_s)
            for replica, actor in enumerate(self.generators)
        }
        built = collect(pending, "build", timeout_s, on_tick)
        self.remember_processes()
        return {who: answer["seconds"] for who, answer in built.items()}

    def remember_processes(self) -> None:
        """Note every process of our Ray, so that `close` finds those that lose their parent meanwhile.

        Also the shared memory they map: vLLM's workers leave 16 MiB of it behind when they are ended.
        """
        for root in self._ray_processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in (root, *root.children(recursive=True)):
                    self._seen[process.pid, process.create_time()] = process
                    self._segments |= shared_memory_of(process.pid)

    def close(self) -> None:
        """End actors and Ray, and wait until none of the processes of this job is left. Idempotent.

        Actors get CLOSE_S to leave groups and engines in order; one that hangs is killed then.
        """
        self.remember_processes()
        self._ask_to_close()
        for actor in self.trainers + self.generators:
            with contextlib.suppress(Exception):  # it may be dead already, which is what is wanted
                ray.kill(actor)
        self.trainers = self.generators = ()
        if ray.is_initialized():
            ray.shutdown()
        end_processes(list(self._seen.values()), LEAVE_S)
        for segment in self._segments:
            segment.unlink(missing_ok=True)
        self._seen.clear()
        self._segments.clear()

    def _ask_to_close(self) -> None:
        if not ray.is_initialized():
            return
        with contextlib.suppress(
            Exception
        ):  # one that is dead or stuck is killed next, which is what is wanted
            closing = [actor.close.remote() for actor in self.trainers + self.generators]
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=CLOSE_S)

    def _actor(self, kind: type[Any], number: int, name: str, num_devices: int) -> Any:
        local = self._config.cluster.address is None
        on_gpu = self._config.refit.backend == "nccl"
        return (
            ray.remote(kind)
            .options(
                num_cpus=0 if local else num_devices,
                num_gpus=num_devices if on_gpu else 0,
                max_restarts=0,
                max_task_retries=0,
            )
            .remote(number, str(self._log_folder / f"{name}.log"))
        )


def shared_memory_of(pid: int) -> set[Path]:
    """The named shared memory segments that a process maps; empty where there is no /proc, or no such process."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    names = {line.partition(SHARED_MEMORY)[2] for line in lines if SHARED_MEMORY in line}
    return {Path(SHARED_MEMORY) / name for name in names if not name.endswith(" (deleted)")}


def end_processes(processes: list[psutil.Process], patience_s: float) -> None:
    """Wait for processes to leave; ask, then force, those still there after half and all of `patience_s`."""
    deadline_s = time.monotonic() + patience_s
    alive = psutil.wait_procs(processes, timeout=patience_s / 2)[1]
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    alive = psutil.wait_procs(alive, timeout=max(0.0, deadline_s - time.monotonic()))[1]
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=patience_s / 2)


def _start_ray(config: JobConfig) -> list[psutil.Process]:
    """Start or join Ray; returns the processes that this started. Raises TransportError if Ray does not come up.

    Ray gives its own start 30 s, which a busy machine may miss: START_ATTEMPTS.
    """
    others = set(psutil.Process().children())
    where = config.cluster.address or "on this machine"
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with _own_signals():
                _init_ray(config)
        except Exception as error:  # Ray raises bare Exceptions here
            ray.shutdown()
            end_processes([child for child in psutil.Process().children() if child not in others], LEAVE_S)
            if attempt == START_ATTEMPTS:
                raise TransportError(
                    f"Ray did not start or answer ({where}), {attempt} times: {error}; see cluster.address"
                ) from error
        else:
            break
    return [child for child in psutil.Process().children() if child not in others]


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's answer to SIGTERM: Ray installs one that dies on the spot, without ending anything."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


def _init_ray(config: JobConfig) -> None:
    if config.cluster.address is not None:
        ray.init(
            address=config.cluster.address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": ENVIRONMENT},  # a local Ray inherits them
        )
        return
    ray.init(
        address="local",
        num_cpus=config.cluster.num_cpus or None,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )


def train_parallel(config: JobConfig) -> TrainParallel:
    policy = config.policy
    return TrainParallel(
        tensor=policy.tensor_parallel,
        pipeline=policy.pipeline_parallel,
        expert=policy.expert_parallel,
        data=policy.data_parallel,
    )


def train_options(config: JobConfig) -> TrainOptions:
    policy = config.policy
    return TrainOptions(
        lr=policy.lr,
        clip_ratio=policy.clip_ratio,
        kl_coef=policy.kl_coef,
        precision=policy.precision,  # type: ignore[arg-type]  # the gate has checked it
        seed=policy.seed,
        num_microbatches=policy.num_microbatches,
    )


def gen_parallel(config: JobConfig) -> dict[str, Any]:
    """The fields of GenParallel, as plain values: importing that class would import vLLM into this process."""
    generation = config.generation
    return {
        "tensor": generation.tensor_parallel,
        "pipeline": generation.pipeline_parallel,
        "expert": generation.expert_parallel > 1,
    }


def gen_options(config: JobConfig) -> dict[str, Any]:
    """The fields of GenOptions that a job sets; the rest are its defaults."""
    return {
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[config.generation.precision],
        "seed": config.policy.seed,
        "max_model_len": config.generation.max_model_len,
        "max_num_seqs": MAX_SEQUENCES,
    }

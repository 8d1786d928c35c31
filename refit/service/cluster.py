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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import ray
from ray._private import ray_constants

from refit.service.actors import GenActor, TrainActor
from refit.service.build_options import gen_options, gen_parallel, train_options, train_parallel
from refit.service.config import JobConfig
from refit.service.placement import Places
from refit.service.processes import end_processes
from refit.service.roster import Replacement
from refit.service.waiting import FIXED_BOUND, Waiting, collect
from refit.transfer.errors import TransportError
from refit.transfer.segments import remove_unmapped, shared_memory_of

OBJECT_STORE_BYTES = 256 * 2**20
START_TIMEOUT_S = 300.0
BUILD_BOUND = "cluster.build_timeout_s bounds this wait"
START_ATTEMPTS = 2
CLOSE_S = 8.0
LEAVE_S = 10.0
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
}


class Cluster:
    """The actors of one job on one Ray."""

    def __init__(self, config: JobConfig, log_folder: Path) -> None:
        self._config = config
        self._log_folder = log_folder
        self._ray_processes: list[psutil.Process] = []
        self._seen: dict[tuple[int, float], psutil.Process] = {}
        self._segments: set[Path] = set()
        self._pids: dict[int, Any] = {}
        self._coming_pids: dict[int, Any] = {}
        self._below: dict[int, set[psutil.Process]] = {}
        self._restarts_left: dict[int, int] = {}
        self._engine_dir = ""
        self._build_timeout_s = 0.0
        self._places: Places | None = None
        self.trainers: tuple[Any, ...] = ()
        self.generators: tuple[Any, ...] = ()
        self.nodes: dict[str, str] = {}  # host name by actor, as placed at first

    @classmethod
    def open(cls, config: JobConfig, log_folder: Path) -> Cluster:
        """Start a local Ray, or connect to `cluster.address`, and create all actors (cheap; they are not built)."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        cluster = cls(config, log_folder)
        cluster._ray_processes = start_ray(config)
        try:
            cluster._places = Places.open(config, START_TIMEOUT_S)
            cluster.trainers = tuple(
                cluster._actor(TrainActor, rank, f"train-{rank}") for rank in range(config.policy.world_size)
            )
            cluster.generators = tuple(
                cluster._actor(GenActor, replica, f"gen-{replica}")
                for replica in range(config.generation.replicas)
            )
            where = {name: actor.node.remote() for name, actor in cluster.named_actors().items()}
            cluster.nodes = dict(collect(where, "start actors", START_TIMEOUT_S, bound=FIXED_BOUND))
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

    def build(
        self, model_dir: str, timeout_s: float, on_tick: Waiting | None = None, engine_dir: str | None = None
    ) -> dict[str, float]:
        """Build policy and engines at the same time. Returns the seconds each actor took, by name.

        `engine_dir` is the same checkpoint as the engines store it; None: as the trainers do.
        """
        engine_dir = model_dir if engine_dir is None else engine_dir
        asked = {"train rank 0": self.trainers[0].meeting_point.remote()}
        meeting = collect(asked, "build", START_TIMEOUT_S, bound=FIXED_BOUND)
        parallel, options = train_parallel(self._config), train_options(self._config)
        pending = {
            f"train rank {rank}": actor.build.remote(
                model_dir, parallel, options, meeting["train rank 0"], timeout_s, engine_dir
            )
            for rank, actor in enumerate(self.trainers)
        }
        self._engine_dir, self._build_timeout_s = engine_dir, timeout_s
        pending |= {
            f"generator {replica}": self._build_generator(actor)
            for replica, actor in enumerate(self.generators)
        }
        built = collect(pending, "build", timeout_s, on_tick, BUILD_BOUND)
        who = {name: actor.process_id.remote() for name, actor in self.named_generators().items()}
        self._pids = dict(enumerate(collect(who, "build", START_TIMEOUT_S, bound=FIXED_BOUND).values()))
        self.remember_processes()
        return {who: answer["seconds"] for who, answer in built.items()}

    def describe_engines(self) -> dict[str, dict[str, Any]]:
        """What each engine really runs, by name; the fields of EngineDescription."""
        calls = {name: actor.describe.remote() for name, actor in self.named_generators().items()}
        return collect(calls, "describe", START_TIMEOUT_S, bound=FIXED_BOUND)

    def remember_processes(self) -> None:
        """Note every process of our Ray, so that `close` finds those that lose their parent meanwhile.

        Also the shared memory they map: vLLM's processes leave it behind when they are ended.
        """
        for root in self._ray_processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in (root, *root.children(recursive=True)):
                    self._seen[process.pid, process.create_time()] = process
                    self._segments |= shared_memory_of(process.pid)
        for replica, reference in [*self._coming_pids.items()]:
            if ray.is_initialized() and ray.wait([reference], timeout=0)[0]:
                del self._coming_pids[replica]
                with contextlib.suppress(ray.exceptions.RayError):  # it died before it could say
                    self._pids[replica] = ray.get(reference)
        mine = {process.pid: process for process in self._seen.values()}
        for replica, pid in self._pids.items():
            root = mine.get(pid)
            if root is not None and root.is_running():
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._below[replica] = {root, *root.children(recursive=True)}

    def end_generator(self, replica: int) -> None:
        """End a generator and, where it runs on this machine, every process below it, stopped ones too.

        What shared memory they leave is removed: all that was noted and that nobody maps any more.
        """
        self.remember_processes()
        with contextlib.suppress(Exception):  # it may be dead already, which is what is wanted
            ray.kill(self.generators[replica])
        below = list(self._below.pop(replica, ()))
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(below, timeout=LEAVE_S)
        remove_unmapped(self._segments)

    def restart_generator(self, replica: int) -> Replacement | None:
        """Begin to build a new engine in a replica's place; None when `cluster.restart_generators` are used up."""
        left = self._restarts_left.get(replica, self._config.cluster.restart_generators)
        if left == 0:
            return None
        self._restarts_left[replica] = left - 1
        actor = self._actor(GenActor, replica, f"gen-{replica}")
        self.generators = (*self.generators[:replica], actor, *self.generators[replica + 1 :])
        self._pids.pop(replica, None)
        self._coming_pids[replica] = actor.process_id.remote()  # before the build, which may fail or hang
        return Replacement(actor, self._build_generator(actor))

    def close(self) -> None:
        """End actors and Ray, and wait until none of the processes of this job is left. Idempotent.

        Actors get CLOSE_S to leave groups and engines in order; one that hangs is killed then.
        """
        self.remember_processes()
        self._ask_to_close()
        self.remember_processes()  # an engine that was being built has gone on meanwhile
        for actor in self.trainers + self.generators:
            with contextlib.suppress(Exception):  # it may be dead already, which is what is wanted
                ray.kill(actor)
        self.trainers = self.generators = ()
        if self._places is not None and ray.is_initialized():
            with contextlib.suppress(Exception):  # a cluster that is gone has taken its places with it
                self._places.close()
        self._places = None
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

    def _build_generator(self, actor: Any) -> Any:
        return actor.build.remote(
            self._engine_dir, gen_parallel(self._config), gen_options(self._config), self._build_timeout_s
        )

    def _actor(self, kind: type[Any], number: int, name: str) -> Any:
        """A new actor. Ray itself restarts none: it would come back without its engine or its policy."""
        assert self._places is not None, "actors are made after their places"
        place = self._places.of_trainer(number) if kind is TrainActor else self._places.of_generator(number)
        options = ray.remote(kind).options(max_restarts=0, max_task_retries=0, **place)
        return options.remote(number, str(self._log_folder / f"{name}.log"))


def start_ray(config: JobConfig) -> list[psutil.Process]:
    """Start or join Ray; returns the processes that this started. Raises TransportError if Ray does not come up.

    Ray gives its own start 30 s, which a busy machine may miss: START_ATTEMPTS.
    """
    if ray.is_initialized():
        raise TransportError("a Ray runs in this process already; call ray.shutdown() first")
    others = set(psutil.Process().children())
    where = config.cluster.address or "on this machine"
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with _own_signals():
                _init_ray(config)
        except BaseException as error:  # Ray raises bare Exceptions here
            ray.shutdown()
            end_processes([child for child in psutil.Process().children() if child not in others], LEAVE_S)
            if not isinstance(error, Exception):
                raise
            if attempt == START_ATTEMPTS:
                raise TransportError(
                    f"Ray did not start or answer ({where}), {attempt} times: {error}; see cluster.address"
                    + token_remedy(config.cluster.address)
                ) from error
        else:
            break
    return [child for child in psutil.Process().children() if child not in others]


def token_remedy(address: str | None) -> str:
    """Ray 2.60 takes a token up by itself for a local Ray and for "auto", never for an explicit address."""
    if address in (None, "auto") or os.environ.get("RAY_AUTH_MODE") == "token":
        return ""
    return (
        ". If that cluster asks for a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH if the token is "
        "not this user's own"
    )


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
    with _loopback_only():
        ray.init(
            address="local",
            num_cpus=config.cluster.num_cpus or None,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )
    where = {str(node["NodeManagerAddress"]) for node in ray.nodes()}
    if where != {"127.0.0.1"}:
        raise TransportError(f"the job's own Ray listens on {sorted(where)}, not on loopback only")


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Let Ray take 127.0.0.1 as it is: on Linux it puts an outside address in its place and listens on all interfaces.

    The switch is Ray's own, made for laptops; the environment reaches it only before Ray is imported (Ray 2.60).
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before

"""Real trainer processes, forked from one server that has Megatron imported; tiny checkpoints, made once."""

import importlib
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

START_DEADLINE_S = 240.0
CASE_DEADLINE_S = 90.0


def _serve(pipe: Connection) -> None:
    """Run one case after another; the processes of each are forked from this process's own fork server."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    from tests.processes import CONTEXT, run_processes

    CONTEXT.set_forkserver_preload(["tests.train_side.preload"])
    while (request := pipe.recv()) is not None:
        module, name, num_processes, args, timeout_s = request
        try:
            function = getattr(importlib.import_module(module), name)
            pipe.send((run_processes(function, num_processes, *args, timeout_s=timeout_s), None))
        except BaseException as error:
            pipe.send((None, str(error)))


class Trainers:
    """Runs functions, for example of `tests.train_side.ranks`, as f(rank, world_size, address, *args) on n ranks."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._deadline_s = START_DEADLINE_S

    def run(self, function: Callable, num_ranks: int, *args: object) -> tuple:
        """The results of all ranks; raises AssertionError with every rank's traceback."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        timeout_s = self._deadline_s
        given = (num_ranks, f"127.0.0.1:{port}", *args)
        self._pipe.send((function.__module__, function.__name__, num_ranks, given, timeout_s))
        assert self._pipe.poll(timeout_s + 30), f"{function.__name__}: no answer within {timeout_s + 30} s"
        results, error = self._pipe.recv()
        assert error is None, error
        self._deadline_s = CASE_DEADLINE_S
        return results


@pytest.fixture(scope="session")
def trainers() -> Iterator[Trainers]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    host = context.Process(target=_serve, args=(theirs,))
    host.start()
    try:
        yield Trainers(ours)
        ours.send(None)
        host.join(20)
    finally:
        if host.is_alive():
            host.kill()
        host.join(10)


@pytest.fixture(scope="session")
def checkpoints(trainers: Trainers, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoints(name, coded=False, **overrides)`: the folder of a tiny model, made at the first call."""
    from tests.train_side import ranks

    root = tmp_path_factory.mktemp("checkpoints")
    made: dict[tuple, Path] = {}

    def folder(name: str, *, coded: bool = False, **overrides: object) -> Path:
        key = (name, coded, *sorted(overrides.items()))
        if key not in made:
            made[key] = root / str(len(made))
            trainers.run(ranks.make_checkpoint, 1, name, str(made[key]), coded, overrides)
        return made[key]

    return folder

"""Real trainer processes, forked from one that has Megatron imported; tiny checkpoints, made once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rank_pool import RankPool
from tests.train_side import ranks

CASE_DEADLINE_S = 150.0
_POOL = RankPool("train", "refit.train_side.bare:preload")


class Trainers:
    """Runs functions, for example of `ranks`, as function(rank, world_size, address, *args) on n ranks."""

    def run(self, function: Callable, num_ranks: int, *args: object) -> tuple:
        """The results of all ranks; raises AssertionError with every rank's traceback."""
        return tuple(_POOL.run(_call, num_ranks, (function, num_ranks, *args), CASE_DEADLINE_S))


def _call(rank: int, address: str, function: Callable, world_size: int, *args: object) -> object:
    return function(rank, world_size, address, *args)


@pytest.fixture(scope="session")
def trainers() -> Trainers:
    return Trainers()


@pytest.fixture(scope="session")
def checkpoints(trainers: Trainers, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoints(name, coded=False, **overrides)`: the folder of a tiny model, made at the first call."""
    root = tmp_path_factory.mktemp("checkpoints")
    made: dict[tuple, Path] = {}

    def folder(name: str, *, coded: bool = False, **overrides: object) -> Path:
        key = (name, coded, *sorted(overrides.items()))
        if key not in made:
            made[key] = root / str(len(made))
            trainers.run(ranks.make_checkpoint, 1, name, str(made[key]), coded, overrides)
        return made[key]

    return folder

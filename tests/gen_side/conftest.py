"""Tiny checkpoints shared by the tests of the generator side."""

import pytest

from refit.train_side.tiny_models import make_tiny_model
from tests.gen_side.checkpoints import index_coded


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """make(name, **overrides) -> (start, coded): an fp32 checkpoint, and its index-coded twin."""
    made = {}

    def make(name, **overrides):
        key = (name, tuple(sorted(overrides.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            start = make_tiny_model(name, folder / "start", dtype="float32", overrides=overrides)
            made[key] = (start, index_coded(start, folder / "coded"))
        return made[key]

    return make

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.end_to_end.jobs import JobPool


@pytest.fixture(scope="package")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobPool]:
    pool = JobPool(tmp_path_factory.mktemp("jobs"))
    yield pool
    pool.close()

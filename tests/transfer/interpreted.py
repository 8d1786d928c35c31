"""The Triton kernels under Triton's interpreter, on the CPU."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

from refit.transfer.kernels import programs, triton_bucket


@contextmanager
def interpreted_kernels() -> Iterator[ModuleType]:
    """`triton_bucket` with programs that are interpreted; Triton decides that when it sees the decorator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.reload(programs)
        yield importlib.reload(triton_bucket)
    importlib.reload(programs)
    importlib.reload(triton_bucket)

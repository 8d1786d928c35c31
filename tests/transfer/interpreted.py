"""The Triton kernels under Triton's interpreter, on the CPU."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

from refit.transfer.kernels import fp8, fp8_programs, programs, triton_bucket

MODULES = (programs, triton_bucket, fp8_programs, fp8)


@contextmanager
def interpreted_kernels() -> Iterator[ModuleType]:
    """`triton_bucket` (and `fp8`) with programs that are interpreted; Triton decides that at the decorator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for module in MODULES:
            importlib.reload(module)
        yield triton_bucket
    for module in MODULES:
        importlib.reload(module)

"""The inner loops of digests on a CPU, compiled by numba: memory is read once, and nothing is written but the sums.

A word costs a load, a shift, two additions and a multiplication: 12 GB/s from memory on one core, where numpy, which
writes the folded words down first, makes 3.5 and a copy 8. No function holds the interpreter lock.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite.binding import ffi
from numba import njit
from numpy.typing import NDArray

from refit.transfer.digest import FOLD_BITS

Words = NDArray[np.int64]


def _add_rows(words: Words, step: int, by: Words, found: Words) -> None:
    """found[i] = sum over j of fold(words[i * step + j]) * by[j], mod 2**64."""
    for row in range(found.size):
        line = words[row * step : row * step + by.size]
        total = np.int64(0)
        for at in range(by.size):
            total += (line[at] + (line[at] >> FOLD_BITS)) * by[at]
        found[row] = total


def _add_boxes(
    words: Words,
    first: int,
    step: int,
    by: Words,
    row_by: Words,
    scales: Words,
    ones: Words,
    indexes: Words,
    sums: Words,
) -> None:
    """Add the weighted sum of box b, whose rows begin at word first + b * step, scaled, and ones[b] to its sum."""
    for box in range(scales.size):
        start = first + box * step
        total = np.int64(0)
        for row in range(row_by.size):
            line = words[start : start + by.size]
            start += by.size
            of_row = np.int64(0)
            for at in range(by.size):
                of_row += (line[at] + (line[at] >> FOLD_BITS)) * by[at]
            total += of_row * row_by[row]
        sums[indexes[box]] += total * scales[box] + ones[box]


def _compiled[F: Callable[..., None]](function: F, *types: str) -> F:
    """Compiled once per machine where numba finds a folder to keep it in, else once per process, in about a second."""
    signature = f"void({', '.join(types)})"
    try:
        found: F = njit(signature, nogil=True, cache=True)(function)
    except RuntimeError:  # neither beside this file nor in the user's folder
        found = njit(signature, nogil=True)(function)
    return found


def _answer_to_functions_only() -> None:
    """Let llvmlite's handle of its library answer to functions only.

    It takes any name for a function's, `__dict__` too. vLLM 0.31 looks for kernels in the names of all modules as it
    builds an engine on a CPU, then takes a function for a dict, and fails.
    """
    handle = type(ffi.lib)
    function_of = handle.__getattr__

    def getattr_of(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{handle.__name__} has no attribute {name!r}")
        return function_of(self, name)

    handle.__getattr__ = getattr_of


_answer_to_functions_only()
_WORDS = "int64[::1]"
fold_products = _compiled(_add_rows, _WORDS, "int64", _WORDS, _WORDS)
weigh_boxes = _compiled(_add_boxes, _WORDS, "int64", "int64", *[_WORDS] * 6)

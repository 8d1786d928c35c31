"""The environment variable that sends bulk tensors by the oracle, in jobs and in single calls. Imports nothing."""

from collections.abc import Mapping

GOLDEN_VARIABLE = "NRL_XFERDTENSOR_GOLDEN"


def is_golden_forced(environ: Mapping[str, str]) -> bool:
    """True for 1; "" and "0" change nothing. Raises ValueError for anything else."""
    value = environ.get(GOLDEN_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"environment variable {GOLDEN_VARIABLE} is {value!r}: set it to 1, or unset it")
    return value == "1"

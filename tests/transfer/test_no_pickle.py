"""Nothing is pickled on the way between ranks: what arrives from a socket can carry data, and no code."""

from __future__ import annotations

import ast
import dataclasses
import pickle
from pathlib import Path

import pytest

import refit
from refit.plan import PlanOptions
from refit.transfer.protocol import GOLDEN, P2P
from tests.transfer.cases import make_case
from tests.transfer.test_endpoint import refit_rank, run_refits

SOURCES = sorted(Path(refit.__file__).parent.rglob("*.py"))
PICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
PICKLING_CALLS = {
    "broadcast_object_list",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}


def test_no_module_imports_a_pickler_or_calls_a_collective_that_pickles():
    found = [
        f"{path.name}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if (
            isinstance(node, ast.Import) and any(alias.name.split(".")[0] in PICKLERS for alias in node.names)
        )
        or (isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PICKLERS)
        or (isinstance(node, ast.Attribute) and node.attr in PICKLING_CALLS)
    ]
    assert not found


def without_pickle(rank, port, runs):
    """A rank's whole life in a process that cannot pickle."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("something is pickled")

    kept = {
        name: getattr(pickle, name) for name in ("dumps", "loads", "dump", "load", "Pickler", "Unpickler")
    }
    for name in kept:
        setattr(pickle, name, refuse)
    try:
        with pytest.raises(AssertionError, match="pickled"):
            pickle.dumps(1)
        return refit_rank(rank, port, runs)
    finally:
        for name, function in kept.items():
            setattr(pickle, name, function)


@pytest.mark.processes
def test_ranks_that_cannot_pickle_agree_move_and_report_on_every_path():
    case = make_case(7, num_tensors=10)
    case = dataclasses.replace(case, options=PlanOptions(8192, 16, (r"t[0-4]\.weight",)))
    runs = [("cold-p2p", 7, case, 1), ("cold-golden", 8, case, 1)]
    run_refits(runs, {"cold-p2p": P2P, "cold-golden": GOLDEN}, life=without_pickle)

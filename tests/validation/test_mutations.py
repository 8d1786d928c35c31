"""Each planted fault makes a named case fail, with a message that says what is wrong; so does a rank that dies."""

import functools
import os
import signal

import pytest

from refit.validation import ranks
from refit.validation.matrix import load_matrix
from refit.validation.runner import Runner
from tests.validation.mutations import run_mutated_rank

pytestmark = [
    pytest.mark.slow, pytest.mark.megatron, pytest.mark.vllm, pytest.mark.processes, pytest.mark.timeout(900),
]  # fmt: skip

CASES = {case.name: case for case in load_matrix("l1")}
DENSE, EXPERTS = "dense TP2 to TP4, 2 KV heads", "MoE EP2 TP2 with ETP1 to TP2"
HYBRID, NO_GATE = "hybrid TP4 to TP2", "hybrid with experts, TP2 to TP2"
# mutation -> (case, what the first failure says)
FAULTS = {
    "no rule for AutoMapping": (DENSE, "AutoMapping has no lowering rule"),
    "no rule for QKVMapping": (DENSE, "QKVMapping has no lowering rule"),
    "no rule for GatedMLPMapping": (DENSE, "GatedMLPMapping has no lowering rule"),
    "no rule for ColumnParallelMapping": (HYBRID, "ColumnParallelMapping has no lowering rule"),
    "no rule for RowParallelMapping": (HYBRID, "RowParallelMapping has no lowering rule"),
    "no rule for MambaInProjMapping": (HYBRID, "MambaInProjMapping has no lowering rule"),
    "no rule for MambaConv1dMapping": (HYBRID, "MambaConv1dMapping has no lowering rule"),
    "gate and up swapped": (DENSE, "up_proj.weight["),
    "keys and values swapped": (DENSE, "v_proj.weight["),
    "query groups not interleaved": (DENSE, "holds"),
    "row-parallel cut along rows": (DENSE, "holds"),
    "up_proj of experts without a gate dropped": (NO_GATE, "up_proj"),
    "dense coordinates for experts": (EXPERTS, "experts.*."),
    "x and z of Mamba swapped": (HYBRID, "in_proj"),
    "convolution cut as one block": (HYBRID, "conv1d"),
}


@pytest.fixture(scope="module")
def runner():
    with Runner() as opened:
        yield opened


@pytest.mark.parametrize("mutation", FAULTS)
def test_a_fault_in_a_lowering_rule_fails_a_named_case(runner, mutation):
    name, words = FAULTS[mutation]
    runner.train_body = functools.partial(run_mutated_rank, mutation)
    outcome = runner.run(CASES[name])
    print(f"{mutation} | {name} | {outcome.failures[0].splitlines()[0] if outcome.failures else 'PASSED'}")
    assert outcome.status == "failed"
    assert any(words in failure for failure in outcome.failures)


def killed(tell, setting, rank):
    """Rank 1 dies by itself when it has sent version 1."""

    def tell_and_die(step):
        tell(step)
        if rank == 1 and step == "exporting version 1":
            os.kill(os.getpid(), signal.SIGKILL)

    return ranks.run_train_rank(tell_and_die, setting, rank)


def test_a_rank_that_dies_fails_its_case_by_name_and_the_next_case_passes(runner):
    runner.train_body = killed
    outcome = runner.run(CASES[DENSE])
    assert outcome.failures == ("train 1: killed by SIGKILL during 'exporting version 1'",)
    assert outcome.seconds < 60
    runner.train_body = ranks.run_train_rank
    assert runner.run(CASES[DENSE]).status == "passed"

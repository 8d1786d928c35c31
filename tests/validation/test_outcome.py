"""What makes an outcome a failure besides wrong bytes: misc tensors that nobody allowed, too small a bulk share."""

import dataclasses
import math

import pytest

from refit.gen_side.generator import GenParallel
from refit.train_side.options import TrainParallel
from refit.validation.matrix import Case
from refit.validation.outcome import Outcome, _failures, _unproven, kl_per_token, too_far
from refit.validation.runner import Runner

CASE = Case("a", "tiny-qwen3", TrainParallel(), GenParallel(), misc=("*.A_log",))
MISC = (("layers.0.A_log", "computed"), ("layers.0.D", "no rule"), ("layers.1.D", "no rule"))


@pytest.mark.parametrize(
    ("misc", "wanted", "said"),
    [
        (MISC[:1], {"layers.0.A_log"}, []),
        (MISC, {"layers.0.D", "layers.1.D"}, ["layers.0.D is not bulk, no rule"]),
        (MISC, {"layers.1.D"}, ["layers.1.D is not bulk, no rule"]),
        (MISC, set(), []),
    ],
)
def test_a_misc_tensor_that_generators_want_must_be_named_by_the_case(misc, wanted, said):
    assert list(_unproven(Outcome(CASE, bulk_bytes=100, misc=misc), wanted)) == said


def test_a_small_bulk_share_fails_unless_the_case_allows_it():
    outcome = Outcome(CASE, bulk_bytes=98, misc_bytes=2)
    assert list(_unproven(outcome, set())) == ["bulk share 0.9800 is below 0.99"]
    relaxed = dataclasses.replace(outcome, case=dataclasses.replace(CASE, min_bulk_share=0.9))
    assert list(_unproven(relaxed, set())) == []


def test_failures_come_earliest_version_first_and_name_rank_and_check():
    found = {
        "gen 1": {"wrong": {"live 2": "x", "golden 1": "y"}},
        "train 0": {"wrong": {"export 1": "z"}},
    }
    assert list(_failures(found)) == [
        "gen 1, version 1, golden: y",
        "train 0, version 1, export: z",
        "gen 1, version 2, live: x",
    ]


def test_an_unrunnable_case_starts_no_process():
    case = dataclasses.replace(CASE, unrunnable="no such kernel")
    outcome = Runner().run(case)
    assert outcome.status == "unrunnable" and not outcome.failures


def test_a_quantized_engine_must_be_as_one_from_disk_and_near_one_that_is_not_quantized():
    quantized = dataclasses.replace(CASE, precision="bf16", quantized="fp8")
    outcome = Outcome(quantized, logprob_delta=0.0, kl=1.2e-2)
    assert list(too_far(outcome)) == []
    assert "started from the quantized checkpoint" in next(
        too_far(dataclasses.replace(outcome, logprob_delta=1e-5))
    )
    assert "a KL of 1.21e-02 per token" in next(too_far(dataclasses.replace(outcome, kl=1.21e-2)))
    plain = Outcome(dataclasses.replace(CASE, precision="bf16"), logprob_delta=4e-3)
    assert list(too_far(plain)) == []
    assert "of one rank, limit 0.005" in next(too_far(dataclasses.replace(plain, logprob_delta=6e-3)))


def test_the_kl_of_equal_logprobs_is_zero_and_grows_with_their_distance():
    assert kl_per_token([[-1.0, -2.0]], [[-1.0, -2.0]]) == 0
    near, far = (kl_per_token([[-1.0, -2.0]], [[-1.0, -2.0 + gap]]) for gap in (0.1, -0.5))
    assert 0 < near < far == pytest.approx((math.exp(0.5) - 1.5) / 2)
    assert kl_per_token([[-1.0]], [[math.nan]]) == math.inf

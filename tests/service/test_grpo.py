"""Rewards, advantages, generation KL and tasks."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refit.plan.errors import ConfigError
from refit.service.grpo.advantages import group_advantages
from refit.service.grpo.generation_kl import generation_kl
from refit.service.grpo.reward import grade
from refit.service.grpo.tasks import TASKS, ByteCodec, Task, open_codec

# Reward


def test_the_right_answer_and_only_it_earns_the_full_reward():
    assert grade("-4", True, "-4", "integer") == pytest.approx(1.0)
    assert grade("abc", True, "abc", "text") == pytest.approx(1.0)
    for text, ended in (("-4", False), ("4", True), ("-4 ", True), ("", True), ("-", True), ("- 4", True)):
        assert grade(text, ended, "-4", "integer") < 0.9, (text, ended)


def test_nearer_answers_earn_more():
    rewards = [grade(text, True, "7", "integer") for text in ("zz", "z1", "90", "10", "8", "7")]
    assert rewards == sorted(rewards)
    assert len(set(rewards)) == len(rewards)


def test_an_answer_that_does_not_end_earns_for_its_form_alone():
    assert grade("1234", False, "1234", "integer") == pytest.approx(0.2 * 4 / 5)


def test_an_empty_answer_earns_nothing():
    assert grade("", True, "5", "integer") == 0.0


def test_integers_are_plain_ascii():
    assert grade("\u0663", True, "3", "integer") < 0.2  # an Arabic digit, which int() would read as 3
    assert grade("1_0", True, "10", "integer") < 0.9
    assert grade("+3", True, "3", "integer") < 0.9


@given(
    st.text(max_size=8), st.booleans(), st.integers(-99, 99).map(str), st.sampled_from(["integer", "text"])
)
def test_a_reward_lies_between_0_and_1(text, ended, right, grading):
    assert 0.0 <= grade(text, ended, right, grading) <= 1.0 + 1e-12


# Advantages


@given(st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=5), st.booleans())
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order_of_rewards(groups, scale):
    advantages = group_advantages([reward for group in groups for reward in group], 4, scale=scale)
    for number, group in enumerate(groups):
        mine = advantages[4 * number : 4 * number + 4]
        assert math.fsum(mine) == pytest.approx(0.0, abs=1e-6)
        for better in range(4):
            for worse in range(4):
                if group[better] > group[worse]:
                    assert mine[better] >= mine[worse]


def test_scaled_advantages_have_the_spread_of_the_group_divided_out():
    small = group_advantages([0.1, 0.2], 2, scale=True)
    large = group_advantages([0.0, 1.0], 2, scale=True)
    assert small == pytest.approx(large, rel=2e-3)
    assert group_advantages([0.1, 0.2], 2, scale=False) == pytest.approx((-0.05, 0.05))


def test_equal_rewards_teach_nothing():
    assert group_advantages([0.3] * 4, 4, scale=True) == pytest.approx((0.0,) * 4)


@pytest.mark.parametrize(("num_rewards", "size"), [(5, 2), (4, 1), (3, 4)])
def test_rewards_that_fill_no_whole_groups_are_refused(num_rewards, size):
    with pytest.raises(ValueError, match="do not fill groups"):
        group_advantages([0.0] * num_rewards, size, scale=True)


# Generation KL


def test_equal_logprobs_have_no_kl():
    kl = generation_kl([[-1.0, -2.0], [-3.0]], [[-1.0, -2.0], [-3.0]])
    assert (kl.mean, kl.token_max, kl.logprob_gap_max, kl.num_tokens) == (0.0, 0.0, 0.0, 3)


@given(
    st.lists(st.floats(0.05, 1.0), min_size=2, max_size=6),
    st.lists(st.floats(0.05, 1.0), min_size=6, max_size=6),
)
def test_the_estimate_is_the_kl_of_two_distributions_in_expectation(weights, others):
    q = [weight / sum(weights) for weight in weights]
    p = [other / sum(others[: len(q)]) for other in others[: len(q)]]
    expected = sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))
    terms = [generation_kl([[math.log(b)]], [[math.log(a)]]).mean for a, b in zip(q, p, strict=True)]
    assert sum(a * term for a, term in zip(q, terms, strict=True)) == pytest.approx(expected, abs=1e-9)


def test_the_mean_is_over_tokens_not_over_samples():
    kl = generation_kl([[-1.0, -1.0, -1.0], [-1.0]], [[-1.0, -1.0, -1.0], [-1.2]])
    assert kl.mean == pytest.approx((math.exp(0.2) - 1.2) / 4)
    assert kl.logprob_gap_mean == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("trainer", "generator"),
    [([[-1.0]], [[-1.0], [-1.0]]), ([[-1.0]], [[-1.0, -2.0]]), ([], []), ([[]], [[]])],
)
def test_tokens_without_a_partner_are_refused(trainer, generator):
    with pytest.raises(ValueError, match=r"against|nothing"):
        generation_kl(trainer, generator)


# Tasks


@pytest.fixture(scope="module", params=sorted(TASKS))
def task(request):
    return Task.open(request.param, seed=3)


def test_the_checker_accepts_the_right_answer_and_it_earns_the_full_reward(task):
    for problem in task.problems(2, 20):
        assert task.verify(problem.answer, problem)
        assert grade(problem.answer, True, problem.answer, task.kind.grading) == pytest.approx(1.0)


def test_the_checker_and_the_reward_agree_on_wrong_answers(task):
    first, *others = task.problems(0, 20)
    for other in others:
        if other.answer != first.answer:
            assert not task.verify(other.answer, first)
            assert grade(other.answer, True, first.answer, task.kind.grading) < 1.0


def test_steps_do_not_share_problems_and_a_seed_fixes_them(task):
    assert task.problems(1, 4) == task.problems(0, 8)[4:]
    again = Task.open(next(name for name, kind in TASKS.items() if kind is task.kind), seed=3)
    assert again.problems(5, 6) == task.problems(5, 6)


def test_answers_fit_into_a_few_tokens_and_prompts_into_the_engine(task):
    for problem in task.problems(0, 200):
        assert len(problem.question.encode()) < 120
        assert len(problem.answer.encode()) < 5


def test_problems_are_the_same_under_another_hash_seed():
    code = (
        "import json; from refit.service.grpo.tasks import Task;"
        "print(json.dumps([p.question for p in Task.open('basic_arithmetic', 7).problems(3, 5)]))"
    )
    environment = {"PYTHONHASHSEED": "11", "PATH": "/usr/bin"}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    here = [problem.question for problem in Task.open("basic_arithmetic", 7).problems(3, 5)]
    assert json.loads(printed.stdout) == here


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'chess'.*basic_arithmetic"):
        Task.open("chess", 0)


# Text and tokens


def test_bytes_come_back_as_text_and_other_tokens_as_one_strange_character():
    codec = ByteCodec(end_token=257)
    assert codec.decode(codec.encode("2 + 3")) == "2 + 3"
    assert codec.decode((52, 256, 53)) == "4\ufffd5"


def test_a_model_without_a_tokenizer_is_read_by_bytes(tmp_path):
    assert open_codec(tmp_path, {"eos_token_id": [257, 3]}) == ByteCodec(257)


def test_a_model_without_an_end_token_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="eos_token_id None"):
        open_codec(tmp_path, {})

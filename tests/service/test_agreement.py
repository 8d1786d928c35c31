"""What the coordinator concludes from reports and descriptions: silence is never agreement."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from refit.plan import (
    Holding,
    Manifest,
    ParamSpec,
    Plan,
    PlanError,
    PlanOptions,
    RankManifest,
    Region,
    TensorSpec,
    build_plan,
    encode_rank_manifest,
)
from refit.service.agreement import (
    Terms,
    agree_on_plan,
    describe_mismatches,
    judge_audit,
    mismatches_of,
)
from refit.service.config import JobConfig, PolicyConfig, RefitConfig
from refit.service.rounds import Joint, settle_s, whitelist_of
from refit.service.waiting import Answers
from refit.transfer.errors import Failure, RefitFailed, TransportError
from refit.transfer.protocol import OK, describe_key, digest_key, ready_key
from refit.transfer.rendezvous import ControlStore

UP = TensorSpec("model.layers.0.mlp.up_proj.weight", (4, 2), "bfloat16")
ROTARY = TensorSpec("model.rotary.table", (2,), "bfloat16")


def rank_manifest(side: str, rank: int, first_row: int, stop_row: int) -> RankManifest:
    rows = stop_row - first_row
    return RankManifest(
        side,
        rank,
        stage=0,
        replica=0,
        tensors=(UP, ROTARY),
        params=(ParamSpec("w", (rows, 2), "bfloat16"), ParamSpec("t", (2,), "bfloat16")),
        holdings=(
            Holding(UP.name, Region((first_row, 0), (stop_row, 2)), "w", 0, (2, 1)),
            Holding(ROTARY.name, Region((0,), (2,)), "t", 0, (1,)),
        ),
        misc=(),
    )


TRAIN = Manifest("train", (rank_manifest("train", 0, 0, 2), rank_manifest("train", 1, 2, 4)))
GEN = Manifest("gen", (rank_manifest("gen", 0, 0, 4),))


@pytest.fixture
def plan() -> Plan:
    return build_plan(TRAIN, GEN, PlanOptions())


@pytest.fixture
def reports() -> dict[int, Any]:
    """Trainers 0 and 1 sent halves that sum to what joint rank 2 holds; the table went by broadcast."""
    trainer = {"misc_digests": {}}
    return {
        0: {**trainer, "digests": {UP.name: {"2": f"{2**64 - 1:016x}"}}, "misc_digests": {ROTARY.name: "07"}},
        1: {**trainer, "digests": {UP.name: {"2": f"{5:016x}"}}},
        2: {"digests": {UP.name: {"2": f"{4:016x}"}}, "misc_digests": {ROTARY.name: "07"}},
    }


def test_a_table_that_no_pattern_names_is_misc(plan: Plan) -> None:
    assert plan.misc_names == (ROTARY.name,)


def test_digests_of_all_senders_add_up_modulo_two_to_the_64(plan: Plan, reports: dict[int, Any]) -> None:
    assert mismatches_of(plan, reports) == ()


@pytest.mark.parametrize(
    ("rank", "section", "tensor"),
    [
        (0, "digests", UP.name),
        (1, "digests", UP.name),
        (2, "digests", UP.name),
        (0, "misc_digests", ROTARY.name),
    ],
)
def test_a_digest_that_is_missing_on_one_side_is_a_mismatch_and_named(
    plan: Plan, reports: dict[int, Any], rank: int, section: str, tensor: str
) -> None:
    silent = copy.deepcopy(reports)
    del silent[rank][section][tensor]
    found = mismatches_of(plan, silent)
    assert [(mismatch.tensor, mismatch.gen_rank) for mismatch in found] == [(tensor, 0)]
    assert tensor in describe_mismatches(found)


def test_a_mismatch_says_which_boxes_the_rank_gets_and_from_whom(reports: dict[int, Any]) -> None:
    halves = Manifest("gen", (rank_manifest("gen", 0, 0, 1), rank_manifest("gen", 1, 1, 4)))
    plan = build_plan(TRAIN, halves, PlanOptions())
    reports[2]["digests"] = {UP.name: {"2": "04"}}
    reports[3] = {"digests": {UP.name: {"3": "09"}}, "misc_digests": {ROTARY.name: "08"}}
    first, second, misc = mismatches_of(plan, reports)
    assert "on gen rank 0 ([0:1, 0:2] from train ranks 0): trainers sent" in str(first)
    assert "on gen rank 1 ([1:4, 0:2] from train ranks 0, 1): trainers sent" in str(second)
    assert f"{ROTARY.name} on gen rank 1: trainers sent digest 07" in str(misc), "it was sent whole, to all"


def test_a_changed_misc_digest_is_a_mismatch(plan: Plan, reports: dict[int, Any]) -> None:
    reports[2]["misc_digests"][ROTARY.name] = "08"
    assert [mismatch.tensor for mismatch in mismatches_of(plan, reports)] == [ROTARY.name]


def test_many_mismatches_are_counted_and_the_first_few_spelled_out(
    plan: Plan, reports: dict[int, Any]
) -> None:
    reports[2]["misc_digests"] = {f"extra{number}": "01" for number in range(9)}
    assert "and 5 more" in describe_mismatches(mismatches_of(plan, reports))


def test_an_audit_compares_what_both_sides_digested_and_names_what_differs(plan: Plan) -> None:
    trained = [{UP.name: {"2": "01"}, ROTARY.name: {"2": "07"}}, {UP.name: {"2": "02"}}]
    live = {
        UP.name: f"{3:016x}"
    }  # no digest of the table: its layout has none, and its hash is that of the commit
    answer = {"digests": live, "changed": [], "params_sha256": {"w": "ab"}}
    report = judge_audit(plan, trained, {0: answer})
    assert report.ok and report.num_compared == 1 and report.params_sha256 == ({"w": "ab"},)
    wrong = {**answer, "digests": {UP.name: f"{4:016x}"}, "changed": ["t"]}
    report = judge_audit(plan, trained, {0: wrong})
    assert not report.ok and [mismatch.tensor for mismatch in report.mismatches] == [UP.name]
    assert report.findings[1:] == ("t on gen rank 0 has changed",)


def test_an_audit_that_nobody_answered_with_a_digest_is_not_passed(plan: Plan) -> None:
    trained = [{UP.name: {"2": "01"}}, {UP.name: {"2": "02"}}]
    report = judge_audit(plan, trained, {0: {"digests": {}, "changed": [], "params_sha256": {"w": "ab"}}})
    assert not report.ok and report.silent == (0,) and report.num_compared == 0
    assert report.findings == ("gen rank 0 gave no digest: it has committed no refit",)
    empty = {0: {"digests": {}, "changed": [], "params_sha256": {}}}
    assert judge_audit(plan, [{}, {}], empty).ok, "a rank that should hold nothing"


@pytest.fixture
def control() -> Iterator[ControlStore]:
    store = ControlStore.host(run_id="agreement")
    yield store
    store.close()


def terms(timeout_s: float) -> Terms:
    return Terms(2, 1, PlanOptions(), "gloo", "p2p", 2, timeout_s)


def publish_descriptions(control: ControlStore) -> None:
    for side, manifest in (("train", TRAIN), ("gen", GEN)):
        for rank in manifest.ranks:
            control.put(describe_key(side, rank.rank), encode_rank_manifest(rank))


def test_a_plan_is_agreed_when_all_ranks_confirm_it(control: ControlStore, plan: Plan) -> None:
    publish_descriptions(control)
    for rank in range(3):
        control.put(digest_key(rank), plan.digest)
        control.put(ready_key(rank), OK)
    assert agree_on_plan(control, terms(10.0)).digest == plan.digest


def test_the_plan_after_a_loss_uses_what_the_plan_before_knows_and_is_equal_to_a_new_one(
    control: ControlStore, plan: Plan
) -> None:
    both = Manifest("gen", (GEN.ranks[0], rank_manifest("gen", 1, 0, 4)))
    before = build_plan(TRAIN, both, PlanOptions())
    publish_descriptions(control)
    for rank in range(3):
        control.put(digest_key(rank), plan.digest)
        control.put(ready_key(rank), OK)
    again = agree_on_plan(control, terms(10.0), before)
    assert again.digest == plan.digest and again.gen.manifest == GEN
    assert again.train is before.train and again.matcher is before.matcher
    other = replace(terms(10.0), options=PlanOptions(bucket_bytes=8192))
    with pytest.raises(PlanError, match="rank 0 computed plan"):
        agree_on_plan(control, other, before)  # other options: a new plan, which these ranks have not made


def test_one_rank_with_another_plan_ends_it_before_any_collective(control: ControlStore, plan: Plan) -> None:
    publish_descriptions(control)
    for rank, digest in enumerate((plan.digest, "another", plan.digest)):
        control.put(digest_key(rank), digest)
    with pytest.raises(PlanError, match="rank 1 computed plan another"):
        agree_on_plan(control, terms(10.0))
    assert control.peek("prepare/go") is None


def test_a_rank_whose_groups_do_not_open_is_named_at_the_deadline(control: ControlStore, plan: Plan) -> None:
    publish_descriptions(control)
    for rank in range(3):
        control.put(digest_key(rank), plan.digest)
    for rank in (0, 2):
        control.put(ready_key(rank), OK)
    with pytest.raises(TransportError, match="ready/1"):
        agree_on_plan(control, terms(1.0))


def test_a_rank_that_never_describes_itself_is_named_at_the_deadline(control: ControlStore) -> None:
    control.put(describe_key("train", 0), encode_rank_manifest(TRAIN.ranks[0]))
    with pytest.raises(TransportError, match="describe/train/1"):
        agree_on_plan(control, terms(0.5))


def test_a_failure_reported_by_anybody_ends_the_wait_at_once_with_its_cause(control: ControlStore) -> None:
    timer = threading.Timer(0.3, control.fail, ("describe", "gen 0", "out of memory"))
    timer.start()
    with pytest.raises(RefitFailed, match="gen 0: out of memory"):
        agree_on_plan(control, terms(30.0))
    timer.join()


def test_the_flag_and_force_misc_choose_what_may_be_bulk() -> None:
    norm = TensorSpec("model.norm.weight", (2,), "bfloat16").name
    on = PolicyConfig(nccl_xfer_refit=True)
    assert whitelist_of(JobConfig()) == ()

    def may_be_bulk(config: JobConfig, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in whitelist_of(config))

    without_norms = JobConfig(policy=on, refit=RefitConfig(force_misc=(r".*norm\.weight",)))
    assert may_be_bulk(JobConfig(policy=on), norm) and may_be_bulk(JobConfig(policy=on), UP.name)
    assert not may_be_bulk(without_norms, norm) and may_be_bulk(without_norms, UP.name)
    without_a_beginning = JobConfig(policy=on, refit=RefitConfig(force_misc=(r"model\.layers\.0",)))
    assert may_be_bulk(without_a_beginning, UP.name), "a pattern is of the whole name"


def test_a_silent_actor_is_a_cause_where_the_coordinator_itself_has_none() -> None:
    silent = Answers({}, {}, ("generator 1",))
    assert str(Joint(silent, object(), None).cause) == "no answer from generator 1"
    assert Joint(Answers({}, {}, ()), object(), None).cause is None
    told = RefitFailed(Failure("refit", "gen 0", "disk full"))
    assert Joint(silent, None, told).cause is told, "who failed says more than who is silent"
    own = TransportError("the store is gone")
    died = Answers({}, {"generator 0": (True, Failure("refit", "generator 0", "died"))}, ())
    assert Joint(died, None, own).cause is own
    assert str(Joint(died, None, told).cause) == str(RefitFailed(Failure("refit", "generator 0", "died")))


@pytest.mark.parametrize(("timeout_s", "settle"), [(4.0, 3.0), (40.0, 10.0), (120.0, 20.0)])
def test_the_others_have_a_quarter_of_the_limit_to_end_after_a_failure(
    timeout_s: float, settle: float
) -> None:
    assert settle_s(timeout_s) == settle

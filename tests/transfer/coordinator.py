"""A coordinator for tests: the protocol of `refit.transfer.protocol` with ranks that are plain processes."""

from refit.plan import Manifest, PlanOptions, build_plan, decode_rank_manifest
from refit.transfer.protocol import (
    AUTO,
    GO,
    INPUTS,
    OK,
    P2P,
    Inputs,
    RefitReport,
    decision_key,
    describe_key,
    digest_key,
    ready_key,
    report_key,
)
from refit.transfer.rendezvous import ControlStore

PREPARE_S = 60.0  # a loaded machine starts processes slowly


def prepare(
    control: ControlStore,
    num_train: int,
    num_gen: int,
    options: PlanOptions,
    *,
    bulk: str = P2P,
    num_streams: int = 2,
    timeout_s: float = 30.0,
    transport: str = AUTO,
    delta: bool = False,
) -> None:
    """Lead `num_train + num_gen` endpoints through prepare. `timeout_s` is the one of the refits to come."""
    sides = []
    for side, count in (("train", num_train), ("gen", num_gen)):
        texts = [control.get(describe_key(side, rank), PREPARE_S) for rank in range(count)]
        sides.append(Manifest(side, tuple(decode_rank_manifest(str(text)) for text in texts)))
    plan = build_plan(sides[0], sides[1], options)
    inputs = Inputs(
        sides[0], sides[1], options, "gloo", bulk, num_streams, timeout_s, plan.digest, transport, delta
    )
    control.put(INPUTS, inputs.message())
    for rank in range(num_train + num_gen):
        assert control.get(digest_key(rank), PREPARE_S) == plan.digest
    control.put(GO, OK)
    for rank in range(num_train + num_gen):
        control.get(ready_key(rank), PREPARE_S)


def reports(
    control: ControlStore, attempt: int, num_ranks: int, timeout_s: float = 30.0
) -> list[RefitReport]:
    """The reports of all ranks, by joint rank."""
    return [
        RefitReport.of_message(control.get(report_key(attempt, rank), timeout_s)) for rank in range(num_ranks)
    ]


def decide(control: ControlStore, attempt: int, commit: bool, reason: str = "") -> None:
    control.put(decision_key(attempt), {"commit": commit, "reason": reason})


def require_equal_digests(found: list[RefitReport], num_train: int) -> None:
    """What trainers say they sent is what generators say they hold, per tensor and generator rank."""
    sent: dict[tuple[str, int], int] = {}
    for report in found[:num_train]:
        for tensor, by_rank in report.digests.items():
            for rank, value in by_rank.items():
                sent[tensor, rank] = (sent.get((tensor, rank), 0) + value) % (1 << 64)
    held = {
        (tensor, rank): value
        for report in found[num_train:]
        for tensor, by_rank in report.digests.items()
        for rank, value in by_rank.items()
    }
    assert sent == held
    for report in found[num_train:]:
        assert report.misc_digests == found[0].misc_digests

"""How rounds share slots: what is on the wire is never written to, and memory stays inside two buckets."""

import time
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch

from refit.plan import PlanOptions, build_plan
from refit.transfer.bulk import MOST_SLOTS, StageJob, move_stage, num_slots
from refit.transfer.compiled import CompiledRound, CompiledStage, compile_stage
from refit.transfer.groups import Group
from refit.transfer.workspace import KEPT_BYTES, Workspace
from tests.transfer.cases import empty_params, fill_params, make_case, param_dtypes

CPU = torch.device("cpu")


class NoWire:
    """A transport that delivers nothing and remembers what is outstanding."""

    gathers = False

    def __init__(self) -> None:
        self.outstanding: list[list[tuple[int, int, bytes]]] = []
        self.most = 0

    def post(self, sends, receives, tag):
        spans = [
            (parcel.payload.data_ptr(), parcel.payload.numel(), bytes(parcel.payload.tolist()))
            for parcel in (*sends, *receives)
        ]
        taken = [(at, at + size) for ticket in self.outstanding for at, size, _ in ticket]
        for at, size, _ in spans:
            assert all(stop <= at or at + size <= start for start, stop in taken), (
                "memory of a parcel on the wire"
            )
        self.outstanding.append(spans)
        self.most = max(self.most, len(self.outstanding))
        return sends

    def wait(self, sends, deadline):
        spans = self.outstanding.pop(0)
        for parcel, (_, _, before) in zip(sends, spans, strict=False):
            assert bytes(parcel.payload.tolist()) == before, "a parcel was written to before it had gone out"

    def abort(self): ...

    def close(self): ...


@pytest.mark.parametrize("rank", [0, 2])
def test_parcels_on_the_wire_are_not_touched_and_several_rounds_are_under_way(rank):
    case = make_case(5, num_tensors=16, largest_dim=64)
    case = replace(case, options=PlanOptions(4096, 16, case.options.whitelist))
    plan = build_plan(case.train, case.gen, case.options)
    stage = plan.rank_plan(rank).stages[0]
    params = empty_params(case.manifest(rank))
    if rank == 0:
        fill_params(params, case, case.manifest(rank), 5, 0)
    compiled = compile_stage(plan, stage, rank, param_dtypes(case.manifest(rank)), CPU)
    wire = NoWire()
    group = Group("none", stage.group_ranks, rank, wire)
    report = move_stage(StageJob(plan, compiled, rank, params, group, time.monotonic() + 9, CPU))
    assert not wire.outstanding and 2 <= wire.most == num_slots(compiled, 4096) <= MOST_SLOTS
    assert report.peak_extra_bytes == wire.most * compiled.slot_bytes <= 2 * 4096
    assert (report.bytes_sent, report.bytes_received) == compiled.payload_bytes


@dataclass(frozen=True, slots=True)
class Sized:
    slot_bytes: int
    rounds: tuple[CompiledRound, ...] = (CompiledRound(0, (), (), 0),) * 20


@pytest.mark.parametrize(
    ("slot_bytes", "expected"), [(1000, 2), (667, 2), (666, 3), (500, 4), (200, 10), (1, 16), (0, 16)]
)
def test_as_many_rounds_are_under_way_as_two_buckets_have_room_for(slot_bytes, expected):
    stage: CompiledStage = Sized(slot_bytes)
    assert num_slots(stage, 1000) == expected
    assert num_slots(replace(stage, rounds=stage.rounds[:1]), 1000) == 1


def test_slots_do_not_overlap_and_small_ones_keep_their_memory():
    workspace = Workspace()
    first = workspace.slots(3, 1000, CPU)
    spans = sorted((slot.data_ptr(), slot.data_ptr() + slot.numel()) for slot in first)
    assert [slot.numel() for slot in first] == [1000] * 3
    assert all(stop <= start and start % 8 == 0 for (_, stop), (start, _) in pairwise(spans))
    assert workspace.slots(2, 900, CPU)[0].data_ptr() == first[0].data_ptr(), "the same memory again"
    large = workspace.slots(2, KEPT_BYTES, CPU)
    assert large[0].numel() == KEPT_BYTES and large[0].data_ptr() != large[1].data_ptr()
    assert workspace.slots(1, 1000, CPU)[0].data_ptr() == first[0].data_ptr(), "large slots are not kept"

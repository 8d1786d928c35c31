"""Bytes gathered from the params, and scattered to them, are those that packing would send."""

import ctypes

import pytest
import torch

from refit.plan import build_plan
from refit.transfer import compiled as compiled_module
from refit.transfer import gather as gather_module
from refit.transfer.compiled import compile_stage
from refit.transfer.gather import SLOT, Gather, Rows, rows_of_moves
from refit.transfer.memory import as_bits, as_bytes, strided_box
from refit.transfer.runs import LiveParams
from tests.transfer.cases import empty_params, fill_params, make_case, param_dtypes

CPU = torch.device("cpu")


def bytes_at(pieces):
    return b"".join(ctypes.string_at(address, size) for address, size in pieces.table.tolist())


def packed(parcel, params):
    """The bytes of a parcel, box by box; zeros between them."""
    found = torch.zeros(parcel.num_bytes, dtype=torch.uint8)
    for move in parcel.moves:
        segment = move.segment
        box = strided_box(params[segment.param], segment.shape, segment.strides, segment.offset)
        values = box.to(move.wire) if move.is_cast else box
        found[move.start_byte : move.start_byte + move.num_bytes] = as_bytes(values.contiguous())
    return found


@pytest.mark.parametrize("shortest_bytes", [1, 64, 1 << 30])
@pytest.mark.parametrize("seed", range(8))
def test_what_is_gathered_for_a_peer_is_what_packing_sends(seed, shortest_bytes, monkeypatch):
    monkeypatch.setattr(gather_module, "SHORTEST_BYTES", shortest_bytes)
    monkeypatch.setattr(gather_module, "MOST_LISTED", 3)
    case = make_case(seed, 2, 3, num_tensors=12, largest_dim=64)
    plan = build_plan(case.train, case.gen, case.options)
    seen = set()
    for rank in range(2):
        manifest = case.manifest(rank)
        params = empty_params(manifest)
        fill_params(params, case, manifest, seed, 0)
        for stage_plan in plan.rank_plan(rank).stages:
            stage = compile_stage(plan, stage_plan, rank, param_dtypes(manifest), CPU, gathers=True)
            live = LiveParams(params, stage.params, stage.reach_bytes)
            for round_ in stage.rounds:
                slot = torch.full((round_.slot_bytes,), 0x5A, dtype=torch.uint8)
                expected = {}
                for parcel in round_.sends:
                    whole = packed(parcel, params)
                    if parcel.rows is None:
                        slot[parcel.slot_byte : parcel.slot_byte + parcel.num_bytes] = whole
                    seen.add(parcel.rows is None)
                    expected[parcel.peer] = expected.get(parcel.peer, b"") + bytes(whole.tolist())
                places = torch.cat([live.addresses, torch.tensor([slot.data_ptr()])])
                found = {part.peer: bytes_at(part.pieces(places)) for part in round_.gathered_sends}
                assert found == expected
    assert (shortest_bytes > 1) in seen, "parcels that are packed, or, if any rows will do, some that are not"


def test_runs_that_touch_are_one_piece_and_equal_boxes_one_part():
    runs = [Rows(0, 0, (), (), 8), Rows(0, 8, (), (), 8), Rows(1, 16, (), (), 8)]
    places = [
        (0, 64),
        (4, 64),
        (6400, 64),
        (12800, 32),
    ]  # first byte, step of rows; the second follows the first
    boxes = [Rows(2, first, (100, 2), (step, 8), 4) for first, step in places]
    gather = Gather.of(7, [*runs, *boxes])
    assert gather.peer == 7 and len(gather.parts) == 3, "the runs, the equal boxes, and the other one"
    pieces = gather.pieces(torch.tensor([1000, 2000, 10000])).table.tolist()
    assert pieces[:2] == [[1000, 16], [2016, 8]]
    assert pieces[2:] == [
        [10000 + first + row * step + column * 8, 4]
        for first, step in places
        for row in range(100)
        for column in range(2)
    ]


def test_an_empty_parcel_has_no_boxes():
    assert rows_of_moves([], []) == []


def test_a_long_box_weighs_the_same_where_it_lies(monkeypatch):
    monkeypatch.setattr(gather_module, "SHORTEST_BYTES", 1)
    monkeypatch.setattr(compiled_module, "MIN_ALONE_BYTES", 1)
    num_in_place = 0
    for seed in range(4):
        case = make_case(seed, 2, 3, num_tensors=12, largest_dim=64)
        plan = build_plan(case.train, case.gen, case.options)
        manifest = case.manifest(0)
        params = empty_params(manifest)
        fill_params(params, case, manifest, seed, 0)
        for stage_plan in plan.rank_plan(0).stages:
            stage = compile_stage(plan, stage_plan, 0, param_dtypes(manifest), CPU, gathers=True)
            for parcel in stage.parcels:
                if parcel.box_in_place is None:
                    continue
                (move,) = parcel.moves
                segment = move.segment
                param = as_bits(params[segment.param])
                box = strided_box(param, segment.shape, segment.strides, segment.offset)
                sums, expected = torch.zeros((2, len(stage.sums)), dtype=torch.int64)
                parcel.box_in_place.add_box(box, sums)
                parcel.weighing.add(packed(parcel, params), expected)
                assert torch.equal(sums, expected) and bool(sums.any())
                num_in_place += 1
    assert num_in_place > 10


def test_places_are_listed_once_per_slot_as_long_as_the_params_stay_where_they_are():
    params = {"p": torch.zeros(64, dtype=torch.uint8)}
    gather = Gather.of(1, [Rows(0, 8, (), (), 16), Rows(SLOT, 4, (), (), 32)])
    live = LiveParams(params, {"p": torch.uint8}, [64])
    first = live.seen.pieces(gather, 1000)
    assert first.table.tolist() == [[params["p"].data_ptr() + 8, 16], [1004, 32]]
    again = LiveParams(params, {"p": torch.uint8}, [64], live.seen)
    assert again.seen.pieces(gather, 1000) is first
    assert again.seen.pieces(gather, 2000).table.tolist()[1] == [2004, 32]
    params["p"].data = torch.zeros(64, dtype=torch.uint8)
    moved = LiveParams(params, {"p": torch.uint8}, [64], live.seen).seen.pieces(gather, 1000)
    assert moved.table.tolist() == [[params["p"].data_ptr() + 8, 16], [1004, 32]] and not torch.equal(
        moved.table, first.table
    )

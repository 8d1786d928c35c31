"""Parcels: both ends cut them alike, large runs stay in the params, copies are those of a plain indexing loop."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.plan import Bucket, Plan, PlanOptions, Region, Round, Segment, StagePlan, build_plan
from refit.transfer import compiled as compiled_module
from refit.transfer.compiled import Move, alone_bytes, compile_stage
from refit.transfer.errors import TransportError
from refit.transfer.memory import as_bits, strided_box
from refit.transfer.runs import MAX_RUNS, LiveParams, RunsInMaking, is_run, row_major
from tests.transfer.cases import empty_params, fill_params, make_case, param_dtypes, same_bits

CPU = torch.device("cpu")


def compiled_stages(case, plan: Plan):
    """By (joint rank, stage)."""
    return {
        (rank, stage.stage): compile_stage(plan, stage, rank, param_dtypes(case.manifest(rank)), CPU)
        for rank in range(case.num_ranks)
        for stage in plan.rank_plan(rank).stages
    }


@pytest.mark.parametrize("seed", range(12))
def test_both_ends_of_a_pair_cut_a_bucket_into_the_same_parcels(seed, monkeypatch):
    monkeypatch.setattr(compiled_module, "MIN_ALONE_BYTES", 512)
    case = make_case(seed, 2, 3, num_tensors=12, largest_dim=64)
    plan = build_plan(case.train, case.gen, case.options)
    sent, received = {}, {}
    for (rank, stage), found in compiled_stages(case, plan).items():
        for round_ in found.rounds:
            for parcel in round_.sends:
                sent.setdefault((stage, round_.index, rank, parcel.peer), []).append(parcel)
            for parcel in round_.receives:
                received.setdefault((stage, round_.index, parcel.peer, rank), []).append(parcel)
    assert sent.keys() == received.keys() and sent
    for key, parcels in sent.items():
        assert [p.num_bytes for p in parcels] == [p.num_bytes for p in received[key]]
        assert [p.payload_bytes for p in parcels] == [p.payload_bytes for p in received[key]]
        assert [[m.region for m in p.moves] for p in parcels] == [
            [m.region for m in p.moves] for p in received[key]
        ]


@pytest.mark.parametrize("seed", range(6))
def test_a_round_packs_at_most_a_bucket_into_places_that_do_not_overlap(seed, monkeypatch):
    monkeypatch.setattr(compiled_module, "MIN_ALONE_BYTES", 1)
    case = make_case(seed, num_tensors=12, largest_dim=64)
    plan = build_plan(case.train, case.gen, case.options)
    for found in compiled_stages(case, plan).values():
        assert found.slot_bytes <= plan.options.bucket_bytes
        for round_ in found.rounds:
            places = sorted(
                (p.slot_byte, p.slot_byte + p.num_bytes)
                for p in (*round_.sends, *round_.receives)
                if p.slot_byte is not None
            )
            assert all(stop <= start for (_, stop), (start, _) in pairwise(places))
            assert all(start % 16 == 0 and stop <= round_.slot_bytes for start, stop in places)


def stage_of(segments: list[Segment], num_bytes: int) -> StagePlan:
    return StagePlan(0, (0, 1), (Round(0, (Bucket(1, num_bytes, tuple(segments)),), ()),))


def two_rank_plan(options: PlanOptions) -> Plan:
    case = make_case(3, 1, 1, num_tensors=6)
    return build_plan(
        case.train, case.gen, PlanOptions(options.bucket_bytes, options.max_ops_per_round, (r"t\d+\..*",))
    )


def segment(tensor: str, rows: int, columns: int, start_byte: int, stride: int | None = None) -> Segment:
    """rows x columns of bytes, of a param of the same name."""
    shape = (rows, columns)
    return Segment(
        tensor, Region((0, 0), shape), tensor, 0, shape, (stride or columns, 1), "uint8", start_byte
    )


def parcels_of(segments: list[Segment], num_bytes: int, dtype: str = "uint8"):
    plan = two_rank_plan(PlanOptions(1 << 20))
    names = {s.tensor: dtype for s in segments}
    return compile_stage(plan, stage_of(segments, num_bytes), 0, names, CPU).rounds[0].sends


LARGE = 256 << 10


def test_a_large_segment_travels_alone_and_what_is_one_run_stays_in_its_param():
    small = [segment("t0.weight", 1, 16, 0), segment("t1.weight", 1, 5, 16)]
    alone = segment("t2.weight", 256, 1024, 32)
    strided = segment("t3.weight", 256, 1024, 32 + LARGE, stride=2048)
    below = segment("t4.weight", 255, 1024, 32 + 2 * LARGE)
    found = parcels_of([*small, alone, strided, below], 32 + 3 * LARGE)
    assert [len(parcel.moves) for parcel in found] == [2, 1, 1, 1]
    assert [parcel.num_bytes for parcel in found] == [21, LARGE, LARGE, LARGE - 1024]
    assert [parcel.slot_byte for parcel in found] == [0, None, 32, None]
    assert [parcel.moves[-1].start_byte for parcel in found] == [16, 0, 0, 0]
    (cast,) = parcels_of([segment("t2.weight", 256, 1024, 0)], LARGE, "float32")
    assert cast.slot_byte == 0 and len(cast.boxes) == 1, (
        "the param has another dtype, so it must be cast into the slot"
    )


def test_a_segment_alone_grows_with_the_bucket_so_that_operations_stay_bounded():
    assert alone_bytes(PlanOptions(1 << 20)) == 256 << 10
    large = PlanOptions(1 << 30, 64)
    assert alone_bytes(large) * 64 >= 4 * large.bucket_bytes


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, strides and param elements of a box in a param of any dim order with gaps."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=4)))
    order = draw(st.permutations(range(len(shape))))
    strides, step = [0] * len(shape), 1
    for dim in order:
        strides[dim] = step
        step *= shape[dim] + draw(st.integers(0, 2))
    return shape, tuple(strides), step


@settings(max_examples=150, deadline=None)
@given(st.lists(boxes(), min_size=1, max_size=4), st.sampled_from(["uint8", "bfloat16", "float32"]))
def test_runs_and_boxes_together_pack_every_element_and_unpack_puts_it_back(found, dtype):
    making = RunsInMaking({f"p{i}": dtype for i in range(len(found))}, CPU)
    params, moves, end = {}, [], 0
    for number, (shape, strides, size) in enumerate(found):
        name = f"p{number}"
        params[name] = (
            torch.randint(0, 255, (size + 7, 4), dtype=torch.uint8).view(getattr(torch, dtype)).reshape(-1)
        )
        region = Region((0,) * len(shape), shape)
        part = Segment("t0.weight", region, name, 3, shape, strides, dtype, end)
        moves.append(Move.of(part, 0, making.dtype(name)))
        end += -(-moves[-1].num_bytes // 16) * 16
    runs, rest = making.of(moves)
    live = LiveParams(params, making.dtypes, making.reach_bytes)
    packed = torch.zeros(end, dtype=torch.uint8)
    runs.copy(live, packed, is_pack=True)
    rest_names = {move.segment.param for move in rest}
    blank = {name: torch.zeros_like(param) for name, param in params.items()}
    runs.copy(LiveParams(blank, making.dtypes, making.reach_bytes), packed, is_pack=False)
    for move, (shape, strides, _) in zip(moves, found, strict=True):
        box = strided_box(params[move.segment.param], shape, strides, 3)
        assert is_run(shape, strides) == as_bits(box).is_contiguous() or move.num_bytes == 0
        if move.segment.param in rest_names:
            assert not move.is_run and blank[move.segment.param].count_nonzero() == 0
            continue  # left to torch
        bits = packed[move.start_byte : move.start_byte + move.num_bytes].view(move.bits).view(shape)
        assert torch.equal(bits, as_bits(box))
        assert same_bits(strided_box(blank[move.segment.param], shape, strides, 3), box)
        written = torch.zeros_like(params[move.segment.param])
        strided_box(written, shape, strides, 3).copy_(box)
        assert same_bits(blank[move.segment.param], written), "elements outside of the box were written"


def test_a_box_of_few_runs_is_copied_run_by_run_and_one_of_many_is_left_to_torch():
    making = RunsInMaking({"p": "uint8"}, CPU)
    making.dtype("p")
    few, many = (
        Move.of(segment("p", rows, 8, 0, stride=9), 0, torch.uint8) for rows in (MAX_RUNS, MAX_RUNS + 1)
    )
    assert len(making.of([few])[0].num_bytes) == MAX_RUNS and making.of([few])[1] == ()
    assert making.of([many])[0].num_bytes == () and making.of([many])[1] == (many,)


def test_neighbours_on_both_ends_are_one_run_and_others_are_not():
    making = RunsInMaking({"p": "uint8"}, CPU)
    making.dtype("p")

    def at(offset: int, start_byte: int) -> Move:
        return Move.of(
            Segment("t", Region((0,), (16,)), "p", offset, (16,), (1,), "uint8", start_byte), 0, torch.uint8
        )

    assert making.of([at(0, 0), at(16, 16), at(32, 48), at(64, 64)])[0].num_bytes == (32, 16, 16)


@pytest.mark.parametrize(
    ("param", "words"),
    [
        (torch.zeros(64, dtype=torch.int16), "compiled for"),
        (torch.zeros(63, dtype=torch.uint8), "reaches 64 bytes"),
    ],
)
def test_a_param_that_changed_since_the_transfer_was_compiled_is_refused(param, words):
    with pytest.raises(TransportError, match=words):
        LiveParams({"p": param}, {"p": torch.uint8}, [64])


def test_a_param_that_is_a_view_may_be_reached_into_up_to_the_end_of_its_memory():
    memory = torch.zeros(8, 16, dtype=torch.uint8)
    view = memory[:, :4]
    assert LiveParams({"p": view}, {"p": torch.uint8}, [128]).addresses.tolist() == [memory.data_ptr()]
    with pytest.raises(TransportError, match="128"):
        LiveParams({"p": memory[1:, :4]}, {"p": torch.uint8}, [128])


def test_row_major_strides_are_those_of_a_contiguous_tensor():
    for shape in ((), (3,), (2, 3), (4, 1, 5)):
        assert row_major(shape) == torch.empty(shape).stride()


def test_what_a_stage_sums_up_is_what_it_was_filled_with():
    case = make_case(1, 1, 1)
    manifest = case.manifest(0)
    params = empty_params(manifest)
    fill_params(params, case, manifest, 1, 0)
    plan = build_plan(case.train, case.gen, case.options)
    (stage,) = plan.rank_plan(0).stages
    found = compile_stage(plan, stage, 0, param_dtypes(manifest), CPU)
    assert found.payload_bytes[0] == sum(p.payload_bytes for p in found.parcels) > 0
    assert {tensor for tensor, _ in found.sums} == {t.name for t in plan.tensors.values() if t.kind == "bulk"}


def test_params_seen_before_are_not_looked_at_again_and_any_other_tensor_is():
    param = torch.zeros(64, dtype=torch.uint8)
    seen = LiveParams({"p": param}, {"p": torch.uint8}, [64]).seen
    assert LiveParams({"p": param}, {"p": torch.uint8}, [64], seen).seen is seen
    other = torch.zeros(63, dtype=torch.uint8)
    with pytest.raises(TransportError, match="reaches 64 bytes"):
        LiveParams({"p": other}, {"p": torch.uint8}, [64], seen)
    param.data = torch.zeros(64, dtype=torch.int8)
    with pytest.raises(TransportError, match="compiled for"):
        LiveParams({"p": param}, {"p": torch.uint8}, [64], seen)
    alias = torch.zeros(64, dtype=torch.uint8)
    seen = LiveParams({"p": alias}, {"p": torch.uint8}, [64]).seen
    assert LiveParams({"p": alias[:]}, {"p": torch.uint8}, [64], seen).seen is not seen, (
        "another tensor there"
    )

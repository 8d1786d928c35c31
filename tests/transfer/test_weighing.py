"""The digest of a parcel is the sum of the digests of its segments, however it is worked out."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite.binding import ffi

from refit.plan import Region, Segment
from refit.transfer.compiled import Move
from refit.transfer.digest import MASK, digest
from refit.transfer.kernels import words as words_module
from refit.transfer.memory import bits_dtype, torch_dtype
from refit.transfer.runs import row_major
from refit.transfer.weighing import WeighingInMaking

CPU = torch.device("cpu")


def moves_of(boxes: list[tuple[str, Region, str]], gap: int = 16) -> list[Move]:
    """Segments one after the other, each at a multiple of `gap` bytes."""
    moves, end = [], 0
    for tensor, region, dtype in boxes:
        part = Segment(tensor, region, "p", 0, region.shape, row_major(region.shape), dtype, end)
        moves.append(Move.of(part, 0, torch_dtype(dtype)))
        end += -(-moves[-1].num_bytes // gap) * gap
    return moves


def require_right_sums(moves: list[Move], shapes: dict[str, tuple[int, ...]], shift: int = 0) -> None:
    """Weigh random bytes twice, that begin `shift` bytes after an aligned address."""
    making = WeighingInMaking(shapes, CPU)
    weighing = making.of(moves, 7)
    num_bytes = moves[-1].start_byte + moves[-1].num_bytes
    payload = torch.randint(0, 256, (num_bytes + shift,), dtype=torch.uint8)[shift:]
    expected = dict.fromkeys(making.sums, 0)
    for move in moves:
        shape = shapes[move.segment.tensor]
        raw = payload[move.start_byte : move.start_byte + move.num_bytes].clone()
        box = raw.view(bits_dtype(move.wire)).view(move.region.shape)
        key = (move.segment.tensor, 7)
        expected[key] = (expected[key] + 2 * digest(box, move.region, shape)) & MASK
    sums = torch.zeros(len(making.sums), dtype=torch.int64)
    weighing.add(payload, sums)
    weighing.add(payload, sums)
    assert [value & MASK for value in sums.tolist()] == list(expected.values())


@st.composite
def parcels(draw: st.DrawFn) -> tuple[list[tuple[str, Region, str]], dict[str, tuple[int, ...]]]:
    """Layers that repeat a few boxes, some of them of single experts, some cut inside a word."""
    dtype = draw(st.sampled_from(["uint8", "bfloat16", "float32", "int64"]))
    shapes, kinds = {}, []
    for _ in range(draw(st.integers(1, 3))):
        starts = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
        sizes = tuple(draw(st.sampled_from([1, 2, 4, 8, 16])) for _ in starts)
        kinds.append(Region(starts, tuple(a + b for a, b in zip(starts, sizes, strict=True))))
    boxes = []
    for layer in range(draw(st.integers(1, 5))):
        for number, region in enumerate(kinds):
            name = f"t{layer}.{number}"
            shapes[name] = tuple(stop + 1 for stop in region.stops)
            boxes.append((name, region, dtype))
    return boxes, shapes


@settings(max_examples=120, deadline=None)
@given(parcels(), st.integers(0, 1 << 20))
def test_a_parcel_weighs_as_much_as_its_segments(parcel, seed):
    boxes, shapes = parcel
    torch.manual_seed(seed)
    require_right_sums(moves_of(boxes), shapes)


def test_layers_that_repeat_are_weighed_in_one_product_per_kind_of_box():
    kinds = [Region((0, 0), (8, 16)), Region((4,), (20,)), Region((0, 8), (4, 16))]
    boxes = [(f"t{layer}.{i}", region, "bfloat16") for layer in range(50) for i, region in enumerate(kinds)]
    shapes = {name: (32,) * len(region.starts) for name, region, _ in boxes}
    making = WeighingInMaking(shapes, CPU)
    weighing = making.of(moves_of(boxes), 0)
    assert [chain.count for chain in weighing.chains] == [50, 50, 50] and not weighing.odd
    require_right_sums(moves_of(boxes), shapes)


def test_experts_share_their_weights_and_still_differ():
    boxes = [("t", Region((expert, 0, 0), (expert + 1, 4, 8)), "bfloat16") for expert in range(6)]
    making = WeighingInMaking({"t": (6, 4, 8)}, CPU)
    (chain,) = making.of(moves_of(boxes), 0).chains
    assert chain.count == 6 and len(set(chain.scales.tolist())) == 6
    require_right_sums(moves_of(boxes), {"t": (6, 4, 8)})


def test_a_change_of_distance_begins_a_new_chain():
    region = Region((0,), (8,))
    boxes = [(f"t{i}", region if i != 2 else Region((0,), (24,)), "bfloat16") for i in range(5)]
    shapes = {name: (24,) for name, _, _ in boxes}
    weighing = WeighingInMaking(shapes, CPU).of(moves_of(boxes), 0)
    assert sorted(chain.count for chain in weighing.chains) == [1, 2, 2]
    require_right_sums(moves_of(boxes), shapes)


@pytest.mark.parametrize("shift", [0, 1, 2, 4, 8])
def test_a_param_that_is_not_aligned_to_words_is_weighed_all_the_same(shift):
    require_right_sums(moves_of([("t", Region((0, 0), (4, 32)), "uint8")]), {"t": (4, 32)}, shift)
    require_right_sums(moves_of([("t", Region((0, 3), (4, 30)), "uint8")]), {"t": (4, 32)}, shift)


def test_weights_of_a_box_that_is_one_long_row_are_not_kept():
    region = Region((0,), (1 << 17,))
    making = WeighingInMaking({"t": (1 << 17,)}, CPU)
    weighing = making.of(moves_of([("t", region, "bfloat16")]), 0)
    assert not weighing.chains and len(weighing.odd) == 1
    require_right_sums(moves_of([("t", region, "bfloat16")]), {"t": (1 << 17,)})


def test_torch_weighs_a_chain_of_matrices_as_the_compiled_loop_does():
    boxes = [(f"t{i}", Region((i, 0), (i + 8, 64)), "bfloat16") for i in (3, 3, 3)]
    moves = moves_of([(f"{name}{number}", *box) for number, (name, *box) in enumerate(boxes)], gap=4096)
    making = WeighingInMaking({move.segment.tensor: (64, 64) for move in moves}, CPU)
    (chain,) = making.of(moves, 0).chains
    assert chain.count == 3 and chain.row_weights.numel() == 8 and chain.stride == 512
    words = torch.randint(-(2**63), 2**63 - 1, (3 * 512,), dtype=torch.int64)
    sums = torch.tensor([1, 2, 3], dtype=torch.int64)
    chain.add(words, sums)
    assert torch.equal(sums, torch.tensor([1, 2, 3]) + chain.digests(words))


def test_a_loop_that_numba_finds_no_folder_for_is_compiled_all_the_same():
    made: dict[str, Any] = {}
    exec("def double(of, found):\n    found[0] = 2 * of[0]", made)  # no file, so nothing to keep it beside
    found = torch.zeros(1, dtype=torch.int64)
    words_module._compiled(made["double"], "int64[::1]", "int64[::1]")(
        torch.ones(1, dtype=torch.int64).numpy(), found.numpy()
    )
    assert found.item() == 2


@pytest.mark.parametrize(
    ("other", "dtype"), [(Region((0,), (16,)), "uint8"), (Region((0, 0), (1, 16)), "bfloat16")]
)
def test_boxes_that_only_look_alike_do_not_share_weights(other, dtype):
    boxes = [("a", Region((0,), (16,)), "bfloat16"), ("b", other, dtype)]
    require_right_sums(moves_of(boxes), {"a": (16,), "b": other.stops})


def test_the_library_that_compiles_does_not_pass_a_function_for_a_dict():
    assert not hasattr(ffi.lib, "__dict__"), "vLLM looks at every name of every module, and fails at this one"
    assert callable(ffi.lib.LLVMPY_GetVersionInfo)

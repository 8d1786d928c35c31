"""Pack, unpack, cast and digest kernels against torch views, bit for bit, under Triton's interpreter."""

import json
import os
import random
import subprocess
import sys
from math import prod

import pytest
import torch

from refit.plan import PlanError
from refit.transfer.digest import whole_digest
from refit.transfer.kernels import reference
from refit.transfer.kernels.table import (
    CAST,
    COPY_BLOCK,
    COPY_FIELDS,
    DIGEST_FIELDS,
    WIDE,
    Box,
    copy_table,
    digest_table,
)
from tests.transfer.interpreted import interpreted_kernels

CPU = torch.device("cpu")
SAME = [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn, torch.int64]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
CASTS = [(stored, wire) for stored in FLOATS for wire in FLOATS if stored != wire]
NUM_SUMS = 3


@pytest.fixture(scope="module")
def kernels():
    with interpreted_kernels() as module:
        yield module


def make_bucket(seed: int) -> tuple[list[torch.Tensor], list[Box], int]:
    """Params, boxes of some of their elements, and the size of the bucket: any rank, order, padding and dtype."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    params: list[torch.Tensor] = []
    boxes: list[Box] = []
    end = 0
    for number in range(rng.randint(1, 4)):
        same = rng.choice(SAME)
        stored, wire = rng.choice([(same, same), rng.choice(CASTS)])
        num_dims = rng.choice([0, 1, 2, 2, 3, 4, 5])
        largest = rng.choice([3, 7, 12]) if num_dims < 4 else 3
        shape = [rng.randint(1, largest) for _ in range(num_dims)]
        padding = rng.choice([0, 0, 1, 8])
        param = contents([size + padding for size in shape], stored, is_cast=stored != wire)
        order = list(range(num_dims))
        if rng.random() < 0.3:
            rng.shuffle(order)
        strides = param.stride()
        offset = sum(rng.randint(0, padding) * stride for stride in strides)
        shape, strides = tuple(shape[dim] for dim in order), tuple(strides[dim] for dim in order)
        starts = tuple(rng.randint(0, 11) for _ in shape)
        boxes.append(Box(number, stored, wire, offset, shape, strides, end, starts, rng.randrange(NUM_SUMS)))
        params.append(param)
        end += -(-prod(shape) * wire.itemsize // 16) * 16
    return params, boxes, end


def contents(shape: list[int], dtype: torch.dtype, is_cast: bool) -> torch.Tensor:
    """Any bits, or normal floats where a cast follows."""
    if is_cast:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, 256, (prod(shape) * dtype.itemsize,), dtype=torch.uint8).view(dtype).view(shape)


def as_flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def digests_of(kernels, boxes, params, payload, *, of_bucket: bool) -> torch.Tensor:
    sums = torch.zeros(NUM_SUMS, dtype=torch.int64)
    table = digest_table(boxes, CPU, of_bucket=of_bucket)
    kernels.add_digests(table, kernels.base_addresses(params, CPU), payload, sums)
    return sums


@pytest.mark.parametrize("seed", range(20))
def test_pack_unpack_and_digests_of_any_bucket_are_those_of_torch_views(kernels, seed):
    params, boxes, num_bytes = make_bucket(seed)
    bases = kernels.base_addresses(params, CPU)
    table = copy_table(boxes, CPU)
    packed, expected = (torch.full((num_bytes,), 0xA5, dtype=torch.uint8) for _ in range(2))
    kernels.pack(table, bases, packed)
    reference.pack(boxes, params, expected)
    assert torch.equal(packed, expected)

    got, wanted = ([torch.zeros_like(param) for param in params] for _ in range(2))
    kernels.unpack(table, kernels.base_addresses(got, CPU), packed)
    reference.unpack(boxes, wanted, packed)
    for left, right in zip(got, wanted, strict=True):
        assert torch.equal(as_flat_bytes(left), as_flat_bytes(right))

    sums = torch.zeros(NUM_SUMS, dtype=torch.int64)
    reference.add_digests(boxes, [reference.packed_box(box, packed) for box in boxes], sums)
    assert torch.equal(digests_of(kernels, boxes, params, packed, of_bucket=True), sums)
    uncast = [box for box in boxes if box.stored == box.wire]
    sums = torch.zeros(NUM_SUMS, dtype=torch.int64)
    reference.add_digests(uncast, [reference.param_box(box, params) for box in uncast], sums)
    assert torch.equal(digests_of(kernels, uncast, params, packed, of_bucket=False), sums)


def field(table, name: str, names=COPY_FIELDS) -> list[int]:
    return table.rows[:, names.index(name)].tolist()


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "kind"),
    [
        ((64, 64), (64, 1), 0, WIDE),
        ((64, 56), (64, 1), 8, WIDE),  # a column cut whose runs are multiples of 16 bytes
        ((64, 60), (64, 1), 4, 3),
        ((64, 62), (64, 1), 2, 2),
        ((64, 63), (64, 1), 0, 1),
        ((64, 64), (1, 64), 0, 1),  # transposed
    ],
)
def test_a_box_is_copied_in_the_widest_units_that_fit_and_over_many_tiles(
    kernels, shape, strides, offset, kind
):
    param = torch.randint(0, 1 << 15, (64 * 64,), dtype=torch.int16).view(torch.bfloat16)
    box = Box(0, torch.bfloat16, torch.bfloat16, offset, shape, strides, 16, (0, 0), 0)
    table = copy_table([box], CPU)
    assert field(table, "kind") == [kind]
    packed, expected = (torch.zeros(16 + 2 * 64 * 64, dtype=torch.uint8) for _ in range(2))
    kernels.pack(table, kernels.base_addresses([param], CPU), packed)
    reference.pack([box], [param], expected)
    assert torch.equal(packed, expected)
    assert table.num_tiles == -(-64 * 64 // COPY_BLOCK) or kind in (WIDE, 2, 3)


def test_rows_longer_than_a_tile_and_more_rows_than_steps_are_walked_to_their_ends(kernels):
    long = torch.randn(3, 5000)
    tall = torch.randn(600, 12)
    boxes = [
        Box(0, long.dtype, long.dtype, 1, (3, 4997), (5000, 1), 0, (0, 0), 0),
        Box(1, tall.dtype, tall.dtype, 0, (600, 12), (12, 1), 59968, (0, 0), 1),
    ]
    params = [long, tall]
    packed, expected = (torch.zeros(59968 + 600 * 48, dtype=torch.uint8) for _ in range(2))
    kernels.pack(copy_table(boxes, CPU), kernels.base_addresses(params, CPU), packed)
    reference.pack(boxes, params, expected)
    assert torch.equal(packed, expected)
    sums = [
        total % (1 << 64) for total in digests_of(kernels, boxes, params, packed, of_bucket=True).tolist()
    ]
    assert sums[:2] == [whole_digest(long[:, 1:4998]), whole_digest(tall)]
    assert torch.equal(
        digests_of(kernels, boxes, params, packed, of_bucket=False),
        digests_of(kernels, boxes, params, packed, of_bucket=True),
    )


def test_every_rounding_case_of_a_cast_is_torchs_own(kernels):
    high = torch.arange(0, 1 << 16, 7, dtype=torch.int64) << 16
    bits = torch.cat([high + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001)])
    values = ((bits + (1 << 31)) % (1 << 32) - (1 << 31)).to(torch.int32).view(torch.float32)
    values = values[~values.isnan()]
    for wire in (torch.bfloat16, torch.float16):
        box = Box(0, torch.float32, wire, 0, (values.numel(),), (1,), 0, (0,), 0)
        packed = torch.zeros(2 * values.numel(), dtype=torch.uint8)
        kernels.pack(copy_table([box], CPU), kernels.base_addresses([values], CPU), packed)
        assert torch.equal(packed, as_flat_bytes(values.to(wire)))


def test_a_nan_stays_a_nan_through_a_cast(kernels):
    values = torch.tensor([float("nan"), -float("nan")])
    box = Box(0, torch.float32, torch.bfloat16, 0, (2,), (1,), 0, (0,), 0)
    packed = torch.zeros(4, dtype=torch.uint8)
    kernels.pack(copy_table([box], CPU), kernels.base_addresses([values], CPU), packed)
    assert packed.view(torch.bfloat16).isnan().all()


def test_a_bucket_of_many_boxes_is_one_table_and_so_one_launch(kernels, monkeypatch):
    param = torch.arange(64 * 16, dtype=torch.int32)
    boxes = [Box(0, param.dtype, param.dtype, 16 * n, (4, 4), (4, 1), 64 * n, (0, 0), 0) for n in range(64)]
    launches = []
    kernel = kernels.copy_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(kernels, "copy_kernel", Counted())
    packed = torch.zeros(64 * 64, dtype=torch.uint8)
    kernels.pack(copy_table(boxes, CPU), kernels.base_addresses([param], CPU), packed)
    assert torch.equal(packed, as_flat_bytes(param))
    assert launches == [(64,)]


def test_equal_boxes_share_their_weights_and_whole_words_are_read_as_words():
    boxes = [
        Box(n, torch.bfloat16, torch.bfloat16, 0, (8, 64), (64, 1), 1024 * n, (0, 0), n) for n in range(3)
    ]
    made = digest_table(boxes, CPU, of_bucket=False)
    assert made.weights.numel() == 1 + 8 + 16
    assert field(made.table, "item", DIGEST_FIELDS) == [-2] * 3
    odd = digest_table(
        [Box(0, torch.bfloat16, torch.bfloat16, 0, (8, 63), (64, 1), 0, (0, 1), 0)], CPU, of_bucket=False
    )
    assert (field(odd.table, "item", DIGEST_FIELDS), field(odd.table, "lead", DIGEST_FIELDS)) == ([2], [1])


def test_what_no_kernel_can_do_is_refused(kernels):
    with pytest.raises(PlanError, match=r"no kernel casts torch\.float32 to torch\.uint8"):
        Box(0, torch.float32, torch.uint8, 0, (1,), (1,), 0, (0,), 0)
    with pytest.raises(PlanError, match="differ in length"):
        Box(0, torch.float32, torch.float32, 0, (1, 2), (1,), 0, (0,), 0)
    cast = Box(0, torch.float32, torch.bfloat16, 0, (4,), (1,), 0, (0,), 0)
    assert field(copy_table([cast], CPU), "kind") == [CAST]
    with pytest.raises(PlanError, match="digest the bucket"):
        digest_table([cast], CPU, of_bucket=False)
    with pytest.raises(PlanError, match="not a multiple of 16"):
        kernels.base_addresses([torch.zeros(8)[1:]], CPU)


COMPILE = """
import json, re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from refit.transfer.kernels.programs import copy_kernel, digest_kernel
tables = {"bases": "*i64", "payload": "*u8", "rows": "*i64", "tile_rows": "*i32"}
sums = {"weights": "*i64", "sums": "*i64"}
found = {}
for name, kernel, given, fixed in (
    ("pack", copy_kernel, tables, {"IS_PACK": True, "FIELDS": 16, "BLOCK": 2048}),
    ("unpack", copy_kernel, tables, {"IS_PACK": False, "FIELDS": 16, "BLOCK": 2048}),
    ("digest", digest_kernel, {**tables, **sums}, {"FIELDS": 20, "BLOCK": 512, "STEPS": 8}),
):
    source = ASTSource(kernel, {**given, **dict.fromkeys(fixed, "constexpr")}, fixed)
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    found[name] = [len(re.findall(p, ptx)) for p in (r"ld.global.v2.b64", r"st.global.v2.b64", r"\\.local\\b")]
print(json.dumps(found))
"""


def test_the_kernels_compile_for_hopper_with_16_byte_accesses_and_without_spills():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["pack"][0] > 0 and found["pack"][1] > 0
    assert found["unpack"][:2] == found["pack"][:2]
    assert [counts[2] for counts in found.values()] == [0, 0, 0]

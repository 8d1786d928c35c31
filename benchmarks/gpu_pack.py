"""Pack, unpack, cast and digest of whole buckets on one GPU, as a share of its copy bandwidth. Prints one JSON line.

    python benchmarks/gpu_pack.py                 # one CUDA device, seconds
    python benchmarks/gpu_pack.py --tiny          # small buckets; without a GPU under Triton's interpreter, no times

Boxes are those that a rank of a real plan sends: QKV groups, expert halves, column cuts, and a cast to bfloat16; and
the matrices of a rank, quantized to FP8 blocks on their way into the bucket. Bytes are compared with torch views and
the codec before anything is timed. A share is the bytes that a kernel reads and writes per second over those of a
device-to-device copy of the same bucket in the same run (`digest_share`: bucket bytes per second over the copy's bucket
bytes per second, since a digest writes nothing). Seconds are medians over the repeats.
"""

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refit.plan import PlanOptions, build_plan
from refit.plan.synth.config import load_model
from refit.plan.synth.gen import gen_manifest
from refit.plan.synth.parallel import parse_gen, parse_train
from refit.plan.synth.train import train_manifest
from refit.transfer.kernels import fp8, reference, triton_bucket
from refit.transfer.kernels.table import WIDE_BYTES, Box, copy_table, digest_table
from refit.transfer.memory import as_bits, as_bytes, torch_dtype
from refit.transfer.precision.codecs import codec_of

PACK_TARGET, DIGEST_TARGET, QUANTIZE_TARGET = 0.85, 0.8, 0.8
FP8_CODEC = codec_of("fp8")
TINY_BYTES = 48 << 10


@dataclass(frozen=True, slots=True)
class Case:
    """What trainer 0 sends of the tensors that match `pattern`, in one layout of a published model."""

    name: str
    model: str
    train: str
    gen: str
    pattern: str


CASES = (
    Case("qkv_groups", "qwen3-4b", "tp=2", "tp=4", r".*\.[qkv]_proj\.weight"),
    Case("column_cuts", "qwen3-4b", "tp=2", "tp=4", r".*\.(o|down)_proj\.weight"),
    Case("expert_halves", "qwen3-30b-a3b", "ep=8", "tp=4", r".*experts.*\.(gate|up)_proj\.weight"),
    Case("cast_to_bf16", "qwen3-4b", "tp=2,dtype=float32", "tp=4", r".*\.(gate|up)_proj\.weight"),
)


@dataclass(frozen=True, slots=True)
class BucketCase:
    """Params of one rank on the device, and boxes of them that fill one bucket of `num_bytes`."""

    params: tuple[Tensor, ...]
    boxes: tuple[Box, ...]
    num_bytes: int

    @property
    def touched_bytes(self) -> int:
        """Bytes read and written by a pack or an unpack."""
        return sum(
            torch.Size(box.shape).numel() * (box.stored.itemsize + box.wire.itemsize) for box in self.boxes
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--bucket-mib", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.tiny:
        parser.error("no CUDA device is here; --tiny checks the bytes under Triton's interpreter")
    device = torch.device("cuda" if on_gpu else "cpu")
    limit = TINY_BYTES if options.tiny else options.bucket_mib << 20
    rows = [run_case(case, device, limit, options.repeats) for case in CASES]
    rows.append(run_quantize(device, limit, options.repeats))
    line = {
        "benchmark": "gpu_pack",
        "commit": commit(),
        "hardware": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, interpreted",
        "targets": {
            "pack": PACK_TARGET,
            "unpack": PACK_TARGET,
            "digest": DIGEST_TARGET,
            "quantize": QUANTIZE_TARGET,
        },
        "cases": rows,
    }
    print(json.dumps(line))
    return 0


def run_case(case: Case, device: torch.device, limit_bytes: int, repeats: int) -> dict[str, object]:
    """Compare the bytes, then time on a GPU."""
    bucket = make_bucket(case, device, limit_bytes)
    table = copy_table(bucket.boxes, device)
    digests = digest_table(bucket.boxes, device, of_bucket=True)
    bases = triton_bucket.base_addresses(bucket.params, device)
    packed = torch.zeros(bucket.num_bytes, dtype=torch.uint8, device=device)
    sums = torch.zeros(len(bucket.boxes), dtype=torch.int64, device=device)
    calls: dict[str, Callable[[], object]] = {
        "pack": lambda: triton_bucket.pack(table, bases, packed),
        "unpack": lambda: triton_bucket.unpack(table, bases, packed),
        "digest": lambda: triton_bucket.add_digests(digests, bases, packed, sums),
    }
    require_equal_bytes(bucket, calls, packed, sums)
    row: dict[str, object] = {
        "name": case.name,
        "bytes": bucket.num_bytes,
        "boxes": len(bucket.boxes),
        "tiles": table.num_tiles,
        "equal": True,
    }
    return row | (shares(bucket, calls, packed, repeats) if device.type == "cuda" else {})


def run_quantize(device: torch.device, limit_bytes: int, repeats: int) -> dict[str, object]:
    """The same for the kernel that quantizes on the way into the bucket."""
    bucket = make_quantize_case(device, limit_bytes)
    tables = fp8.quantize_tables(bucket.pieces, device)
    fp8.quantize(tables)
    require_equal_blocks(bucket)
    row: dict[str, object] = {
        "name": "quantize_fp8",
        "bytes": bucket.memory.nbytes,
        "boxes": len(bucket.pieces),
        "tiles": sum(len(table.tile_rows) for table in tables),
        "equal": True,
    }
    if device.type != "cuda":
        return row
    other = torch.empty_like(bucket.memory)
    median = median_seconds(
        {"copy": lambda: other.copy_(bucket.memory), "quantize": lambda: fp8.quantize(tables)}, repeats
    )
    copy_rate = 2 * bucket.memory.nbytes / median["copy"]
    share = bucket.touched_bytes / median["quantize"] / copy_rate
    return row | {
        "copy_gb_per_s": copy_rate / 1e9,
        **{f"{name}_s": value for name, value in median.items()},
        "quantize_share": share,
        "reached": share >= QUANTIZE_TARGET,
    }


def make_bucket(case: Case, device: torch.device, limit_bytes: int) -> BucketCase:
    """Take segments of the real plan until the bucket is full; the last one is cut to fit."""
    model = load_model(case.model)
    train = train_manifest(model, parse_train(case.train))
    plan = build_plan(train, gen_manifest(model, parse_gen(case.gen)), PlanOptions(1 << 30))
    sent = [
        segment
        for stage in plan.rank_plan(0).stages
        for round_ in stage.rounds
        for bucket in round_.sends
        for segment in bucket.segments
        if re.fullmatch(case.pattern, segment.tensor)
    ]
    assert sent, f"{case.name}: trainer 0 sends nothing that matches {case.pattern}"
    specs = {spec.name: spec for spec in train.ranks[0].params}
    numbers: dict[str, int] = {}
    boxes: list[Box] = []
    end = 0
    for segment in sent:
        item_bytes = torch_dtype(segment.wire_dtype).itemsize
        shape = cut_to(segment.shape, (limit_bytes - end) // item_bytes)
        if 0 in shape:
            break
        number = numbers.setdefault(segment.param, len(numbers))
        box = Box.of(segment, number, torch_dtype(specs[segment.param].dtype), end, len(boxes))
        boxes.append(replace(box, shape=shape))
        end += -(-math.prod(shape) * item_bytes // 16) * 16
    params = tuple(noise(specs[name].shape, torch_dtype(specs[name].dtype), device) for name in numbers)
    return BucketCase(params, tuple(boxes), end)


def cut_to(shape: tuple[int, ...], num_elements: int) -> tuple[int, ...]:
    """The largest leading part of a box, in row-major order, that is a box and has at most `num_elements`."""
    kept = list(shape)
    for dim in range(len(kept)):
        kept[dim] = min(kept[dim], num_elements // math.prod(kept[dim + 1 :]))
        if kept[dim] > 0 or dim == len(kept) - 1:
            break
        kept[dim] = 1
    return tuple(kept)


def noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def require_equal_bytes(
    bucket: BucketCase, calls: dict[str, Callable[[], object]], packed: Tensor, sums: Tensor
) -> None:
    """Every kernel against torch views, bit for bit. Leaves `packed` filled and the params as they were."""
    expected = torch.zeros_like(packed)
    reference.pack(bucket.boxes, bucket.params, expected)
    calls["pack"]()
    assert torch.equal(packed, expected), "pack differs from torch views"
    calls["digest"]()
    wanted = torch.zeros_like(sums)
    views = [reference.packed_box(box, packed) for box in bucket.boxes]
    reference.add_digests(bucket.boxes, views, wanted)
    assert torch.equal(sums, wanted), "digests differ from those of refit.transfer.digest"
    reference.unpack(bucket.boxes, bucket.params, packed)
    rounded = [param.clone() for param in bucket.params]
    for box in bucket.boxes:
        reference.param_box(box, bucket.params).zero_()
    calls["unpack"]()
    for got, held in zip(bucket.params, rounded, strict=True):
        assert torch.equal(as_bytes(got), as_bytes(held)), "unpack differs from torch views"


def shares(
    bucket: BucketCase, calls: dict[str, Callable[[], object]], packed: Tensor, repeats: int
) -> dict[str, object]:
    """Bandwidths relative to a copy of the bucket, all timed in turn within each repeat."""
    other = torch.empty_like(packed)
    median = median_seconds({"copy": lambda: other.copy_(packed), **calls}, repeats)
    copy_rate = 2 * bucket.num_bytes / median["copy"]
    found = {name: bucket.touched_bytes / median[name] / copy_rate for name in ("pack", "unpack")}
    found["digest"] = median["copy"] / median["digest"]
    targets = {"pack": PACK_TARGET, "unpack": PACK_TARGET, "digest": DIGEST_TARGET}
    return {
        "copy_gb_per_s": copy_rate / 1e9,
        **{f"{name}_s": value for name, value in median.items()},
        **{f"{name}_share": value for name, value in found.items()},
        "reached": all(found[name] >= target for name, target in targets.items()),
    }


@dataclass(frozen=True, slots=True)
class QuantizeCase:
    """Pieces whose elements and scales lie one after the other in `memory`."""

    pieces: tuple[fp8.Piece, ...]
    memory: Tensor

    @property
    def touched_bytes(self) -> int:
        """Bytes read and written: each element and each scale once."""
        return self.memory.nbytes + sum(piece.source.nbytes for piece in self.pieces)


def make_quantize_case(device: torch.device, limit_bytes: int) -> QuantizeCase:
    """The matrices of trainer 0 in a layout of a published model, whole rows of them, until the bucket is full."""
    params = train_manifest(load_model("qwen3-4b"), parse_train("tp=2")).ranks[0].params
    memory = torch.zeros(limit_bytes, dtype=torch.uint8, device=device)
    generator = torch.Generator(device).manual_seed(0)
    pieces: list[fp8.Piece] = []
    end = 0
    for _, num_rows, num_columns in ((p.name, *p.shape) for p in params if len(p.shape) == 2):
        row_bytes = num_columns + 4 * -(-num_columns // 128)  # as if every row had scales of its own
        num_rows = min(num_rows, (limit_bytes - end - 2 * WIDE_BYTES) // row_bytes)
        if num_rows < 1:
            break
        source = torch.randn(num_rows, num_columns, generator=generator, device=device).to(torch.bfloat16)
        blocks = FP8_CODEC.maxima(source, (0, 0)).shape
        stop = end + num_rows * num_columns
        first_scale = -(-stop // WIDE_BYTES) * WIDE_BYTES
        elements = memory[end:stop].view(torch.float8_e4m3fn).view(num_rows, num_columns)
        end = first_scale + 4 * blocks.numel()
        scales = memory[first_scale:end].view(torch.float32).view(blocks)
        end = -(-end // WIDE_BYTES) * WIDE_BYTES
        pieces.append(fp8.Piece(source, (0, 0), elements, scales))
    return QuantizeCase(tuple(pieces), memory[:end])


def require_equal_blocks(bucket: QuantizeCase) -> None:
    """What lies in the bucket against the codec, bit for bit."""
    for number, piece in enumerate(bucket.pieces):
        parts = FP8_CODEC.encode(piece.source, piece.at, FP8_CODEC.maxima(piece.source, piece.at))
        for name, got, wanted in zip(
            ("elements", "scales"), (piece.elements, piece.scales), parts, strict=True
        ):
            assert torch.equal(as_bits(got), as_bits(wanted)), (
                f"{name} of piece {number} differ from the codec's"
            )


def median_seconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Of each call, timed in turn within each repeat."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 3):
        for name, call in calls.items():
            taken = device_seconds(call)
            if repeat >= 3:  # the first ones compile and warm up
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def device_seconds(call: Callable[[], object]) -> float:
    """Seconds of one call on the device's own clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()


if __name__ == "__main__":
    if "--tiny" in sys.argv and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton decides at its import, so the choice must be there before this process begins.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    sys.exit(main())

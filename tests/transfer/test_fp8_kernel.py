"""The FP8 quantization kernel against the codec, bit for bit, under Triton's interpreter."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.plan import PlanError
from refit.transfer.kernels import fp8
from refit.transfer.memory import as_bits
from refit.transfer.precision.codecs import codec_of
from tests.transfer.interpreted import interpreted_kernels
from tests.transfer.precision.matrices import KINDS, matrix

CPU = torch.device("cpu")
CODEC = codec_of("fp8")


@pytest.fixture(scope="module")
def kernels():
    with interpreted_kernels():
        yield fp8


def spaced(shape, dtype, gap):
    """Memory of a matrix whose rows are `gap` elements apart, all bits set."""
    whole = torch.full((shape[0], shape[1] + gap), 255, dtype=torch.uint8).repeat_interleave(
        dtype.itemsize, 1
    )
    return whole.view(dtype)[:, : shape[1]]


def piece_of(kernels, values, at, gap, maxima=None):
    source = spaced(values.shape, values.dtype, gap)
    source.copy_(values)
    blocks = CODEC.maxima(values, at).shape
    return kernels.Piece(
        source,
        at,
        spaced(values.shape, torch.float8_e4m3fn, gap),
        spaced(blocks, torch.float32, gap),
        maxima,
    )


def check(kernels, pieces):
    kernels.quantize(kernels.quantize_tables(pieces, CPU))
    for piece in pieces:
        maxima = CODEC.maxima(piece.source, piece.at) if piece.maxima is None else piece.maxima
        elements, scales = CODEC.encode(piece.source, piece.at, maxima)
        assert torch.equal(as_bits(piece.scales.contiguous()), as_bits(scales))
        assert torch.equal(as_bits(piece.elements.contiguous()), as_bits(elements))


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_pieces_of_any_size_place_pitch_and_dtype_are_quantized_as_the_codec_does(kernels, data):
    pieces = []
    for _ in range(data.draw(st.integers(1, 3))):
        shape = data.draw(st.sampled_from(((1, 1), (3, 130), (128, 128), (140, 160), (64, 256), (129, 33))))
        values = matrix(data.draw(st.sampled_from(KINDS)), shape, data.draw(st.integers(0, 2**31)))
        values = values.to(data.draw(st.sampled_from((torch.bfloat16, torch.float32))))
        at = data.draw(st.sampled_from(((0, 0), (0, 128), (5, 100), (127, 16), (256, 1))))
        maxima = None
        if data.draw(st.booleans()):
            maxima = CODEC.maxima(values, at) * data.draw(st.sampled_from((1.0, 1.5, 7.0)))
            maxima = maxima.clamp(max=torch.finfo(torch.float32).max)
        pieces.append(piece_of(kernels, values, at, data.draw(st.sampled_from((0, 1, 16))), maxima))
    check(kernels, pieces)


def test_every_e4m3_value_its_halves_and_their_neighbours_round_as_torch_rounds(kernels):
    """With a largest magnitude of 448 the scale is 1: elements are what is rounded."""
    codes = torch.arange(256, dtype=torch.uint8)
    grid = codes[(codes & 127) < 127].view(torch.float8_e4m3fn).float().sort().values
    halves = (grid[1:] + grid[:-1]) / 2
    near = [torch.nextafter(halves, halves.new_tensor(side)) for side in (-1e9, 1e9)]
    values = torch.cat([grid, halves, *near])
    padded = torch.nn.functional.pad(values, (0, -len(values) % 128)).view(-1, 128)
    padded[-1, -1] = 448.0
    piece = piece_of(kernels, padded, (0, 0), 0)
    check(kernels, [piece])
    assert piece.scales.eq(1).all()
    assert torch.equal(as_bits(piece.elements), as_bits(padded.to(torch.float8_e4m3fn)))


def test_aligned_pieces_are_one_launch_and_others_one_more_each_of_every_block(kernels):
    values = matrix("normal", (300, 256), 1)
    aligned, odd = piece_of(kernels, values, (0, 0), 0), piece_of(kernels, values, (0, 0), 1)
    assert aligned.is_aligned and not odd.is_aligned
    assert not piece_of(kernels, values, (0, 100), 0).is_aligned
    tables = kernels.quantize_tables([aligned, odd, aligned], CPU)
    assert [(table.is_aligned, len(table.tile_rows)) for table in tables] == [(True, 12), (False, 6)]
    check(kernels, [aligned, odd, aligned])


def test_what_the_kernel_cannot_do_is_refused(kernels):
    values = matrix("normal", (128, 128), 1)
    elements, scales = torch.zeros(128, 128, dtype=torch.float8_e4m3fn), torch.zeros(1, 1)
    with pytest.raises(PlanError, match=r"no kernel quantizes torch\.float16"):
        kernels.Piece(values.half(), (0, 0), elements, scales)
    with pytest.raises(PlanError, match=r"is \[1, 1\], expected \[2, 1\]"):
        kernels.Piece(values, (1, 0), elements, scales)
    with pytest.raises(PlanError, match="dense rows"):
        kernels.Piece(values.t(), (0, 0), elements, scales)


COMPILE = """
import json, re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from refit.transfer.kernels.fp8 import FIELDS, NUM_WARPS
from refit.transfer.kernels.fp8_programs import fp8_kernel
found = {}
for aligned in (True, False):
    fixed = {"FIELDS": len(FIELDS), "ALIGNED": aligned}
    source = ASTSource(fp8_kernel, {"rows": "*i64", "tile_rows": "*i32", **dict.fromkeys(fixed, "constexpr")}, fixed)
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": NUM_WARPS}).asm["ptx"]
    found[str(aligned)] = [len(re.findall(p, ptx)) for p in (r"ld.global.v4", r"\\.local\\b", r"div.full")]
print(json.dumps(found))
"""


def test_the_kernel_compiles_for_hopper_with_16_byte_loads_and_ieee_divisions():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["True"][0] > 0
    assert [counts[1:] for counts in found.values()] == [[0, 0], [0, 0]]

"""Each codec against its format's definition and against vLLM's own quantizer."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.plan import Region
from refit.transfer.memory import as_bits
from refit.transfer.precision.codecs import CODECS, codec_of, dequantize, quantize
from refit.transfer.precision.formats import PrecisionError
from refit.transfer.precision.fp8 import FP8_BLOCK
from refit.transfer.precision.mxfp8 import MXFP8
from refit.transfer.precision.nvfp4 import MAGNITUDES, NVFP4
from tests.transfer.precision.matrices import KINDS, cuts, matrices, matrix

QUICK = settings(max_examples=60, deadline=None)
ROUNDING = (
    1 + 2.0**-17
)  # scale, reciprocal and product are rounded to fp32: 2**-22 of the value, a 16th its half ulp


def spread(scales, matrix_shape, cell):
    """Scales of cells, repeated for every element."""
    wide = scales.repeat_interleave(cell[0], -2).repeat_interleave(cell[1], -1)
    return wide[..., : matrix_shape[-2], : matrix_shape[-1]]


def half_ulp(values, mantissa_bits, smallest_exponent):
    """Half the distance between the neighbours of each value in a format."""
    exponent = torch.floor(torch.log2(values.abs().double().clamp(min=2.0**-200)))
    return torch.exp2(exponent.clamp(min=smallest_exponent) - mantissa_bits - 1)


@given(matrices(max_cells=300).filter(lambda x: x.numel() <= 40_000))
@QUICK
def test_fp8_is_within_half_an_ulp_of_every_element(x):
    data, scale = quantize("fp8", x)
    assert (data.shape, scale.shape) == (x.shape, FP8_BLOCK.parts[1].shape(x.shape))
    wide = spread(scale, x.shape, (128, 128)).double()
    wrong = (dequantize("fp8", (data, scale), torch.float64) - x.double()).abs()
    assert (wrong <= half_ulp(x.double() / wide, 3, -6) * wide * ROUNDING).all()
    largest = data.float().abs().amax(dim=(-2, -1))
    assert ((largest == 448) | (x.abs().amax(dim=(-2, -1)) < 1e-3)).all()  # the range is used


@given(matrices(column_step=32))
@QUICK
def test_mxfp8_is_within_half_an_ulp_of_every_element(x):
    data, exponent = quantize("mxfp8", x)
    assert (data.shape, exponent.shape) == (x.shape, (*x.shape[:-1], x.shape[-1] // 32))
    wide = spread(torch.exp2(exponent.double() - 127), x.shape, (1, 32))
    wrong = (dequantize("mxfp8", (data, exponent), torch.float64) - x.double()).abs()
    assert (wrong <= half_ulp(x.double() / wide, 3, -6) * wide * ROUNDING).all()


@given(matrices(column_step=16))
@QUICK
def test_nvfp4_is_within_half_an_ulp_of_every_element_and_of_every_group_scale(x):
    pairs, scale, scale_2 = quantize("nvfp4", x)
    assert (pairs.shape, scale.shape) == (
        (*x.shape[:-1], x.shape[-1] // 2),
        (*x.shape[:-1], x.shape[-1] // 16),
    )
    per_matrix = scale_2[..., None, None].double()
    largest = x.double().abs().unflatten(-1, (-1, 16)).amax(-1)
    exact = (largest / 6 / per_matrix).clamp(max=448)
    assert ((scale.double() - exact).abs() <= half_ulp(exact, 3, -6) * ROUNDING).all()
    step = spread(scale.double() * per_matrix, x.shape, (1, 16))
    wrong = (dequantize("nvfp4", (pairs, scale, scale_2), torch.float64) - x.double()).abs()
    scaled = torch.where(step > 0, x.double() / step.clamp(min=1e-300), 0.0)
    bound = half_ulp(scaled, 1, 0) * step + (x.double().abs() - 6 * step).clamp(min=0)
    assert (wrong <= bound * ROUNDING).all()


def test_every_nvfp4_code_and_every_fp8_value_decodes_to_what_it_stands_for():
    values = [*MAGNITUDES, *(-v for v in MAGNITUDES)]
    codes = torch.arange(16, dtype=torch.uint8)
    pairs = (codes[0::2] | codes[1::2] << 4)[None]
    found = dequantize(
        "nvfp4", (pairs, torch.tensor([[2.0]]).to(torch.float8_e4m3fn), torch.tensor(0.25)), torch.float32
    )
    assert found.tolist() == [[0.5 * v for v in values]]
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = every[~every.float().isnan()][None]
    assert torch.equal(
        dequantize("fp8", (finite, torch.tensor([[0.5, 0.5]])), torch.float32), finite.float() / 2
    )


@pytest.mark.parametrize("name", CODECS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_quantizing_pieces_with_agreed_maxima_gives_what_the_whole_matrix_gives(name, data):
    codec, form = codec_of(name), codec_of(name).format
    unit = form.unit
    x = data.draw(matrices(unit[0] * (1 if unit[1] > 1 else 29), unit[1] * (1 if unit[1] > 1 else 37), 8))
    whole = quantize(name, x)
    rows = data.draw(cuts(x.shape[-2], unit[0]))
    columns = data.draw(cuts(x.shape[-1], unit[1]))
    lead = x.shape[:-2]
    pieces = [
        Region((*(0,) * len(lead), r, c), (*lead, r_stop, c_stop))
        for r, r_stop in pairwise(rows)
        for c, c_stop in pairwise(columns)
    ]
    agreed = torch.zeros_like(codec.maxima(x, (0, 0)))
    grid = [form_region(form, piece, x.shape) for piece in pieces]
    for piece, cells in zip(pieces, grid, strict=True):
        agreed[cells] = torch.maximum(agreed[cells], codec.maxima(x[box(piece)], piece.starts[-2:]))
    filled = [torch.empty_like(part) for part in whole]
    for piece, cells in zip(pieces, grid, strict=True):
        form.require_whole_units("a.weight", piece, x.shape)
        encoded = codec.encode(x[box(piece)], piece.starts[-2:], agreed[cells])
        for target, part, value in zip(filled, form.parts, encoded, strict=True):
            target[box(part.region(piece))] = value
    for part, mine, theirs in zip(form.parts, filled, whole, strict=True):
        assert torch.equal(as_bits(mine), as_bits(theirs)), part.suffix


def form_region(form, piece, shape):
    """The box of the maxima that a piece touches."""
    cell = form.shared
    if cell == (0, 0):
        return box(Region(piece.starts[:-2], piece.stops[:-2]))
    starts = [start // size for start, size in zip(piece.starts[-2:], cell, strict=True)]
    stops = [-(-stop // size) for stop, size in zip(piece.stops[-2:], cell, strict=True)]
    return box(Region((*piece.starts[:-2], *starts), (*piece.stops[:-2], *stops)))


def box(region):
    return tuple(map(slice, region.starts, region.stops))


@pytest.mark.parametrize(
    ("form", "region", "words"),
    [
        (MXFP8, Region((0, 0), (4, 48)), "cut at column 48 goes through a mxfp8 group of 32"),
        (NVFP4, Region((0, 8), (4, 64)), "cut at column 8 goes through a nvfp4 group of 16"),
    ],
)
def test_a_cut_through_a_group_is_refused_by_name(form, region, words):
    with pytest.raises(PrecisionError, match=words):
        form.require_whole_units("model.layers.0.mlp.down_proj.weight", region, (4, 64))
    form.require_whole_units("model.layers.0.mlp.down_proj.weight", Region((1, 32), (3, 64)), (4, 64))
    FP8_BLOCK.require_whole_units("a.weight", Region((1, 8), (3, 63)), (4, 64))


def test_ragged_groups_unknown_formats_and_odd_names_are_refused():
    with pytest.raises(PrecisionError, match="has 40 columns, which mxfp8 groups of 32 do not divide"):
        MXFP8.require_whole_units("a.weight", Region.whole((4, 40)), (4, 40))
    with pytest.raises(PrecisionError, match="no format is called 'int3'; there are fp8, mxfp8, nvfp4"):
        quantize("int3", torch.zeros(2, 2))
    with pytest.raises(PrecisionError, match=r"a\.bias is no '\.\.\.weight'"):
        FP8_BLOCK.names("a.bias")


@pytest.mark.vllm
class TestAgainstVllm:
    """vLLM's own functions, imported for real; compiled ones run as the plain functions that they compile."""

    SHAPES = ((1, 1), (128, 128), (130, 257), (384, 96), (7, 640))

    @pytest.mark.parametrize("kind", KINDS)
    def test_fp8_equals_its_online_quantizer_bit_for_bit(self, kind):
        from vllm.utils.deep_gemm import per_block_cast_to_fp8

        for seed, shape in enumerate(self.SHAPES):
            x = matrix(kind, shape, seed)
            with torch.compiler.set_stance("force_eager"):
                wanted, wanted_scale = per_block_cast_to_fp8(x, [128, 128], use_ue8m0=False)
            data, scale = quantize("fp8", x)
            assert torch.equal(scale, wanted_scale)
            assert torch.equal(data.view(torch.uint8), wanted.view(torch.uint8))

    @pytest.mark.parametrize("kind", KINDS)
    def test_mxfp8_equals_its_quantizer_bit_for_bit(self, kind):
        from vllm.model_executor.layers.quantization.utils.mxfp8_utils import _mxfp8_e4m3_quantize_torch

        for seed, shape in enumerate(((1, 32), (5, 96), (2, 3, 64))):
            x = matrix(kind, shape, seed)
            wanted, wanted_scale = _mxfp8_e4m3_quantize_torch(x)
            data, scale = quantize("mxfp8", x)
            assert torch.equal(scale, wanted_scale)
            assert torch.equal(data.view(torch.uint8), wanted.view(torch.uint8))

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "denormal"])
    def test_nvfp4_equals_its_reference_quantizer_and_decoder(self, kind):
        from vllm.model_executor.layers.quantization.utils import nvfp4_emulation_utils as theirs

        theirs.kE2M1ToFloat_handle.val = torch.tensor(MAGNITUDES)
        for seed, shape in enumerate(((1, 16), (5, 96), (64, 32))):
            x = matrix(kind, shape, seed)
            pairs, scale, scale_2 = quantize("nvfp4", x)
            unit = (6.0 * 448.0) / x.float().abs().max().clamp_min(1e-8)
            wanted, wanted_scale = theirs.ref_nvfp4_quant(x, unit, 16)
            assert torch.equal(scale.float(), wanted_scale)
            codes = theirs.break_fp4_bytes(pairs, torch.float32)
            assert torch.equal(codes, wanted)
            decoded = theirs.dequantize_to_dtype(pairs, scale, scale_2, torch.float32, 16, swizzle=False)
            assert torch.equal(dequantize("nvfp4", (pairs, scale, scale_2), torch.float32), decoded)

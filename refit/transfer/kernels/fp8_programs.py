"""The Triton program of FP8 quantization: one program is one block of 128 x 128, read once and written once.

The arithmetic is that of `refit.transfer.precision.fp8`, bit for bit: divisions round to nearest, and the rounding to
e4m3 is done on the bits, the same on every device.
"""

import triton
import triton.language as tl

FLOAT32 = tl.constexpr(1)  # the order of table.FLOATS
BLOCK = tl.constexpr(128)
LARGEST, SMALLEST_MAXIMUM = tl.constexpr(448.0), tl.constexpr(1e-4)


@triton.jit
def e4m3(value):
    """Float32 of magnitude 464 or less to e4m3 bits in an int32, nearest even."""
    bits = value.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    # Below 2**-6 an addition of 2**14 leaves the eighths of 2**-6 in the last bits, rounded by the addition.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    normal = (size - (120 << 23) + 0x7FFFF + ((size >> 20) & 1)) >> 20
    return tl.where(size < (121 << 23), small, normal) | sign


@triton.jit
def fp8_kernel(rows, tile_rows, FIELDS: tl.constexpr, ALIGNED: tl.constexpr):
    """One block of one row of the table; see `fp8.FIELDS`. ALIGNED: all in multiples of 16."""
    tile = tl.program_id(0)
    row = rows + tl.load(tile_rows + tile).to(tl.int64) * FIELDS
    source, elements = tl.load(row), tl.load(row + 1)
    scales, maxima = tl.load(row + 2), tl.load(row + 3)
    num_rows, num_columns = tl.load(row + 4).to(tl.int32), tl.load(row + 5).to(tl.int32)
    source_pitch, element_pitch = tl.load(row + 6), tl.load(row + 7)
    above, left = tl.load(row + 10).to(tl.int32), tl.load(row + 11).to(tl.int32)
    across, number = tl.load(row + 13).to(tl.int32), tile - tl.load(row + 14).to(tl.int32)
    block_row, block_column = number // across, number % across
    r = (block_row * BLOCK - above + tl.arange(0, BLOCK))[:, None]
    c = (block_column * BLOCK - left + tl.arange(0, BLOCK))[None, :]
    mask = (r >= 0) & (r < num_rows) & (c >= 0) & (c < num_columns)
    place = r.to(tl.int64) * source_pitch + c
    near = elements.to(tl.pointer_type(tl.uint8)) + r.to(tl.int64) * element_pitch + c
    floats = source.to(tl.pointer_type(tl.float32)) + place
    halves = source.to(tl.pointer_type(tl.int16)) + place
    if ALIGNED:  # addresses of the first column of each run of 16, in bytes
        mask = tl.max_constancy(mask, (1, 16))
        near = tl.multiple_of(tl.max_contiguous(near, (1, 16)), (1, 16))
        floats = tl.multiple_of(tl.max_contiguous(floats, (1, 16)), (1, 16))
        halves = tl.multiple_of(tl.max_contiguous(halves, (1, 16)), (1, 16))
    if tl.load(row + 12) == FLOAT32:
        value = tl.load(floats, mask=mask, other=0.0)
    else:
        value = (tl.load(halves, mask=mask, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    # Not tl.max: what Triton ships as a program is interpreted only if the interpreter was on before its import.
    by_row = tl.reduce(tl.abs(value), 1, tl.standard._elementwise_max)
    largest = tl.reduce(by_row, 0, tl.standard._elementwise_max)
    if maxima != 0:
        largest = tl.load(
            maxima.to(tl.pointer_type(tl.float32)) + block_row * tl.load(row + 9) + block_column
        )
    scale = tl.div_rn(tl.maximum(largest, SMALLEST_MAXIMUM), LARGEST)
    tl.store(near, e4m3(value * tl.div_rn(1.0, scale)).to(tl.uint8), mask=mask)
    at_scale = scales.to(tl.pointer_type(tl.float32)) + block_row * tl.load(row + 8) + block_column
    tl.store(at_scale, scale)

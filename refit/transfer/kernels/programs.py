"""The Triton programs of a bucket: one program is one tile of a table, whose rows are those of `table`.

A cast rounds to nearest even, by way of float32 as torch does; a NaN becomes a quiet NaN of the target.
"""

import triton
import triton.language as tl

FLOAT64, FLOAT32, FLOAT16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # the order of table.FLOATS
WIDE, CAST = tl.constexpr(4), tl.constexpr(5)  # table.WIDE, table.CAST


@triton.jit
def outer_offset(r, num_rows, n1, n2, s0, s1, s2):
    """Bytes from the start of a box to its outer row number `r`."""
    offset = r * s2
    if num_rows != n2:
        q = r // n2
        offset = (r - q * n2) * s2 + (q % n1) * s1 + (q // n1) * s0
    return offset


@triton.jit
def move(near, far, mask, IS_PACK: tl.constexpr):
    """Copy items between the bucket (near) and the param (far)."""
    if IS_PACK:
        tl.store(near, tl.load(far, mask=mask), mask=mask)
    else:
        tl.store(far, tl.load(near, mask=mask), mask=mask)


@triton.jit
def load_float(address, kind, mask):
    """Values of a float dtype as float32. `address`: int64."""
    if kind == FLOAT64:
        value = tl.load(address.to(tl.pointer_type(tl.float64)), mask=mask, other=0.0).to(tl.float32)
    elif kind == FLOAT32:
        value = tl.load(address.to(tl.pointer_type(tl.float32)), mask=mask, other=0.0)
    elif kind == FLOAT16:
        value = tl.load(address.to(tl.pointer_type(tl.float16)), mask=mask, other=0.0).to(tl.float32)
    else:
        bits = tl.load(address.to(tl.pointer_type(tl.int16)), mask=mask, other=0).to(tl.int32)
        value = (bits << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit
def store_float(address, value, kind, mask):
    """Round float32 to a float dtype. bfloat16 is rounded on the bits, the same on every device."""
    if kind == FLOAT64:
        tl.store(address.to(tl.pointer_type(tl.float64)), value.to(tl.float64), mask=mask)
    elif kind == FLOAT32:
        tl.store(address.to(tl.pointer_type(tl.float32)), value, mask=mask)
    elif kind == FLOAT16:
        tl.store(address.to(tl.pointer_type(tl.float16)), value.to(tl.float16), mask=mask)
    else:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value != value, 0x7FC0, rounded)
        tl.store(address.to(tl.pointer_type(tl.int16)), rounded.to(tl.int16), mask=mask)


@triton.jit
def copy_units(bucket, far, place, kind, mask, IS_PACK: tl.constexpr):
    """Copy unit number `place` of a box, in units of the kind that its row names. `bucket`, `far`: int64 addresses."""
    if kind == 3:
        near = bucket + place * 8
        move(near.to(tl.pointer_type(tl.int64)), far.to(tl.pointer_type(tl.int64)), mask, IS_PACK)
    elif kind == 2:
        near = bucket + place * 4
        move(near.to(tl.pointer_type(tl.int32)), far.to(tl.pointer_type(tl.int32)), mask, IS_PACK)
    elif kind == 1:
        near = bucket + place * 2
        move(near.to(tl.pointer_type(tl.int16)), far.to(tl.pointer_type(tl.int16)), mask, IS_PACK)
    else:
        near = bucket + place
        move(near.to(tl.pointer_type(tl.int8)), far.to(tl.pointer_type(tl.int8)), mask, IS_PACK)


@triton.jit
def copy_kernel(
    bases,
    payload,
    rows,
    tile_rows,
    IS_PACK: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of a copy table."""
    tile = tl.program_id(0)
    row = rows + tl.load(tile_rows + tile).to(tl.int64) * FIELDS
    base = tl.load(bases + tl.load(row)) + tl.load(row + 1)
    bucket = payload.to(tl.int64) + tl.load(row + 2)
    n1, n2 = tl.load(row + 3).to(tl.int32), tl.load(row + 4).to(tl.int32)
    num_rows, inner = tl.load(row + 5).to(tl.int32), tl.load(row + 6).to(tl.int32)
    kind, stored, wire = tl.load(row + 11), tl.load(row + 12), tl.load(row + 13)
    shift, number = tl.load(row + 14).to(tl.int32), tile - tl.load(row + 15).to(tl.int32)
    num_columns = (inner + (1 << shift) - 1) >> shift
    t = tl.arange(0, BLOCK)
    r = (number // num_columns) * (BLOCK >> shift) + (t >> shift)
    c = ((number % num_columns) << shift) + (t & ((1 << shift) - 1))
    mask = (r < num_rows) & (c < inner)
    outer = outer_offset(r, num_rows, n1, n2, tl.load(row + 7), tl.load(row + 8), tl.load(row + 9))
    far = base + outer + c * tl.load(row + 10)
    place = r.to(tl.int64) * inner + c
    if kind == CAST:
        wire_bytes = tl.where(wire == FLOAT64, 8, tl.where(wire == FLOAT32, 4, 2))
        near = bucket + place * wire_bytes
        if IS_PACK:
            store_float(near, load_float(far, stored, mask), wire, mask)
        else:
            store_float(far, load_float(near, wire, mask), stored, mask)
    elif kind == WIDE:
        # Hints stick to the operations that made the values, so they must be made in this function.
        near_pairs = tl.max_contiguous((bucket + place * 8).to(tl.pointer_type(tl.int64)), 2)
        far_pairs = tl.max_contiguous(far.to(tl.pointer_type(tl.int64)), 2)
        near_pairs, far_pairs = tl.multiple_of(near_pairs, 16), tl.multiple_of(far_pairs, 16)
        move(near_pairs, far_pairs, tl.max_constancy(mask, 2), IS_PACK)
    else:
        copy_units(bucket, far, place, kind, mask, IS_PACK)


@triton.jit
def fold(word):
    """`digest.fold`: the upper half of a word is added to the lower one."""
    return word + (word >> 32)


@triton.jit
def load_word(address, item, place, mask):
    """A folded whole word, or a folded item at its place in its word, with what the items add by being there."""
    if item < 0:
        word = tl.load(address.to(tl.pointer_type(tl.int64)), mask=mask, other=0)
        ones = tl.full([1], 1, tl.int64)
        if item == -4:
            ones = tl.full([1], 0x100000001, tl.int64)
        elif item == -2:
            ones = tl.full([1], 0x1000100010001, tl.int64)
        elif item == -1:
            ones = tl.full([1], 0x101010101010101, tl.int64)
        value = fold(word) + fold(ones)
    elif item == 1:
        raw = tl.load(address.to(tl.pointer_type(tl.uint8)), mask=mask, other=0).to(tl.int64)
        shift = ((place & 7) * 8).to(tl.int64)
        value = fold(raw << shift) + fold((raw * 0 + 1) << shift)
    elif item == 2:
        raw = tl.load(address.to(tl.pointer_type(tl.uint16)), mask=mask, other=0).to(tl.int64)
        shift = ((place & 3) * 16).to(tl.int64)
        value = fold(raw << shift) + fold((raw * 0 + 1) << shift)
    elif item == 4:
        raw = tl.load(address.to(tl.pointer_type(tl.uint32)), mask=mask, other=0).to(tl.int64)
        shift = ((place & 1) * 32).to(tl.int64)
        value = fold(raw << shift) + fold((raw * 0 + 1) << shift)
    else:
        value = fold(tl.load(address.to(tl.pointer_type(tl.int64)), mask=mask, other=0)) + 1
    return tl.where(mask, value, 0)


@triton.jit
def word_number(place, item):
    """The word of an item, counted like `place`; where whole words are read, `place` counts words already."""
    word = place
    if item == 1:
        word = place >> 3
    elif item == 2:
        word = place >> 2
    elif item == 4:
        word = place >> 1
    return word


@triton.jit
def outer_weight(weights, row, r, num_rows, n1, n2, mask):
    """The product of the weights of the outer dims at outer row number `r`."""
    w2 = weights + tl.load(row + 12)
    weight = tl.load(w2 + r % n2, mask=mask, other=0)
    if num_rows != n2:
        q = r // n2
        weight *= tl.load(weights + tl.load(row + 11) + q % n1, mask=mask, other=0)
        weight *= tl.load(weights + tl.load(row + 10) + q // n1, mask=mask, other=0)
    return weight


@triton.jit
def digest_kernel(
    bases,
    payload,
    rows,
    tile_rows,
    weights,
    sums,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One tile of a digest table: STEPS blocks of the same columns, whose weights are loaded once."""
    tile = tl.program_id(0)
    row = rows + tl.load(tile_rows + tile).to(tl.int64) * FIELDS
    param = tl.load(row)
    base = payload.to(tl.int64)
    if param >= 0:
        base = tl.load(bases + param)
    base += tl.load(row + 1)
    n1, n2 = tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)
    num_rows, inner = tl.load(row + 4).to(tl.int32), tl.load(row + 5).to(tl.int32)
    item, lead = tl.load(row + 14).to(tl.int32), tl.load(row + 15).to(tl.int32)
    shift, number = tl.load(row + 18).to(tl.int32), tile - tl.load(row + 19).to(tl.int32)
    num_columns = (inner + (1 << shift) - 1) >> shift
    height = BLOCK >> shift
    t = tl.arange(0, BLOCK)
    c = ((number % num_columns) << shift) + (t & ((1 << shift) - 1))
    first = (number // num_columns) * height * STEPS + (t >> shift)
    place = c + lead
    total = tl.full([BLOCK], 0, tl.int64)
    for step in range(STEPS):
        r = first + step * height
        mask = (r < num_rows) & (c < inner)
        outer = outer_offset(r, num_rows, n1, n2, tl.load(row + 6), tl.load(row + 7), tl.load(row + 8))
        value = load_word(base + outer + c * tl.load(row + 9), item, place, mask)
        total += value * outer_weight(weights, row, r, num_rows, n1, n2, mask)
    at_last = weights + tl.load(row + 13)
    total *= tl.load(at_last + word_number(place, item), mask=c < inner, other=0)
    # Not tl.sum: what Triton ships as a program is interpreted only if the interpreter was on before its import.
    added = tl.reduce(total, 0, tl.standard._sum_combine)
    tl.atomic_add(sums + tl.load(row + 17), added * tl.load(row + 16))

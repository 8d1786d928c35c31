"""Matrices that are hard on quantizers, and cuts of them."""

import torch
from hypothesis import strategies as st

KINDS = ("normal", "zero", "denormal", "largest", "mixed", "one element", "steps")
LARGEST = torch.finfo(torch.bfloat16).max
SMALLEST = 2.0**-133  # the smallest bfloat16 above zero


def matrix(kind, shape, seed):
    """bf16, finite."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    match kind:
        case "normal":
            values = normal * 0.02
        case "zero":
            values = normal * 0
        case "denormal":
            values = torch.randint(-20, 21, shape, generator=generator) * SMALLEST
        case "largest":
            values = torch.sign(normal) * LARGEST
        case "mixed":
            values = normal * torch.exp2(torch.randint(-30, 31, shape, generator=generator).float())
        case "one element":
            values = torch.zeros(shape)
            values.view(-1)[seed % values.numel()] = -3.14159
        case _:  # powers of two and their neighbours, where a logarithm or a rounding may slip
            values = torch.exp2(torch.randint(-12, 13, shape, generator=generator).float()) * torch.sign(
                normal
            )
            values = values * (1 + torch.randint(0, 3, shape, generator=generator) * 2.0**-7)
    return values.to(torch.bfloat16)


@st.composite
def matrices(draw, row_step=1, column_step=1, max_cells=12):
    """A bf16 matrix [N, K], K and N multiples of the steps, ragged otherwise; sometimes stacked [E, N, K]."""
    shape = (row_step * draw(st.integers(1, max_cells)), column_step * draw(st.integers(1, max_cells)))
    if draw(st.booleans()):
        shape = (draw(st.integers(1, 3)), *shape)
    return matrix(draw(st.sampled_from(KINDS)), shape, draw(st.integers(0, 2**31)))


@st.composite
def cuts(draw, size, step):
    """Borders 0 = b0 < b1 < ... = size, all multiples of `step`."""
    inner = draw(st.sets(st.integers(1, max(1, size // step)), max_size=3))
    return sorted({0, size, *(step * number for number in inner if step * number < size)})

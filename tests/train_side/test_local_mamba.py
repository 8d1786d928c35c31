"""Mamba-2 in plain torch against the recurrence that defines it, token by token in float64."""

import pytest
import torch
from torch.nn import functional

from refit.train_side.local_mamba import GatedNorm, scan, split_conv1d_scan

BATCH, TOKENS, HEADS, SIZE, GROUPS, STATES, WIDTH = 2, 7, 4, 3, 2, 5, 4
INNER, BOTH = HEADS * SIZE, 2 * GROUPS * STATES


def recurrence(x, dt, a, b, c):
    state = torch.zeros(BATCH, HEADS, SIZE, STATES, dtype=torch.float64)
    outputs = []
    for t in range(TOKENS):
        new = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], b[:, t])
        state = state * torch.exp(a * dt[:, t])[..., None, None] + new
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, c[:, t]))
    return torch.stack(outputs, 1)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_the_scan_is_the_recurrence_also_in_its_gradients():
    sizes = {"x": (HEADS, SIZE), "dt": (HEADS,), "b": (HEADS, STATES), "c": (HEADS, STATES)}
    given = {name: random(BATCH, TOKENS, *size).requires_grad_() for name, size in sizes.items()}
    a = -random(HEADS).exp()
    found = []
    for compute in (scan, recurrence):
        y = compute(given["x"], functional.softplus(given["dt"]), a, given["b"], given["c"])
        found.append((y, *torch.autograd.grad((y * torch.arange(SIZE)).sum(), given.values())))
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_a_layer_convolves_causally_scans_and_gates_with_groups_shared_by_their_heads():
    rows = torch.randn(BATCH, TOKENS, 2 * INNER + BOTH + HEADS)
    weight, bias = torch.randn(INNER + BOTH, WIDTH), torch.randn(INNER + BOTH)
    dt_bias, a, d = torch.randn(HEADS), -torch.randn(HEADS).exp(), torch.randn(HEADS)
    found = split_conv1d_scan(
        rows, weight, bias, dt_bias, a, D=d, chunk_size=2, activation="silu", headdim=SIZE,
        ngroups=GROUPS, norm_before_gate=False, seq_idx=None,
    )  # fmt: skip
    z, xbc, dt = rows.double().split((INNER, INNER + BOTH, HEADS), -1)
    mixed = bias.double().expand_as(xbc).clone()
    for t in range(TOKENS):
        for back in range(min(WIDTH, t + 1)):
            mixed[:, t] += weight.double()[:, WIDTH - 1 - back] * xbc[:, t - back]
    x, b, c = functional.silu(mixed).split((INNER, BOTH // 2, BOTH // 2), -1)
    x = x.reshape(BATCH, TOKENS, HEADS, SIZE)
    heads = torch.arange(HEADS) // (HEADS // GROUPS)
    b, c = (part.reshape(BATCH, TOKENS, GROUPS, STATES)[:, :, heads] for part in (b, c))
    y = recurrence(x, functional.softplus(dt + dt_bias), a.double(), b, c) + d.double()[:, None] * x
    wanted = y.reshape(BATCH, TOKENS, INNER) * functional.silu(z)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_norm_is_of_each_group_by_itself():
    norm = GatedNorm(6, eps=1e-5, group_size=3, norm_before_gate=False)
    torch.nn.init.normal_(norm.weight)
    values = torch.randn(2, 6)
    for group in (slice(0, 3), slice(3, 6)):
        part = values[:, group]
        wanted = part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight[group]
        torch.testing.assert_close(norm(values)[:, group], wanted)

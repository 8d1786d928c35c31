"""Trainers' shards, quantized where they lie, against the whole tensors quantized at once."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.plan import (
    Holding,
    Manifest,
    MiscReason,
    ParamSpec,
    PlanOptions,
    RankManifest,
    Region,
    TensorSpec,
    build_plan,
)
from refit.transfer.memory import as_bits, dtype_name, strided_box
from refit.transfer.precision.codecs import CODECS, codec_of
from refit.transfer.precision.formats import PrecisionError
from refit.transfer.precision.scheme import quantized, scheme_of, without_parts
from refit.transfer.precision.source import QuantizedSource
from tests.transfer.precision.matrices import KINDS, cuts, matrix

PLAIN = "model.norm.weight"
DENSE = "model.layers.0.self_attn.q_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.*.up_proj.weight"


class Threads:
    """The collectives of trainers that are threads of this process."""

    def __init__(self, num_ranks):
        self.barrier = Barrier(num_ranks, timeout=30)
        self.values = [None] * num_ranks
        self.num_reductions = 0

    def of_rank(self, rank):
        threads = self

        class Mine:
            def gather(self, value):
                threads.values[rank] = value
                threads.barrier.wait()
                found = list(threads.values)
                threads.barrier.wait()
                return found

            def agree_on_maximum(self, values):
                largest = torch.stack(self.gather(values.clone())).amax(0)
                values.copy_(largest)
                threads.num_reductions += rank == 0

        return Mine()


def shard(rank, tensors, pieces):
    """A rank that keeps each of its pieces in strided memory: (manifest, live params)."""
    params, holdings = {}, []
    for number, (name, region) in enumerate(pieces):
        value = tensors[name][tuple(map(slice, region.starts, region.stops))]
        memory = torch.full((*value.shape[:-1], value.shape[-1] + 3), 7.0, dtype=value.dtype)
        memory[..., 1:-2] = value
        params[f"p{number}"] = memory
        holdings.append(Holding(name, region, f"p{number}", 1, memory.stride()))
    manifest = RankManifest(
        "train",
        rank,
        0,
        0,
        tuple(TensorSpec(name, tuple(t.shape), dtype_name(t.dtype)) for name, t in tensors.items()),
        tuple(ParamSpec(name, tuple(p.shape), dtype_name(p.dtype)) for name, p in params.items()),
        tuple(holdings),
        (),
    )
    return manifest, params


def on_all(num_ranks, function):
    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(function, range(num_ranks)))


def prepare(tensors, scheme, dealt):
    threads = Threads(len(dealt))
    shards = [shard(rank, tensors, pieces) for rank, pieces in enumerate(dealt)]
    sources = on_all(len(dealt), lambda r: QuantizedSource.prepare(shards[r][0], scheme, threads.of_rank(r)))
    return threads, [params for _, params in shards], sources


def check_against_whole(tensors, scheme, sources, found):
    """Every element of every holding is what quantizing the full tensors gives, and all is held."""
    whole = dict(quantized(tensors.items(), scheme))
    held = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in whole.items()}
    for source, params in zip(sources, found, strict=True):
        assert {s.name for s in source.manifest.tensors} == set(whole)
        for holding in source.manifest.holdings:
            box = tuple(map(slice, holding.region.starts, holding.region.stops))
            mine = strided_box(params[holding.param], holding.region.shape, holding.strides, holding.offset)
            wanted = whole[holding.tensor][box]
            assert torch.equal(as_bits(mine), as_bits(wanted)), (holding.tensor, holding.region)
            held[holding.tensor][box] = True
    assert all(seen.all() for seen in held.values())


@st.composite
def dealt_pieces(draw, tensors, steps, num_ranks):
    """Every tensor cut into a grid at multiples of its step; each piece on one or two ranks."""
    dealt = [[] for _ in range(num_ranks)]
    for name, tensor in tensors.items():
        lead = [0] if tensor.ndim < 3 else range(tensor.shape[0])
        matrix_shape = tensor.shape[-2:] if tensor.ndim > 1 else (1, tensor.shape[0])
        rows = draw(cuts(matrix_shape[0], steps[0]))
        columns = draw(cuts(matrix_shape[1], steps[1] if name != PLAIN else 1))
        for first in lead:
            for r, r_stop in pairwise(rows):
                for c, c_stop in pairwise(columns):
                    starts, stops = {
                        1: ((c,), (c_stop,)),
                        2: ((r, c), (r_stop, c_stop)),
                        3: ((first, r, c), (first + 1, r_stop, c_stop)),
                    }[tensor.ndim]
                    for rank in draw(st.sets(st.integers(0, num_ranks - 1), min_size=1, max_size=2)):
                        dealt[rank].append((name, Region(starts, stops)))
    return dealt


@pytest.mark.parametrize("form", CODECS)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_shards_of_every_cut_are_quantized_as_the_whole_tensors_are(form, data):
    unit = codec_of(form).format.unit
    n, k = (data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))) if unit == (1, 1) else (6, 96)
    kind, seed = data.draw(st.sampled_from(KINDS)), data.draw(st.integers(0, 2**31))
    tensors = {
        DENSE: matrix(kind, (n, k), seed),
        EXPERTS: matrix(kind, (2, n, k), seed + 1),
        PLAIN: matrix("normal", (9,), seed),
    }
    scheme = {DENSE: form, EXPERTS: form}
    dealt = data.draw(dealt_pieces(tensors, unit, 3))
    threads, live, sources = prepare(tensors, scheme, dealt)
    assert len({source.num_agreed for source in sources}) == 1
    check_against_whole(tensors, scheme, sources, on_all(3, lambda r: sources[r].params(live[r])))
    assert threads.num_reductions == (sources[0].num_agreed > 0)


def shapes_of(tensors):
    """What a header would say about tensors in memory."""
    return {name: (tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in tensors.items()}


def two_halves(shape, dim, at):
    whole = Region.whole(shape)
    return [[(DENSE, whole.with_dim(dim, 0, at))], [(DENSE, whole.with_dim(dim, at, shape[dim]))]]


def test_a_cut_on_a_block_border_needs_no_agreement_and_one_inside_a_block_agrees_on_that_block_only():
    tensors = {DENSE: matrix("normal", (300, 260), 5)}
    for dim, at, num_agreed in ((0, 128, 0), (1, 256, 0), (0, 129, 3), (1, 258, 3), (1, 100, 3)):
        _, live, sources = prepare(tensors, {DENSE: "fp8"}, two_halves((300, 260), dim, at))
        assert sources[0].num_agreed == num_agreed
        check_against_whole(
            tensors, {DENSE: "fp8"}, sources, on_all(2, lambda r, s=sources, p=live: s[r].params(p[r]))
        )


def test_a_second_refit_quantizes_the_weights_of_then():
    tensors = {DENSE: matrix("normal", (300, 260), 5)}
    _, live, sources = prepare(tensors, {DENSE: "fp8"}, two_halves((300, 260), 0, 129))
    first = on_all(2, lambda r: sources[r].params(live[r]))
    for params in live:
        params["p0"].mul_(-4)
    second = on_all(2, lambda r: sources[r].params(live[r]))
    check_against_whole({DENSE: tensors[DENSE] * -4}, {DENSE: "fp8"}, sources, second)
    check_against_whole(tensors, {DENSE: "fp8"}, sources, first)  # in memory of its own


def test_a_plan_from_quantized_trainers_to_quantized_engines_is_proven_and_is_half_the_bytes():
    tensors = {DENSE: matrix("normal", (512, 1024), 5)}
    _, _, sources = prepare(tensors, {DENSE: "fp8"}, two_halves((512, 1024), 0, 200))
    parts = dict(quantized(tensors.items(), {DENSE: "fp8"}))
    engine = RankManifest(
        "gen",
        0,
        0,
        0,
        tuple(TensorSpec(n, tuple(t.shape), dtype_name(t.dtype)) for n, t in parts.items()),
        tuple(ParamSpec(n, tuple(t.shape), dtype_name(t.dtype)) for n, t in parts.items()),
        tuple(Holding(n, Region.whole(t.shape), n, 0, t.stride()) for n, t in parts.items()),
        (),
    )
    plan = build_plan(
        Manifest("train", tuple(s.manifest for s in sources)), Manifest("gen", (engine,)), PlanOptions()
    )
    assert {t.kind for t in plan.tensors.values()} == {"bulk"}
    assert sum(t.num_bytes for t in plan.tensors.values()) == 512 * 1024 + 4 * 4 * 8
    plan.rank_plan(2)


def test_what_cannot_be_cut_and_what_was_misc_before_is_misc_with_the_reason():
    tensors = {DENSE: matrix("normal", (4, 64), 1), EXPERTS: matrix("normal", (2, 4, 64), 2)}
    (manifest, _) = shard(0, tensors, [(DENSE, Region((0, 0), (4, 40)))])
    before = (MiscReason(EXPERTS, "no rule"),)
    manifest = RankManifest("train", 0, 0, 0, manifest.tensors, manifest.params, manifest.holdings, before)
    source = QuantizedSource.prepare(manifest, {DENSE: "mxfp8", EXPERTS: "mxfp8"}, Threads(1).of_rank(0))
    reasons = {m.tensor: m.reason for m in source.manifest.misc}
    assert "cut at column 40 goes through a mxfp8 group of 32" in reasons[DENSE]
    assert reasons[DENSE] == reasons[f"{DENSE}_scale"]
    assert reasons[EXPERTS] == reasons[f"{EXPERTS}_scale"] == "no rule"
    assert source.manifest.holdings == ()


def test_the_scheme_is_what_the_header_of_the_engines_checkpoint_shows():
    hf = {
        "model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(130, 64, dtype=torch.bfloat16),
        "model.layers.0.mlp.experts.1.up_proj.weight": torch.zeros(130, 64, dtype=torch.bfloat16),
        DENSE: torch.zeros(8, 64, dtype=torch.bfloat16),
        "lm_head.weight": torch.zeros(8, 64, dtype=torch.bfloat16),
        PLAIN: torch.zeros(8, dtype=torch.bfloat16),
    }
    for form in CODECS:
        scheme = {EXPERTS: form, DENSE: "fp8"}
        header = shapes_of(dict(quantized(hf.items(), scheme)))
        assert scheme_of(header) == scheme
        assert set(without_parts(header, scheme)) == set(hf)
    assert scheme_of(shapes_of(hf)) == {}


@pytest.mark.parametrize(
    "broken",
    [
        {"a.weight": ((256, 256), "float8_e4m3fn"), "a.weight_scale": ((), "float32")},  # per tensor
        {"a.weight": ((256, 256), "float8_e4m3fn")},
        {"a.weight": ((256, 256), "float8_e4m3fn"), "a.weight_scale_inv": ((2, 3), "float32")},
        {"a.weight": ((256, 256), "float8_e4m3fn"), "a.weight_scale_inv": ((2, 2), "bfloat16")},
    ],
)
def test_a_checkpoint_in_another_form_is_refused_with_the_names(broken):
    with pytest.raises(
        PrecisionError, match=r"1 quantized tensors .*fp8, mxfp8, nvfp4.*a\.weight \(float8_e4m3fn"
    ):
        scheme_of(broken)

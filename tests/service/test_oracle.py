"""The digests that an audit is compared with, against brute force."""

from __future__ import annotations

import torch

from refit.plan import Holding, Manifest, MiscReason, ParamSpec, RankManifest, Region, TensorSpec
from refit.service.oracle import digests_of, shares_of
from refit.transfer.digest import digest

WEIGHT, EXPERTS = "model.embed_tokens.weight", "model.layers.0.mlp.experts.*.up_proj.weight"
SHAPES = {WEIGHT: (6, 4), EXPERTS: (2, 6, 4)}


def rank(number, holdings):
    tensors = tuple(
        TensorSpec(name, SHAPES[name], "bfloat16") for name in sorted({h.tensor for h in holdings})
    )
    params = tuple(ParamSpec(name, (4096,), "bfloat16") for name in sorted({h.param for h in holdings}))
    return RankManifest("gen", number, 0, 0, tensors, params, tuple(holdings), ())


def hold(tensor, region, param="p", offset=0):
    strides = [1]
    for size in reversed(region.shape[1:]):
        strides.insert(0, strides[0] * size)
    return Holding(tensor, region, param, offset, tuple(strides))


def hex_of(tensor, region, shape):
    box = tensor[tuple(slice(a, b) for a, b in zip(region.starts, region.stops, strict=True))]
    return f"{digest(box.to(torch.bfloat16), region, shape):016x}"


def test_each_rank_is_owed_the_digest_of_its_own_part_in_the_dtype_it_stores():
    top, bottom = Region((0, 0), (4, 4)), Region((4, 0), (6, 4))
    gen = Manifest("gen", (rank(0, [hold(WEIGHT, top)]), rank(1, [hold(WEIGHT, bottom)])))
    full = torch.randn(6, 4)
    found = digests_of([(WEIGHT, full)], shares_of(gen), first_gen_rank=2)
    assert found == {WEIGHT: {"2": hex_of(full, top, (6, 4)), "3": hex_of(full, bottom, (6, 4))}}


def test_an_element_that_a_rank_holds_twice_counts_once():
    whole, part = Region((0, 0), (6, 4)), Region((2, 0), (6, 4))
    gen = Manifest("gen", (rank(0, [hold(WEIGHT, part), hold(WEIGHT, whole, "copy")]),))
    full = torch.randn(6, 4)
    found = digests_of([(WEIGHT, full)], shares_of(gen), first_gen_rank=0)
    assert found == {WEIGHT: {"0": hex_of(full, whole, (6, 4))}}


def test_experts_come_one_by_one_and_add_up_to_their_stacked_tensor():
    rows = Region((0, 3, 0), (2, 6, 4))
    gen = Manifest("gen", (rank(0, [hold(EXPERTS, rows)]),))
    full = torch.randn(2, 6, 4)
    exported = [(EXPERTS.replace("*", str(expert)), full[expert]) for expert in range(2)]
    found = digests_of(exported, shares_of(gen), first_gen_rank=1)
    assert found == {EXPERTS: {"1": hex_of(full, rows, (2, 6, 4))}}


def test_an_expert_that_no_part_holds_adds_nothing():
    first = Region((0, 0, 0), (1, 6, 4))
    gen = Manifest("gen", (rank(0, [hold(EXPERTS, first)]),))
    full = torch.randn(2, 6, 4)
    exported = [(EXPERTS.replace("*", str(expert)), full[expert]) for expert in range(2)]
    found = digests_of(exported, shares_of(gen), first_gen_rank=0)
    assert found == {EXPERTS: {"0": hex_of(full, first, (2, 6, 4))}}


def test_one_changed_element_changes_the_digest_of_its_owner_alone():
    top, bottom = Region((0, 0), (4, 4)), Region((4, 0), (6, 4))
    shares = shares_of(Manifest("gen", (rank(0, [hold(WEIGHT, top)]), rank(1, [hold(WEIGHT, bottom)]))))
    full = torch.ones(6, 4)
    changed = full.clone()
    changed[5, 1] = 2.0
    before = digests_of([(WEIGHT, full)], shares, 0)[WEIGHT]
    after = digests_of([(WEIGHT, changed)], shares, 0)[WEIGHT]
    assert before["0"] == after["0"]
    assert before["1"] != after["1"]


def test_a_rank_whose_loader_makes_something_of_a_tensor_is_owed_the_digest_of_all_of_it():
    top = Region((0, 0), (4, 4))
    makes = RankManifest(
        "gen", 1, 0, 0, (TensorSpec(WEIGHT, (6, 4), "bfloat16"),), (), (), (MiscReason(WEIGHT, "exp of it"),)
    )
    gen = Manifest("gen", (rank(0, [hold(WEIGHT, top)]), makes))
    full = torch.randn(6, 4)
    found = digests_of([(WEIGHT, full)], shares_of(gen), first_gen_rank=0)
    whole = Region.whole((6, 4))
    assert found == {WEIGHT: {"0": hex_of(full, top, (6, 4)), "1": hex_of(full, whole, (6, 4))}}

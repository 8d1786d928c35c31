"""The arithmetic of lowering against brute force: every stored element is accounted for, and only once."""

from itertools import product
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.plan import Holding
from refit.train_side.lowering import rules
from refit.train_side.lowering.pieces import CannotLowerError, HfTensor, LocalParam, Piece, holdings_of
from tests.train_side import ranks

COLUMNS = 3
ALIGNMENT = 16


def elements(holding: Holding):
    """(flat element of the param, element of the tensor) of every element of a holding."""
    spans = zip(holding.region.starts, holding.region.stops, strict=True)
    for index in product(*(range(start, stop) for start, stop in spans)):
        steps = zip(index, holding.region.starts, holding.strides, strict=True)
        yield holding.offset + sum((i - start) * stride for i, start, stride in steps), index


def stored(param: LocalParam, rule, **facts):
    """What the rule says about the param: flat element -> (tensor, element). Fails on an element said twice."""
    tensors = facts.pop("tensors")
    mapping = SimpleNamespace(
        hf_param={name: name for name in tensors} if len(tensors) > 1 else next(iter(tensors)),
        **facts.pop("mapping"),
    )
    subject = rules.Subject(
        mapping=mapping,
        module=None,
        config=SimpleNamespace(**facts),
        param=param,
        tensor=lambda name: HfTensor(name, tensors[name], None),
    )
    said = {}
    for holding in holdings_of(param, rule(subject)):
        for flat, index in elements(holding):
            assert flat not in said, f"element {flat} is described twice"
            said[flat] = (holding.tensor, index)
    return said


def cut(rows, tp_size, gtp_size):
    """Per (tp, gtp) rank: the param and the labels of its stored rows; None is padding. `rows`: per TP rank."""
    for tp_rank, tp_rows in enumerate(rows):
        per_rank = len(tp_rows)
        if gtp_size > 1:
            per_rank = -(-len(tp_rows) // (ALIGNMENT * gtp_size)) * ALIGNMENT
        padded = tp_rows + [None] * (per_rank * gtp_size - len(tp_rows))
        for gtp_rank in range(gtp_size):
            first = gtp_rank * per_rank
            param = LocalParam("p", (per_rank, COLUMNS), (COLUMNS, 1), first, len(tp_rows))
            yield tp_rank, param, padded[first : first + per_rank]


def check(rule, rows, tensors, gtp_size, **config):
    """Every rank's description of its memory is the labelled rows."""
    for tp_rank, param, labels in cut(rows, len(rows), gtp_size):
        expected = {
            position * COLUMNS + column: (label[0], (label[1], column))
            for position, label in enumerate(labels)
            if label is not None
            for column in range(COLUMNS)
        }
        mapping = {"tp_rank": tp_rank, "tp_size": len(rows), "megatron_param": "output_layer.weight"}
        assert stored(param, rule, tensors=tensors, mapping=mapping, **config) == expected


def chunks(rows, tp_size):
    assert len(rows) % tp_size == 0
    size = len(rows) // tp_size
    return [rows[rank * size : (rank + 1) * size] for rank in range(tp_size)]


def label(name, start, stop):
    return [(name, row) for row in range(start, stop)]


heads = st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.sampled_from([2, 4]))
sizes = st.sampled_from([1, 2, 4])


@given(heads, sizes, sizes, st.booleans())
@settings(max_examples=60, deadline=None)
def test_qkv_is_exact_for_any_cut_even_through_a_head(shape, tp_size, gtp_size, gated):
    groups, per_group, size = shape
    rows = []
    for group in range(groups):
        own = range(group * per_group, (group + 1) * per_group)
        width = 2 * size if gated else size
        for head in own:
            rows += label("q", head * width, head * width + size)
        for head in own if gated else ():
            rows += label("q", head * width + size, (head + 1) * width)
        rows += label("k", group * size, (group + 1) * size)
        rows += label("v", group * size, (group + 1) * size)
    if len(rows) % tp_size:
        return
    query_rows = groups * per_group * size * (2 if gated else 1)
    tensors = {"q": (query_rows, COLUMNS), "k": (groups * size, COLUMNS), "v": (groups * size, COLUMNS)}
    config = {
        "num_attention_heads": groups * per_group,
        "num_query_groups": groups,
        "kv_channels": size,
        "attention_output_gate": gated,
    }
    check(rules.qkv, chunks(rows, tp_size), tensors, gtp_size, **config)


@given(heads, sizes)
@settings(max_examples=40, deadline=None)
def test_concatenated_qkv_and_kv_are_exact(shape, tp_size):
    groups, per_group, size = shape
    queries, keys = groups * per_group * size, groups * size
    fused, pairs = [], []
    for group in range(groups):
        fused += label("qkv", group * per_group * size, (group + 1) * per_group * size)
        fused += label("qkv", queries + group * size, queries + (group + 1) * size)
        fused += label("qkv", queries + keys + group * size, queries + keys + (group + 1) * size)
        pairs += label("k", group * size, (group + 1) * size) + label("v", group * size, (group + 1) * size)
    config = {"num_attention_heads": groups * per_group, "num_query_groups": groups, "kv_channels": size}
    if len(fused) % tp_size == 0:
        tensors = {"qkv": (queries + 2 * keys, COLUMNS)}
        check(rules.qkv_concatenated, chunks(fused, tp_size), tensors, 1, **config)
    if len(pairs) % tp_size == 0:
        tensors = {"k": (keys, COLUMNS), "v": (keys, COLUMNS)}
        check(rules.kv, chunks(pairs, tp_size), tensors, 1, **config)


def test_the_gate_of_a_head_is_behind_everything_or_the_first_of_its_repeated_rows():
    tensors = {"q": (8, COLUMNS), "k": (4, COLUMNS), "v": (4, COLUMNS), "g": (4, COLUMNS)}
    config = {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 2}
    tail = []
    for group in range(2):
        tail += label("q", 4 * group, 4 * group + 4)
        tail += label("k", 2 * group, 2 * group + 2) + label("v", 2 * group, 2 * group + 2)
    tail += label("g", 0, 4)
    check(rules.qkv_with_head_gate, [tail], tensors, 1, attention_output_gate=False, **config)
    spread = []
    for group in range(2):
        spread += label("q", 4 * group, 4 * group + 4)
        spread += [("g", 2 * group), None, ("g", 2 * group + 1), None]
        spread += label("k", 2 * group, 2 * group + 2) + label("v", 2 * group, 2 * group + 2)
    for tp_size in (1, 2, 4):
        rows = chunks(spread, tp_size)
        check(rules.qkv_with_head_gate, rows, tensors, 1, attention_output_gate=True, **config)


@given(sizes, sizes, st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_gate_and_up_interleave_per_rank_and_a_gtp_cut_may_straddle_them(tp_size, gtp_size, part):
    size = part * tp_size
    rows = [
        label("gate", rank * part, (rank + 1) * part) + label("up", rank * part, (rank + 1) * part)
        for rank in range(tp_size)
    ]
    check(rules.gated_mlp, rows, {"gate": (size, COLUMNS), "up": (size, COLUMNS)}, gtp_size)


@given(sizes, sizes)
@settings(max_examples=20, deadline=None)
def test_every_part_of_a_mamba_projection_is_cut_by_itself(tp_size, gtp_size):
    parts = (16, 16, 8, 8, 4)  # z, x, B, C, dt of 4 heads of 4, 4 groups of 2 states
    starts = [sum(parts[:i]) for i in range(5)]
    rows = [
        [
            row
            for start, size in zip(starts, parts, strict=True)
            for row in label("t", start + rank * size // tp_size, start + (rank + 1) * size // tp_size)
        ]
        for rank in range(tp_size)
    ]
    config = {"mamba_num_heads": 4, "mamba_head_dim": 4, "mamba_state_dim": 2, "mamba_num_groups": 4}
    check(rules.mamba_in_proj, rows, {"t": (sum(parts), COLUMNS)}, gtp_size, **config)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_gated_delta_net_groups_by_key_head_in_hf_and_by_part_in_megatron(tp_size):
    config = {
        "linear_key_head_dim": 2,
        "linear_num_key_heads": 2,
        "linear_value_head_dim": 3,
        "linear_num_value_heads": 4,
    }
    inside = {"q": (0, 2), "k": (2, 4), "v": (4, 10), "z": (10, 16)}
    rows = []
    for rank in range(tp_size):
        own = range(rank * 2 // tp_size, (rank + 1) * 2 // tp_size)
        rows.append([])
        for start, stop in inside.values():
            for head in own:
                rows[-1] += label("qkvz", head * 16 + start, head * 16 + stop)
        for start in (0, 2):
            for head in own:
                rows[-1] += label("ba", head * 4 + start, head * 4 + start + 2)
    check(rules.gdn_in_proj, rows, {"qkvz": (32, COLUMNS), "ba": (8, COLUMNS)}, 1, **config)


@given(st.integers(1, 40), sizes, sizes, st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_a_padded_vocabulary_ends_at_its_last_row(part, tp_size, gtp_size, num_padding):
    num_rows = max(1, part * tp_size - num_padding)
    rows = chunks([("t", row) if row < num_rows else None for row in range(part * tp_size)], tp_size)
    check(rules.column, rows, {"t": (num_rows, COLUMNS)}, gtp_size)


@pytest.mark.parametrize(
    ("num_rows", "gtp_size", "stored_rows", "valid_rows"),
    [(1160, 4, 304, (304, 304, 304, 248)), (100, 3, 48, (48, 48, 4)), (16, 4, 16, (16, 0, 0, 0))],
)
def test_a_gtp_shard_ends_where_its_tp_slice_ends(num_rows, gtp_size, stored_rows, valid_rows):
    for rank, valid in enumerate(valid_rows):
        param = LocalParam("p", (stored_rows, 2), (2, 1), rank * stored_rows, num_rows)
        held = list(holdings_of(param, iter([Piece(HfTensor("t", (num_rows, 2), None), 0, 0, num_rows)])))
        regions = [(h.region.starts[0], h.region.stops[0]) for h in held]
        first = rank * stored_rows
        assert regions == ([(first, first + valid)] if valid else [])


def test_a_row_parallel_matrix_under_gtp_is_a_tile():
    param = LocalParam("p", (16, 4), (4, 1), 16, 40)
    mapping = SimpleNamespace(hf_param="t", tp_rank=1, tp_size=2, megatron_param="linear_proj.weight")
    subject = rules.Subject(mapping, None, None, param, lambda name: HfTensor(name, (40, 8), None))
    (held,) = holdings_of(param, rules.row(subject))
    assert (held.region.starts, held.region.stops) == ((16, 4), (32, 8))
    assert (held.offset, held.strides) == (0, (4, 1))


def test_an_expert_is_one_slice_of_the_stacked_tensor():
    param = LocalParam.whole("p", (4, 3), (3, 1))
    (held,) = holdings_of(param, iter([Piece(HfTensor("t", (4, 3), 5), 0, 0, 4)]))
    assert (held.region.starts, held.region.stops) == ((5, 0, 0), (6, 4, 3))
    assert held.strides[1:] == (3, 1)


def test_a_transposed_expert_swaps_strides():
    param = LocalParam.whole("p", (4, 3), (3, 1))
    (held,) = holdings_of(param, iter([Piece(HfTensor("t", (3, 8), 0), 0, 2, 4, dims=(1, 0))]))
    assert (held.region.starts, held.region.stops) == ((0, 0, 2), (1, 3, 6))
    assert held.strides[1:] == (1, 3)


RULES = {
    "AutoMapping": "auto",
    "ColumnParallelMapping": "column",
    "RowParallelMapping": "row",
    "ReplicatedMapping": "replicated",
    "DirectMapping": "replicated",
    "QKVMapping": "qkv",
    "ConcatenatedQKVMapping": "qkv_concatenated",
    "QKVGMapping": "qkv_with_head_gate",
    "KVMapping": "kv",
    "GatedMLPMapping": "gated_mlp",
    "FusedExpertMapping": "fused_expert",
    "FusedGatedExpertMapping": "fused_gated_expert",
    "MambaInProjMapping": "mamba_in_proj",
    "MambaConv1dMapping": "mamba_conv1d",
    "GDNConv1dMapping": "gdn_conv1d",
    "GDNLinearMapping": "gdn_in_proj",
    "GDNLinearMappingSeparate": "gdn_in_proj_separate",
}


@pytest.mark.megatron
@pytest.mark.timeout(400)
def test_each_mapping_class_has_its_rule_also_those_that_no_tiny_model_uses(trainers):
    assert trainers.run(ranks.rule_names, 1) == (RULES,)


@pytest.mark.megatron
@pytest.mark.timeout(400)
def test_an_expert_of_a_fused_hf_tensor_is_found_by_its_number_also_transposed(trainers):
    trainers.run(ranks.fused_experts, 1)


@pytest.mark.parametrize(
    ("rule", "shape"),
    [(rules.column, (9, 3)), (rules.row, (4, 7)), (rules.replicated, (4, 4)), (rules.column, (8, 4))],
)
def test_a_parameter_that_does_not_fit_its_tensor_is_refused_with_both_shapes(rule, shape):
    param = LocalParam.whole("decoder.p", (4, 3), (3, 1))
    mapping = SimpleNamespace(hf_param="t", tp_rank=0, tp_size=2, megatron_param="linear.weight")
    subject = rules.Subject(mapping, None, None, param, lambda name: HfTensor(name, shape, None))
    with pytest.raises(CannotLowerError, match=r"decoder\.p"):
        list(holdings_of(param, rule(subject)))


@pytest.mark.parametrize(("rule", "rows"), [(rules.qkv, 16), (rules.kv, 8)])
def test_fused_heads_that_do_not_fill_the_parameter_are_refused_with_both_numbers(rule, rows):
    param = LocalParam.whole("decoder.p", (5, 3), (3, 1))
    parts = {part: part for part in "qkv"}
    mapping = SimpleNamespace(hf_param=parts, tp_rank=0, tp_size=2, megatron_param="linear.weight")
    heads = SimpleNamespace(
        num_attention_heads=4, num_query_groups=2, kv_channels=2, attention_output_gate=False
    )
    subject = rules.Subject(mapping, None, heads, param, lambda name: HfTensor(name, (8, 3), None))
    with pytest.raises(CannotLowerError, match=rf"5 rows on each of 2 ranks, its HF tensors have {rows}"):
        list(holdings_of(param, rule(subject)))

"""Faults of the trainer's description, planted in the process of a rank: each must make a validation case fail."""

import dataclasses
from unittest import mock


def run_mutated_rank(mutation, tell, setting, rank):
    """`run_train_rank` with one fault; picklable by name, so that a pool can run it."""
    from refit.validation.ranks import run_train_rank

    with planted(mutation):
        return run_train_rank(tell, setting, rank)


def planted(mutation):
    """A context with the fault of that name; "no rule for X" takes the rule of Bridge's class X away."""
    from refit.train_side.lowering import model, rules

    if mutation.startswith("no rule for "):
        name = mutation.removeprefix("no rule for ")
        left = {kind: rule for kind, rule in rules.rules().items() if kind.__name__ != name}
        assert len(left) == len(rules.rules()) - 1
        return mock.patch.object(model, "rules", lambda: left)
    if mutation == "dense coordinates for experts":
        return with_dense_coordinates(rules)
    wrong = {
        "gate and up swapped": ("GatedMLPMapping", swapped_gate),
        "keys and values swapped": ("QKVMapping", swapped_keys),
        "up_proj of experts without a gate dropped": ("AutoMapping", without_up),
        "query groups not interleaved": ("QKVMapping", concatenated),
        "x and z of Mamba swapped": ("MambaInProjMapping", swapped_mamba),
        "convolution cut as one block": ("MambaConv1dMapping", rules.column),
        "row-parallel cut along rows": ("AutoMapping", rows_for_columns),
    }
    name, fault = wrong[mutation]
    changed = {kind: fault if kind.__name__ == name else rule for kind, rule in rules.rules().items()}
    assert fault in changed.values(), f"no rule for {name} to change"
    return mock.patch.object(model, "rules", lambda: changed)


def with_dense_coordinates(rules):
    from megatron.core import parallel_state

    return mock.patch.multiple(
        rules.Subject,
        tp_rank=property(lambda _: parallel_state.get_tensor_model_parallel_rank()),
        tp_size=property(lambda _: parallel_state.get_tensor_model_parallel_world_size()),
    )


def swapped_gate(subject):
    from refit.train_side.lowering import rules

    gate, up = subject.hf("gate"), subject.hf("up")
    yield from rules._blocks(subject, [(up, 0, up.shape[0]), (gate, 0, gate.shape[0])])


def swapped_keys(subject):
    from refit.train_side.lowering import rules

    keys, values = subject.hf("k"), subject.hf("v")
    other = {keys: values, values: keys}
    for piece in rules.qkv(subject):
        yield dataclasses.replace(piece, tensor=other.get(piece.tensor, piece.tensor))


def without_up(subject):
    from refit.train_side.lowering import rules

    if "experts" not in subject.only.name or "up_proj" not in subject.only.name:
        yield from rules.auto(subject)


def concatenated(subject):
    from refit.train_side.lowering import rules

    runs = ((part, 0, subject.hf(part).shape[0]) for part in "qkv")
    yield from rules._fused_column(subject, runs, {part: subject.hf(part) for part in "qkv"})


def swapped_mamba(subject):
    from refit.train_side.lowering import rules

    inner, states, heads = rules._mamba_sizes(subject.config)
    starts = (inner, 0, 2 * inner, 2 * inner + states, 2 * (inner + states))
    sizes = (inner, inner, states, states, heads)
    yield from rules._blocks(subject, [(subject.only, *part) for part in zip(starts, sizes, strict=True)])


def rows_for_columns(subject):
    """Rank 1 of a row-parallel matrix says that it has the columns of rank 0, and the reverse."""
    from refit.train_side.lowering import rules

    for piece in rules.auto(subject):
        if piece.first_column is None:
            yield piece
        else:
            other = subject.tp_size - 1 - subject.tp_rank
            yield dataclasses.replace(piece, first_column=other * subject.param.shape[1])

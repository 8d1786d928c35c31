"""The body of one rank in the exactness tests: runs in a forked vLLM rank, returns plain values."""

import contextlib
import io

import torch

from refit.gen_side.bare import join_ranks, load
from refit.gen_side.layout import loader_layout
from refit.gen_side.live.audit import audit, observe_commit, observe_staging
from refit.gen_side.loader.hf_index import read_hf_shapes
from refit.gen_side.loader.trace import trace_loader
from refit.gen_side.staging import Staging
from refit.gen_side.switch import plain
from refit.plan.naming import canonical
from refit.transfer.memory import strided_box
from tests.gen_side.checkpoints import tensors_of


def stacked(tensors):
    """HF tensors by canonical name, experts stacked."""
    groups = {}
    for name, tensor in tensors.items():
        key, expert = canonical(name)
        groups.setdefault(key, {})[expert] = tensor
    return {
        key: group[None] if None in group else torch.stack([group[e] for e in range(len(group))])
        for key, group in groups.items()
    }


def fill_by_holdings(trace, params, tensors):
    """What the bulk path does, from whole tensors: each holding's box into its strided memory."""
    whole = stacked(tensors)
    for holding in trace.holdings:
        region = holding.region
        box = whole[holding.tensor][
            tuple(slice(a, b) for a, b in zip(region.starts, region.stops, strict=True))
        ]
        strided_box(params[holding.param], region.shape, holding.strides, holding.offset).copy_(box)


def misc_names(trace, tensors):
    names = {reason.tensor for reason in trace.misc}
    return [name for name in tensors if canonical(name)[0] in names]


def stage(model, trace, folder):
    tensors = tensors_of(folder)
    staging = Staging.begin(model, trace)
    fill_by_holdings(trace, staging.params(), tensors)
    misc = misc_names(trace, tensors)
    if misc:
        staging.load_misc((name, tensors[name]) for name in misc)
    return staging


def first_difference(found, expected):
    """None, or which element differs and what it holds: an index-coded value names its origin."""
    for name in sorted(expected):
        mine, theirs = plain(found[name]), plain(expected[name])
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return f"{name}: {mine.shape} {mine.dtype} for {theirs.shape} {theirs.dtype}"
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[mine.element_size()]
        wrong = (mine.contiguous().view(bits) != theirs.contiguous().view(bits)).flatten().nonzero()
        if len(wrong):
            at = int(wrong[0])
            return f"{name}[{at}] holds {mine.flatten()[at].item()}, expected {theirs.flatten()[at].item()}"
    return None


def live_state(model):
    return {
        name: (id(t), t.data_ptr(), tuple(t.shape), hash(t.detach().float().sum().item()))
        for name, t in model.named_parameters(remove_duplicate=False)
    }


def exact(rank, address, parallel, dtype, start, coded, rounds=2):
    """Trace and refit one rank; every comparison is against vLLM's own loader. Returns facts for the test."""
    with contextlib.redirect_stderr(io.StringIO()):
        join_ranks(start, parallel, dtype, rank, address)
    from vllm.config import set_current_vllm_config

    worker = load(start, parallel, dtype, rank)
    model = worker.model
    with set_current_vllm_config(worker.config):
        before = live_state(model)
        trace = trace_loader(model, read_hf_shapes(start))
        assert live_state(model) == before, "the trace changed the live model"
        by_holdings = stage(model, trace, coded)
        by_loader = Staging.begin(model, trace)
        by_loader.load_misc(tensors_of(coded).items())
        assert set(by_holdings.tensors) == set(by_loader.tensors)
        staged = first_difference(by_holdings.tensors, by_loader.tensors)
        by_loader.discard()
        assert live_state(model) == before, "staging changed the live model"
        fresh = load(coded, parallel, dtype, rank)
        first = audit(model, trace, None).params_sha256
        goal = audit(fresh.model, trace, None).params_sha256
        loaded = observe_staging(model, by_holdings)
        by_holdings.pack_ahead()  # as engines do; the commits of the other rounds pack by themselves
        assert live_state(model) == before, "packing ahead changed the live model"
        assert audit(model, trace, None).params_sha256 == first, "packing ahead changed what the kernels read"
        report = by_holdings.commit(worker.model_config)
        committed = observe_commit(model, loaded)
        checked = audit(model, trace, committed)
        wrong = [name for name in goal if checked.params_sha256.get(name) != goal[name]]
        for _ in range(rounds - 1):
            stage(model, trace, start).commit(worker.model_config)
            again = audit(model, trace, None).params_sha256
            wrong += [f"second: {name}" for name in first if again.get(name) != first[name]]
            stage(model, trace, coded).commit(worker.model_config)
            again = audit(model, trace, None).params_sha256
            wrong += [f"third: {name}" for name in goal if again.get(name) != goal[name]]
        with loader_layout(model):
            pass
    return {
        "staged": staged,
        "wrong": wrong,
        "changed": checked.changed,
        "kinds": checked.message()["kinds"],
        "digests": len(checked.digests),
        "processed": report.processed,
        "ready": report.ready,
        "packed_ahead": report.packed_ahead,
        "attention": report.finished_attention,
        "misc": [(reason.tensor, reason.reason) for reason in trace.misc],
        "num_holdings": len(trace.holdings),
        "tensors": [(spec.name, spec.shape) for spec in trace.tensors],
        "regions": [(h.tensor, h.region.starts, h.region.stops, h.param) for h in trace.holdings],
        "aliases": trace.aliases,
        "partial": sorted(trace.partial),
        "params": list(goal),
    }


def fresh_hashes(rank, address, parallel, dtype, folder):
    """Hash of every live parameter of a rank that vLLM has just loaded from `folder`."""
    join_ranks(folder, parallel, dtype, rank, address)
    from vllm.config import set_current_vllm_config

    worker = load(folder, parallel, dtype, rank)
    with set_current_vllm_config(worker.config):
        trace = trace_loader(worker.model, read_hf_shapes(folder))
        return dict(audit(worker.model, trace, None).params_sha256)

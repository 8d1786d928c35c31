"""What live memory holds, proved after a commit: one digest per HF tensor, one hash per parameter.

A parameter is *plain* if processing left its bytes as loaded: its digests are taken from live memory. It is
*packed* if the kernel computes with memory that can only be read through it (`readback`): its digests are taken
from what the kernel uses. Anything else is *repacked*: the digest of its live bytes is kept at the commit, and a
later change shifts the digests of all tensors in it. So it is where the loader stores a function of a tensor (Mamba's
A = -exp(A_log)): the digest is that of the tensor as received, shifted if what is stored is not that function of it.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from refit.gen_side.layout import layer_tensors
from refit.gen_side.live.packed import packed_modules, read_packed
from refit.gen_side.loader.trace import LoaderTrace
from refit.gen_side.staging import Staging
from refit.gen_side.switch import plain
from refit.plan.manifest import Holding
from refit.plan.naming import canonical
from refit.plan.region import Region, first_overlap, uncovered
from refit.transfer.digest import MASK, digest, whole_digest
from refit.transfer.inverse import replay
from refit.transfer.memory import as_bytes, strided_box

Digests = dict[tuple[str, str], int]
"""(canonical tensor, parameter) -> digest of the elements of that tensor in that parameter."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A version as it was staged, before vLLM processed it."""

    digests: Digests
    unsigned: Digests
    """The same with -0 as +0, for parameters that can be read through a kernel only."""
    params: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Committed:
    """A version as it went live."""

    loaded: Loaded
    plain: frozenset[str]
    live: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class AuditReport:
    """`digests` by canonical tensor; `changed` names parameters whose live bytes are not those committed."""

    digests: Mapping[str, int]
    params_sha256: Mapping[str, str]
    changed: tuple[str, ...]
    num_plain: int
    num_packed: int
    num_repacked: int

    def message(self) -> dict[str, object]:
        """JSON form for the control store."""
        return {
            "digests": {name: f"{value:016x}" for name, value in self.digests.items()},
            "params_sha256": dict(self.params_sha256),
            "changed": list(self.changed),
            "kinds": {"plain": self.num_plain, "packed": self.num_packed, "repacked": self.num_repacked},
        }


def observe_staging(model: torch.nn.Module, staging: Staging) -> Loaded:
    """Digest an open staging. Call when nothing is loaded any more, and before anything is packed."""
    trace = staging.trace
    memory = {name: plain(tensor) for name, tensor in staging.tensors.items() if name in trace.written}
    packed = {name: memory[name] + 0 for name, _ in packed_params(model, trace) if name in memory}
    return Loaded(
        digests=_tensor_digests(trace, memory) | _digests_of_computed(staging, memory),
        unsigned=_tensor_digests(trace, packed),
        params={name: whole_digest(tensor) for name, tensor in memory.items()},
        shapes={name: tuple(tensor.shape) for name, tensor in memory.items()},
    )


def observe_commit(model: torch.nn.Module, loaded: Loaded) -> Committed:
    """Digest live memory right after the commit of `loaded`."""
    live = dict(live_tensors(model))
    digests = {name: whole_digest(plain(live[name])) for name in loaded.params if live[name].numel()}
    same = frozenset(
        name
        for name, value in digests.items()
        if value == loaded.params[name] and tuple(live[name].shape) == loaded.shapes[name]
    )
    return Committed(loaded, same, digests)


def audit(model: torch.nn.Module, trace: LoaderTrace, committed: Committed | None) -> AuditReport:
    """Digests of live memory now. Without a commit (as loaded from disk) only the hashes are given."""
    live = {name: plain(tensor) for name, tensor in live_tensors(model)}
    packed = _read_all_packed(model, trace)
    hashes = {name: _sha256(tensor) for name, tensor in live.items() if name not in packed or tensor.numel()}
    for name, tensor in packed.items():
        hashes[f"{name} (packed)" if live[name].numel() else name] = _sha256(tensor)
    if committed is None:
        return AuditReport({}, hashes, (), 0, 0, 0)
    now = {name: whole_digest(live[name]) for name in committed.live}
    changed = {name for name, value in now.items() if value != committed.live[name]}
    found = _audited_digests(trace, committed, live, packed, now)
    for (tensor, param), value in found.items():
        if value != committed.loaded.digests[tensor, param]:
            changed.add(param)
    totals: dict[str, int] = defaultdict(int)
    for (tensor, _), value in found.items():
        totals[tensor] = (totals[tensor] + value) & MASK
    hidden = set(packed) - set(committed.live)
    repacked = set(committed.live) - committed.plain
    return AuditReport(
        totals, hashes, tuple(sorted(changed)), len(committed.plain), len(hidden), len(repacked)
    )


def _audited_digests(
    trace: LoaderTrace,
    committed: Committed,
    live: Mapping[str, torch.Tensor],
    packed: Mapping[str, torch.Tensor],
    now: Mapping[str, int],
) -> Digests:
    loaded = committed.loaded
    found = _tensor_digests(trace, {name: live[name] for name in committed.plain})
    through_kernel = _tensor_digests(trace, packed)
    computed = {inverse.param.name for inverse in trace.inverses}
    for key, value in loaded.digests.items():
        param = key[1]
        if key in through_kernel and through_kernel[key] != loaded.unsigned[key]:
            found[key] = through_kernel[key]
        elif param in committed.live and (param in computed or param not in committed.plain):
            found[key] = (value + now[param] - committed.live[param]) & MASK
        elif param not in committed.plain and key in through_kernel:
            found[key] = value
        elif param not in committed.plain:
            continue  # too large to read through its kernel: no digest rather than a guess
    return found


def pieces(trace: LoaderTrace) -> Iterator[Holding]:
    """The holdings with every element of a tensor once, though a worker may hold it twice."""
    by_tensor: dict[str, list[Holding]] = defaultdict(list)
    for holding in trace.holdings:
        by_tensor[holding.tensor].append(holding)
    for group in by_tensor.values():
        if first_overlap([holding.region for holding in group]) is None:
            yield from group
        else:
            yield from _without_repeats(group)


def _without_repeats(group: list[Holding]) -> Iterator[Holding]:
    seen: list[Region] = []
    for holding in group:
        for region in uncovered(holding.region, seen):
            offset = holding.offset_of(region)
            yield Holding(holding.tensor, region, holding.param, offset, holding.strides)
        seen.append(holding.region)


def _tensor_digests(trace: LoaderTrace, memory: Mapping[str, torch.Tensor]) -> Digests:
    shapes = {spec.name: spec.shape for spec in trace.tensors}
    found: Digests = defaultdict(int)
    for piece in pieces(trace):
        if piece.param in memory:
            view = strided_box(memory[piece.param], piece.region.shape, piece.strides, piece.offset)
            key = (piece.tensor, piece.param)
            found[key] = (found[key] + digest(view, piece.region, shapes[piece.tensor])) & MASK
    return dict(found)


def _digests_of_computed(staging: Staging, memory: Mapping[str, torch.Tensor]) -> Digests:
    """By whole tensor: of what was received, plus how far what is stored is from the loader's function of it."""
    found: Digests = {}
    for inverse in staging.trace.inverses:
        stored = memory[inverse.param.name]
        for holding in inverse.holdings:
            region, key = holding.region, (holding.tensor, holding.param)
            whole = _whole(staging.computed_from, holding.tensor)
            shape = tuple(whole.shape)
            box = whole[tuple(map(slice, region.starts, region.stops))].to(stored.dtype)
            held = digest(strided_box(stored, region.shape, holding.strides, holding.offset), region, shape)
            drift = held - digest(replay(inverse.steps, box), region, shape)
            found[key] = (found.get(key, digest(whole, Region.whole(shape), shape)) + drift) & MASK
    return found


def _whole(received: Mapping[str, torch.Tensor], tensor: str) -> torch.Tensor:
    """A canonical tensor from its HF tensors, experts stacked."""
    parts = {canonical(name)[1]: part for name, part in received.items() if canonical(name)[0] == tensor}
    return parts[None] if None in parts else torch.stack([parts[expert] for expert in range(len(parts))])


def _read_all_packed(model: torch.nn.Module, trace: LoaderTrace) -> dict[str, torch.Tensor]:
    specs = {spec.name: spec for spec in trace.params}
    found = {}
    for name, module in packed_params(model, trace):
        if name in specs:
            tensor = read_packed(module, specs[name].shape, getattr(torch, specs[name].dtype))
            if tensor is not None:
                found[name] = tensor
    return found


def packed_params(model: torch.nn.Module, trace: LoaderTrace) -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules that compute with packed memory, by the name under which the loader writes their weight."""
    aliases = dict(trace.aliases)
    for name, module in packed_modules(model):
        yield aliases.get(name, name), module


def live_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for module_name, module in model.named_modules():
        for key, tensor in layer_tensors(module).items():
            yield (f"{module_name}.{key}" if module_name else key), tensor


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(as_bytes(tensor.contiguous().cpu()).numpy()).hexdigest()

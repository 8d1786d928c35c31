"""A refit on one worker as a transaction: stage beside the live model, then commit in place or discard.

1. `begin` allocates the loader's layout of every module that the loader writes, beside the live model.
2. `params()` is the memory that bulk receives write; `load_misc` runs vLLM's own loader into the same memory.
   The live model is whole in between and may serve. `pack_ahead` does what a commit need not wait with.
3. `commit` copies what is ready into the storages that serve (CUDA graphs keep their addresses) and hands each other
   staged module to vLLM's own processing, once, attention last; `release` then gives the memory back. `discard` forgets
   the staging; the live model was never touched.

Extra memory: the weights of this worker once, in the loader's layout; on a CPU that packs, once more until the commit.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

from refit.gen_side.layout import (
    Slot,
    detached_views,
    finalize,
    is_deferred,
    layer_reload,
    layer_tensors,
    loader_layout,
    place_live,
    process_module,
)
from refit.gen_side.loader.trace import LoaderTrace
from refit.gen_side.switch import Switch, plain
from refit.plan.naming import canonical

type Weights = Iterable[tuple[str, torch.Tensor]]
type Addresses = dict[str, dict[str, tuple[int, tuple[int, ...]]]]
"""Where each parameter of each module lies, and its shape."""


class StagingError(RuntimeError):
    """A step of the transaction came out of order, or a loader left it. The live model is as it was."""


class CommitFailed(RuntimeError):  # noqa: N818 - named like RefitFailed
    """vLLM's processing failed half way: this worker must not serve before a full refit or a restart."""


@dataclass(frozen=True, slots=True)
class CommitReport:
    """What a commit did. Each staged module was processed once; attention layers were finished after them.

    `ready` are those of `processed` that were only copied, `packed_ahead` those of them that were packed on a twin.
    """

    processed: tuple[str, ...]
    ready: tuple[str, ...]
    packed_ahead: tuple[str, ...]
    finished_attention: tuple[str, ...]
    seconds: float


@dataclass(slots=True)
class Staging:
    """One version on its way. Open until `commit` or `discard`."""

    model: torch.nn.Module
    trace: LoaderTrace
    tensors: dict[str, torch.Tensor]
    modules: dict[str, dict[str, torch.Tensor]]
    attention_loads: dict[str, tuple[list[Any], int]] = field(default_factory=dict)
    computed_from: dict[str, torch.Tensor] = field(default_factory=dict)
    """Copies of the HF tensors, by HF name, that the loader stored a function of: see `trace.inverses`."""
    switch: Switch = field(default_factory=Switch)
    addresses: Addresses = field(default_factory=dict)
    state: str = "open"

    @classmethod
    def begin(cls, model: torch.nn.Module, trace: LoaderTrace) -> Staging:
        """Allocate the staging of one refit, padding filled as the loader fills it. The live model serves on."""
        with torch.no_grad(), loader_layout(model) as slots:
            tensors, modules = _allocate(model, slots, trace)
            for fill in trace.fills:
                if fill.param in tensors:
                    memory = plain(tensors[fill.param])
                    view = torch.as_strided(memory, fill.dst.sizes, fill.dst.strides, fill.dst.offset)
                    view.fill_(fill.value)
        return cls(model, trace, tensors, modules)

    @property
    def num_bytes(self) -> int:
        """Memory that this staging holds beside the live model."""
        return sum(self.tensors[name].nbytes for name in self.tensors if name not in dict(self.trace.aliases))

    def params(self) -> dict[str, torch.Tensor]:
        """The staging by ParamSpec name: plain tensors in the loader's layout, for bulk receives."""
        self._require_open("params")
        return {spec.name: plain(self.tensors[spec.name]) for spec in self.trace.params}

    def load_misc(self, weights: Weights) -> None:
        """Load HF tensors through vLLM's own `load_weights` into the staging.

        Raises StagingError where the loader writes a parameter that the trace did not see it write.
        """
        self._require_open("load_misc")
        with torch.no_grad(), loader_layout(self.model) as slots:
            self._place(self.modules)
            guard = _StrayWriteGuard({s.param: s.tensor for s in slots if not s.deferred})
            with disable_mtp_completeness_check(), guard:
                self.model.load_weights(self._keep_deferred(weights))
            self._keep_attention_loads()

    def pack_ahead(self) -> None:
        """Do what can be done beside the live model; nothing may be loaded after it. Safe beside steps of it."""
        self._require_open("pack_ahead")
        self.switch = Switch.prepare(self.model, self.modules)
        self.switch.moves += self._detached_views()
        self.addresses = _addresses(dict(self.model.named_modules()))

    def commit(self, model_config: Any) -> CommitReport:
        """Process every staged module once, in place; the new version serves from here on. `release` comes after it.

        Raises CommitFailed when vLLM's processing fails, a module stays without memory, or memory moved.
        """
        self._require_open("commit")
        started = time.perf_counter()
        modules = dict(self.model.named_modules())
        addresses = self.addresses or _addresses(modules)
        self.state = "failed"
        try:
            with torch.no_grad():
                if not self.addresses:  # nothing was made ready
                    self.switch.moves += self._detached_views()
                self.switch.run()
                attention = self._process_late(modules, model_config)
            _check_live(modules, addresses)
        except Exception as error:
            message = f"the commit failed: {error}; restart this engine or refit it in full"
            raise CommitFailed(message) from error
        self.state = "committed"
        seconds = time.perf_counter() - started
        ready = tuple(name for name in self.modules if name in self.switch.ready)
        return CommitReport(tuple(self.modules), ready, tuple(self.switch.packed), attention, seconds)

    def release(self) -> None:
        """Give back what the staging held, and what it has replaced."""
        self.tensors, self.modules, self.attention_loads, self.computed_from = {}, {}, {}, {}
        self.switch, self.addresses = Switch(), {}

    def discard(self) -> None:
        """Forget the staging. The version that was live before `begin` is live."""
        self._require_open("discard")
        self.state = "discarded"
        self.release()

    def _process_late(self, modules: Mapping[str, torch.nn.Module], model_config: Any) -> tuple[str, ...]:
        """Let vLLM process what could not be made ready. Returns the attention layers, which are finished after it."""
        late = self.modules.keys() - self.switch.ready
        opened = torch.nn.ModuleList(
            module for name, module in modules.items() if name in late or name in self.attention_loads
        )
        names = {id(module): name for name, module in modules.items()}
        processed = set()
        with loader_layout(opened):
            self._place(late)
            for module in opened.modules():
                name = names.get(id(module))  # the list itself has none
                if is_deferred(module):
                    reload = layer_reload(module)
                    loads, reload.load_numel = self.attention_loads.get(str(name), ([], 0))
                    reload.loaded_weights = list(loads)
                elif name in late:
                    _require_memory(name, module)
                    process_module(module)
                    processed.add(name)
                else:
                    place_live(module)
            attention = finalize(self.model, modules, opened, model_config)
        if processed != late:
            raise CommitFailed(f"staged modules were not processed: {sorted(late - processed)}")
        return attention

    def _detached_views(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(live, staged) of buffers that are views of a parameter's old memory, which kernels read."""
        found = []
        for view, param in detached_views(self.model):
            if param in self.tensors:
                staged = plain(self.tensors[param])
                staged = staged.as_strided(view.size(), view.stride(), view.storage_offset())
                found.append((plain(view), staged))
        return found

    def _place(self, names: Iterable[str]) -> None:
        """Put the staging into these modules, which hold the loader's layout on meta tensors."""
        modules = dict(self.model.named_modules())
        for module_name in names:
            module = modules[module_name]
            for name, tensor in self.modules[module_name].items():
                owner = module._parameters if name in module._parameters else module._buffers
                owner[name] = tensor

    def _keep_deferred(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Attention keeps what it is given until the commit, longer than a receive buffer lives: copy that."""
        inverted = {holding.tensor for inverse in self.trace.inverses for holding in inverse.holdings}
        for name, tensor in weights:
            if canonical(name)[0] in inverted:
                self.computed_from[name] = tensor.clone()
            yield name, tensor.clone() if name in self.trace.deferred else tensor

    def _keep_attention_loads(self) -> None:
        for name, module in self.model.named_modules():
            reload = layer_reload(module)
            if is_deferred(module) and reload.loaded_weights:
                old, old_elements = self.attention_loads.get(name, ([], 0))
                self.attention_loads[name] = (old + reload.loaded_weights, old_elements + reload.load_numel)

    def _require_open(self, step: str) -> None:
        if self.state != "open":
            raise StagingError(f"{step} on a staging that is {self.state}; begin a new one")


class _StrayWriteGuard(TorchDispatchMode):
    """A copy into a meta parameter would be lost without a word: raise instead."""

    def __init__(self, params: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._meta = {t.untyped_storage()._cdata: name for name, t in params.items() if t.is_meta}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].is_meta:
            param = self._meta.get(args[0].untyped_storage()._cdata)
            if param is not None:
                raise StagingError(
                    f"the loader writes {param}, which its trace did not write: trace it again"
                )
        return func(*args, **(kwargs or {}))


def _allocate(
    model: torch.nn.Module, slots: Iterable[Slot], trace: LoaderTrace
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """(staging by parameter name, staging by module and own name) of every module the loader writes."""
    slots, aliases = tuple(slots), dict(trace.aliases)
    devices = {name: layer_reload(module).restore_device for name, module in model.named_modules()}
    touched = {
        s.module
        for s in slots
        if not s.deferred and (trace.unsure or aliases.get(s.param, s.param) in trace.written)
    }
    tensors: dict[str, torch.Tensor] = {}
    modules: dict[str, dict[str, torch.Tensor]] = {name: {} for name in sorted(touched)}
    for slot in slots:
        if slot.module not in touched:
            continue
        first = aliases.get(slot.param)
        if first in tensors:
            tensors[slot.param] = tensors[first]
        elif slot.param in trace.written:
            tensors[slot.param] = slot.empty(devices[slot.module])
            if slot.param in trace.partial:
                plain(tensors[slot.param]).zero_()
        elif slot.tensor.is_meta:
            tensors[slot.param] = _kept(slot, devices[slot.module])
        else:
            continue  # vLLM leaves it live through a reload and no loader writes it: an expert map
        modules[slot.module][slot.name] = tensors[slot.param]
    return tensors, modules


def _kept(slot: Slot, device: torch.device) -> torch.Tensor:
    """Memory of a tensor that no checkpoint sets: its live value where the layout is still the loader's."""
    tensor, live = slot.empty(device), slot.live
    if live is not None and live.shape == tensor.shape and live.dtype == tensor.dtype:
        plain(tensor).copy_(plain(live))
    else:
        plain(tensor).zero_()
    return tensor


def _require_memory(name: str, module: torch.nn.Module) -> None:
    meta = [key for key, tensor in layer_tensors(module).items() if tensor.is_meta]
    if meta:
        raise CommitFailed(f"module {name} has no memory for {', '.join(meta)}")


def _addresses(modules: Mapping[str, torch.nn.Module]) -> Addresses:
    return {
        name: {
            key: (tensor.data_ptr(), tuple(tensor.shape))
            for key, tensor in module._parameters.items()
            if tensor is not None
        }
        for name, module in modules.items()
    }


def _check_live(modules: Mapping[str, torch.nn.Module], before: Addresses) -> None:
    """No tensor on meta, and each parameter where it was: captured graphs read those addresses."""
    for name, module in modules.items():
        _require_memory(name, module)
    after = _addresses(modules)
    if after != before:
        moved = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        raise CommitFailed(f"parameters of {len(moved)} modules moved or changed shape, {moved[0]} first")

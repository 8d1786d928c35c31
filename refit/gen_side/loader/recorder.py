"""Watching a loader run: every write to a parameter as a pair of views, with nothing written.

A loader is fed meta tensors. Meta tensors keep storage, offset and strides through every view, so each caught
`copy_` says exactly which elements of which HF tensor go where. A value that was computed on the way has a
storage of its own; it carries the names of the HF tensors it was computed from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refit.gen_side.loader.views import View
from refit.transfer.inverse import STEPS

_ATEN = torch.ops.aten
_STEPS = {getattr(_ATEN, name).default: name for name in STEPS}


@dataclass(frozen=True, slots=True)
class Copied:
    """A view of HF tensor `tensor` was copied into a view of parameter `param`."""

    tensor: str
    src: View
    param: str
    dst: View


@dataclass(frozen=True, slots=True)
class Filled:
    """A view of `param` was set to one value while `tensor` was loaded."""

    tensor: str
    param: str
    dst: View
    value: float | int | bool


@dataclass(frozen=True, slots=True)
class Computed:
    """Something that is no view of an HF tensor was written to `param`; `tensors` went into it.

    `steps`: all of `param` became this function of itself, element by element; () for anything else.
    """

    tensors: frozenset[str]
    param: str
    reason: str
    steps: tuple[str, ...] = ()


Write = Copied | Filled | Computed


class Recorder(TorchDispatchMode):
    """Records writes to `params` (name -> tensor, meta or live) while a loader runs inside `with`.

    No write to a parameter is executed, so live parameters keep their values. `writes` is in loader order;
    `read_values` names tensors whose values a loader asked for on the host.
    """

    def __init__(self, params: dict[str, torch.Tensor], sources: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.writes: list[Write] = []
        self.read_values: set[str] = set()
        self.current = ""
        self._changed: set[str] = set()
        self._params: dict[int, tuple[str, int]] = {}
        for name, tensor in params.items():
            if tensor.numel():  # of two names of one memory, the first is the one that is written
                self._params.setdefault(_key(tensor), (name, tensor.storage_offset()))
        self._sources = {_key(t): name for name, t in sources.items()}
        self._dtypes = {name: t.dtype for name, t in sources.items()}
        self._names: dict[int, frozenset[str]] = {key: frozenset({n}) for key, n in self._sources.items()}
        self._alive: list[object] = [params, sources]
        self._shapes = {name: t.shape for name, t in params.items()}
        self._steps: dict[int, tuple[str, tuple[str, ...]]] = {}
        """By storage: (param, steps) of values that are a function of a whole parameter, element by element."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view:  # the storage says it all
            return func(*args, **kwargs)
        if func is _ATEN.copy_.default and (known := self._params.get(_key(args[0]))) is not None:
            names = self._names.get(_key(args[1]), frozenset())
            self._record_copy(args[0], args[1], known, names)
            return args[0]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        names = frozenset().union(*(self._names.get(_key(t), frozenset()) for t in tensors))
        if func is _ATEN._local_scalar_dense.default and names:
            self.read_values |= names
            return _zero_of(args[0])
        targets = _written(func, args, kwargs)
        written = [t for t in targets if _key(t) in self._params]
        if written:
            for target in written:
                self._record(func, target, args, names)
            return args[0]
        self._changed |= {self._sources[_key(t)] for t in targets if _key(t) in self._sources}
        result = func(*args, **kwargs)
        self._follow(func, args, targets, result, names)
        return result

    def _follow(self, func: Any, args: Any, targets: Any, result: Any, names: frozenset[str]) -> None:
        """Note what went into a result."""
        if names:
            for out in tree_leaves(result):
                if isinstance(out, torch.Tensor) and _key(out) not in self._sources:
                    self._alive.append(out)
                    self._names[_key(out)] = self._names.get(_key(out), frozenset()) | names
        for target in targets:
            self._steps.pop(_key(target), None)
        known = self._param_steps(args[0]) if names and func in _STEPS else None
        if known is not None:
            self._steps[_key(result)] = (known[0], (*known[1], _STEPS[func]))

    def _param_steps(self, tensor: torch.Tensor) -> tuple[str, tuple[str, ...]] | None:
        """(param, steps) if these are the values of a whole parameter, in its order, after those steps."""
        key = _key(tensor)
        known = (self._params[key][0], ()) if key in self._params else self._steps.get(key)
        if known is None or tensor.shape != self._shapes[known[0]] or not tensor.is_contiguous():
            return None
        return known

    def _record(self, func: Any, target: torch.Tensor, args: Any, names: frozenset[str]) -> None:
        param, base = self._params[_key(target)]
        dst = _view(target, base)
        if func is _ATEN.zero_.default:
            self.writes.append(Filled(self.current, param, dst, 0))
        elif func is _ATEN.fill_.Scalar:
            self.writes.append(Filled(self.current, param, dst, args[1]))
        else:
            self.writes.append(Computed(names | {self.current}, param, f"{func} writes to it"))
        self._names[_key(target)] = self._names.get(_key(target), frozenset()) | names

    def _record_copy(
        self, target: torch.Tensor, source: torch.Tensor, known: tuple[str, int], names: frozenset[str]
    ) -> None:
        param, dst = known[0], _view(target, known[1])
        tensor = self._sources.get(_key(source))
        if tensor in self._changed:
            reason = "the loader changes the tensor before it stores it"
            self.writes.append(Computed(names, param, reason))
        elif tensor is not None and source.dtype is not self._dtypes[tensor]:
            reason = f"the loader reads its {self._dtypes[tensor]} as {source.dtype}"
            self.writes.append(Computed(names, param, reason))
        elif tensor is not None:
            wide = source if source.shape == target.shape else source.expand(target.shape)
            self.writes.append(Copied(tensor, _view(wide, 0), param, dst))
        elif not names and not source.is_meta and source.numel() == 1:
            self.writes.append(Filled(self.current, param, dst, source.reshape(()).tolist()))
        else:
            reason = "the loader computes the value it stores"
            made, place = self._param_steps(source), self._param_steps(target)
            steps = made[1] if made is not None and place == (made[0], ()) else ()
            self.writes.append(Computed(names or frozenset({self.current}), param, reason, steps))
        held = self._names.get(_key(target), frozenset())
        self._names[_key(target)] = held | names


def _view(tensor: torch.Tensor, base: int) -> View:
    return View(tensor.storage_offset() - base, tuple(tensor.shape), tuple(tensor.stride()))


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _zero_of(tensor: torch.Tensor) -> bool | int | float:
    if tensor.dtype is torch.bool:
        return False
    return 0.0 if tensor.dtype.is_floating_point else 0


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors that this operator writes to, by its own schema."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        found.extend(x for x in tree_leaves(value) if isinstance(x, torch.Tensor))
    return found

"""Megatron on a machine without CUDA: the one place for what it takes.

Written for megatron-core 0.19 and megatron-bridge 0.6; `require_versions` refuses others rather than patch
them blindly. With CUDA every function here changes nothing.

Four facts are answered:
1. `megatron.bridge.peft.lora_layers` imports Transformer Engine unconditionally. That module, and no other,
   gets a placeholder while Bridge is imported; all others still see that there is no Transformer Engine.
2. `torch.cuda.current_device()` and friends are asked for a device, a stream or a random state.
3. Tensors are made with `device="cuda"` (default attention mask, token counters, gradient norms).
4. `CudaRNGStatesTracker.fork` swaps the CUDA generator.
Points 2 to 4 hold inside `with cpu_megatron():` only.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

SUPPORTED_VERSIONS = {"megatron-core": "0.19.", "megatron-bridge": "0.6."}
_NEEDS_TRANSFORMER_ENGINE = "megatron.bridge.peft.lora_layers"


def require_versions() -> None:
    """Raise RuntimeError if an installed Megatron is not of the line these workarounds were written for."""
    for package, line in SUPPORTED_VERSIONS.items():
        installed = importlib.metadata.version(package)
        if not installed.startswith(line):
            raise RuntimeError(
                f"{package} {installed} is installed, but refit.train_side knows {line}x: pin it"
            )


def _transformer_engine_placeholder() -> types.ModuleType:
    engine = types.ModuleType("transformer_engine")
    engine.pytorch = types.SimpleNamespace(
        Linear=type("Linear", (), {}),
        LayerNormLinear=type("LayerNormLinear", (), {}),
        ops=types.SimpleNamespace(Sequential=type("Sequential", (), {})),
    )
    return engine


@functools.cache
def import_bridge() -> types.ModuleType:
    """Import and return `megatron.bridge` (10 to 40 s). Whatever imports it in this package calls this."""
    require_versions()
    logging.getLogger("megatron").setLevel(logging.ERROR)  # it logs every parameter of every rank otherwise
    if importlib.util.find_spec("transformer_engine") is not None:
        return importlib.import_module("megatron.bridge")
    placeholder, real_import = _transformer_engine_placeholder(), builtins.__import__

    def import_with_placeholder(name: str, globals_: Any = None, *rest: Any, **named: Any) -> Any:
        importer = (globals_ or named.get("globals") or {}).get("__name__")
        if name == "transformer_engine.pytorch" and importer == _NEEDS_TRANSFORMER_ENGINE:
            return placeholder
        return real_import(name, globals_, *rest, **named) if not named else real_import(name, **named)

    with mock.patch.object(builtins, "__import__", import_with_placeholder):
        return importlib.import_module("megatron.bridge")


class _OnCpu(TorchFunctionMode):
    """Sends what was asked of CUDA to the CPU: `device=`, `.cuda()`, and the names of tensor types."""

    def __torch_function__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizer sorts parameters by "torch.cuda.BFloat16Tensor" and the like.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


class _NoStream:
    """Stands for every CUDA stream: work on the CPU is in order already."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...


_CPU_TORCH_CUDA = {
    "current_device": lambda: torch.device("cpu"),
    "synchronize": lambda *_: None,
    "empty_cache": lambda: None,
    "Stream": _NoStream,
    "current_stream": _NoStream,
    "stream": lambda _: contextlib.nullcontext(),
}


@contextlib.contextmanager
def cpu_megatron() -> Iterator[None]:
    """Within it, Megatron builds, converts, trains and saves on the CPU. With CUDA it does nothing."""
    if torch.cuda.is_available():
        yield
        return
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    no_fork = mock.patch.object(CudaRNGStatesTracker, "fork", lambda *_, **__: contextlib.nullcontext())
    with no_fork, mock.patch.multiple(torch.cuda, **_CPU_TORCH_CUDA), _OnCpu():
        yield


def stepwise(stream: Iterator[Any]) -> Iterator[Any]:
    """The same items, each made inside `cpu_megatron()`, which is left again before the caller gets it."""
    end = object()
    while True:
        with cpu_megatron():
            item = next(stream, end)
        if item is end:
            return
        yield item

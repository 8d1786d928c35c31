"""Megatron on a machine without CUDA: the one place for what it takes.

Written for megatron-core 0.19 and megatron-bridge 0.6; `require_versions` refuses others rather than patch
them blindly. With CUDA every function here changes nothing.

What is answered:
1. `megatron.bridge.peft.lora_layers` imports Transformer Engine unconditionally, and Megatron's Mamba mixer
   cannot be constructed without mamba_ssm. These modules, and no other, get placeholders (for Mamba, working
   ones: `local_mamba`) while Bridge is imported; all others still see that there is neither.
2. `torch.cuda.current_device()` and friends are asked for a device, a stream or a random state.
3. Tensors are made with `device="cuda"` (default attention mask, token counters, gradient norms).
4. `CudaRNGStatesTracker.fork` swaps the CUDA generator.
5. Specs of MTP layers and Mamba hybrids name parts of Transformer Engine.
Points 2 to 5 hold inside `with cpu_megatron():` only.
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

from refit.train_side import local_mamba

SUPPORTED_VERSIONS = {"megatron-core": "0.19.", "megatron-bridge": "0.6."}


def require_versions() -> None:
    """Raise RuntimeError if an installed Megatron is not of the line these workarounds were written for."""
    for package, line in SUPPORTED_VERSIONS.items():
        installed = importlib.metadata.version(package)
        if not installed.startswith(line):
            raise RuntimeError(
                f"{package} {installed} is installed, but refit.train_side knows {line}x: pin it"
            )


def _placeholders() -> dict[tuple[str, str], Any]:
    """What `import NAME` gives to MODULE, by (MODULE, NAME), where the package is not installed."""
    engine = types.SimpleNamespace(
        pytorch=types.SimpleNamespace(
            Linear=type("Linear", (), {}),
            LayerNormLinear=type("LayerNormLinear", (), {}),
            ops=types.SimpleNamespace(Sequential=type("Sequential", (), {})),
        )
    )
    kernels = types.SimpleNamespace(
        mamba_chunk_scan_combined=local_mamba.scan_for_inference,
        mamba_split_conv1d_scan_combined=local_mamba.split_conv1d_scan,
    )
    mixer, triton = "megatron.core.ssm.mamba_mixer", "mamba_ssm.ops.triton"
    wanted = {
        ("megatron.bridge.peft.lora_layers", "transformer_engine.pytorch"): engine,
        (mixer, f"{triton}.layernorm_gated"): types.SimpleNamespace(RMSNorm=local_mamba.GatedNorm),
        (mixer, f"{triton}.ssd_combined"): kernels,
    }
    return {
        key: module
        for key, module in wanted.items()
        if importlib.util.find_spec(key[1].partition(".")[0]) is None
    }


@functools.cache
def import_bridge() -> types.ModuleType:
    """Import and return `megatron.bridge` (10 to 40 s). Whatever imports it in this package calls this."""
    require_versions()
    logging.getLogger("megatron").setLevel(logging.ERROR)  # it logs every parameter of every rank otherwise
    placeholders, real_import = _placeholders(), builtins.__import__

    # The parameters are called as builtins.__import__ calls them: jinja2 passes them by name.
    def import_with_placeholders(
        name: str,
        globals: Any = None,  # noqa: A002
        locals: Any = None,  # noqa: A002
        fromlist: Any = (),
        level: int = 0,
    ) -> Any:
        key = ((globals or {}).get("__name__", ""), name)
        if key in placeholders:
            return placeholders[key]
        return real_import(name, globals, locals, fromlist, level)

    with mock.patch.object(builtins, "__import__", import_with_placeholders):
        return importlib.import_module("megatron.bridge")


def compute_device() -> torch.device:
    """Where this process computes: its current CUDA device, or the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


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
    """Stands for every CUDA stream and event: work on the CPU is in order already."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, *_: Any) -> None: ...


_CPU_TORCH_CUDA = {
    "current_device": lambda: torch.device("cpu"),
    "synchronize": lambda *_: None,
    "empty_cache": lambda: None,
    "Stream": _NoStream,
    "Event": _NoStream,
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

    from refit.train_side.local_layers import without_transformer_engine

    no_fork = mock.patch.object(CudaRNGStatesTracker, "fork", lambda *_, **__: contextlib.nullcontext())
    with without_transformer_engine(), no_fork, mock.patch.multiple(torch.cuda, **_CPU_TORCH_CUDA), _OnCpu():
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

"""The layout that vLLM's loader writes, put back on a live model for a while (vLLM 0.31).

After `process_weights_after_loading` live memory is the kernels' layout. vLLM remembers the loader's layout
as meta tensors (`model_loader.reload`). What is used here without being exported by vLLM is reached through
`_RELOAD` and `_META`: the one place to look at when vLLM changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.reload import layerwise as _RELOAD  # noqa: N812
from vllm.model_executor.model_loader.reload import meta as _META  # noqa: N812
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors
from vllm.platforms import current_platform


@dataclass(frozen=True, slots=True)
class Slot:
    """One parameter or buffer of one module. `tensor` is the loader's: meta, or live where vLLM keeps it."""

    param: str
    module: str
    name: str
    tensor: torch.Tensor
    live: torch.Tensor | None
    deferred: bool

    def empty(self, device: torch.device) -> torch.Tensor:
        """New memory of the loader's layout, class and attributes, on `device`. Its values are undefined."""
        template = self.tensor if self.tensor.is_meta else _META.to_meta_tensor(self.tensor)
        with device:
            return _META.materialize_meta_tensor(template)


def is_deferred(module: torch.nn.Module) -> bool:
    """True for attention layers, whose tensors vLLM buffers and finishes last."""
    return is_deferred_attention_layer(module)


def layer_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers that the module itself owns."""
    return get_layer_tensors(module)


def layer_reload(module: torch.nn.Module) -> Any:
    """vLLM's reload state of one module (`LayerReloadingInfo`)."""
    return _RELOAD.get_layerwise_info(module)


@contextmanager
def loader_layout(model: torch.nn.Module) -> Iterator[tuple[Slot, ...]]:
    """Inside, the modules hold the loader's layout on meta tensors with vLLM's plain loaders.

    Attention layers keep vLLM's buffering loaders. On exit every module that is still open gets its kernel
    tensors back: the same objects, untouched. Allocates nothing.
    """
    live = {
        (name, key): tensor
        for name, module in model.named_modules()
        for key, tensor in layer_tensors(module).items()
    }
    _name_partial_loaders(model)
    try:
        with torch.no_grad():
            _RELOAD.initialize_layerwise_reload(model)
        yield tuple(_slots(model, live))
    finally:
        close_reload(model)


def _name_partial_loaders(model: torch.nn.Module) -> None:
    """vLLM 0.31 asks each loader for its name on a reload; those of KV scales per head are partials without one."""
    for module in model.modules():
        for tensors in layer_reload(module).restore_metadata:
            for tensor in tensors.values():
                loader = getattr(tensor, "weight_loader", None)  # absent is normal: the default loader
                if isinstance(loader, partial) and not hasattr(loader, "__name__"):
                    loader.__name__ = loader.func.__name__


def _slots(model: torch.nn.Module, live: dict[tuple[str, str], torch.Tensor]) -> Iterator[Slot]:
    for module_name, module in model.named_modules():
        deferred = is_deferred(module)
        for key, tensor in layer_tensors(module).items():
            if not deferred:
                use_plain_loader(tensor)
            param = f"{module_name}.{key}" if module_name else key
            yield Slot(param, module_name, key, tensor, live.get((module_name, key)), deferred)


def use_plain_loader(tensor: torch.Tensor) -> None:
    """Take vLLM's processing wrapper off: loading must never start the processing."""
    loader = getattr(tensor, "weight_loader", None)  # absent is normal: the default loader
    if loader is not None and loader.__name__ == "online_process_loader":
        tensor.weight_loader = _RELOAD._get_original_loader(tensor)


def process_module(module: torch.nn.Module) -> None:
    """vLLM's own processing of one module that holds its loaded tensors, in place into the old storages."""
    _forget_cpu_moe_kernel(module)
    _RELOAD._layerwise_process(module, layer_reload(module))


def _forget_cpu_moe_kernel(module: torch.nn.Module) -> None:
    """On the CPU, let a second processing of experts be like the first.

    vLLM 0.31 prepacks expert weights only together with making their kernel, and on a reload it keeps the kernel:
    the weights would go live unpacked, in the same shape, under a kernel that reads them packed. There are no
    captured graphs on a CPU, so a new kernel is harmless.
    """
    method = getattr(module, "quant_method", None)  # only some modules have one
    if current_platform.is_cpu() and getattr(method, "moe_kernel", None) is not None:
        method.moe_kernel = None


def detached_views(model: torch.nn.Module) -> Iterator[tuple[torch.Tensor, str]]:
    """Live buffers that were made as views of a parameter whose memory processing has moved away since: (view, param).

    Kernels read such a view (Mamba's convolution on a CPU that packs bf16), and vLLM's reload does not write to it.
    """
    names = {id(param): name for name, param in model.named_parameters()}
    for buffer in model.buffers():
        name = names.get(id(buffer._base))
        if name is not None and buffer.untyped_storage()._cdata != buffer._base.untyped_storage()._cdata:
            yield buffer, name


def place_live(module: torch.nn.Module) -> None:
    """Give one open module its kernel tensors back and close it."""
    reload = layer_reload(module)
    if reload.can_load():
        if reload.kernel_tensors is not None:
            _RELOAD._place_kernel_tensors(module, reload)
        reload.reset()


def finalize(
    model: torch.nn.Module, modules: Mapping[str, torch.nn.Module], opened: torch.nn.Module, model_config: Any
) -> tuple[str, ...]:
    """Close the reload of `opened`, some of the `modules` of `model`, as vLLM does: attention last, then its own hook.

    Attention layers outside it were given no scales; they derive anew what they derive from other weights.
    Returns the names of all attention layers.
    """
    inside = {id(module) for module in opened.modules()}
    _RELOAD.finalize_layerwise_reload(opened, model_config)
    attention = [(name, module) for name, module in modules.items() if is_deferred(module)]
    for _, module in attention:
        if id(module) not in inside:
            module.process_weights_after_loading(model_config.dtype)
    hook = getattr(model, "process_weights_after_loading", None)  # most models have none
    if hook is not None:
        hook()
    return tuple(name for name, _ in attention)


def close_reload(model: torch.nn.Module) -> None:
    """Give every module that is still open its kernel tensors back."""
    for module in model.modules():
        place_live(module)
        for tensor in layer_tensors(module).values():
            use_plain_loader(tensor)
    original = getattr(model, "_original_do_torchao_reload", None)  # set by vLLM at the start of a reload
    if original is not None:
        model._do_torchao_reload = original

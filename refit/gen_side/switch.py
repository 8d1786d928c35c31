"""What a commit only has to copy: staged modules that are before it what vLLM's processing would make of them.

These are modules that vLLM's reload processes by copying and no more (norms), and those that were packed on a twin
(`prepack`). For them the commit needs no reload: each tensor is copied into the storage that serves, and the kernel of
a twin is taken over. All other staged modules are late: vLLM processes them in the commit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from refit.gen_side.prepack import PACKED, may_pack_ahead, pack_ahead

type Tensors = Mapping[str, torch.Tensor]


@dataclass(slots=True)
class Switch:
    """`moves` are (live, staged) of one shape and dtype, `kernels` (module, the kernel it gets).

    After `run` the old kernels are in `replaced`, so that a commit need not wait until their memory is given back.
    """

    ready: set[str] = field(default_factory=set)
    packed: list[str] = field(default_factory=list)
    moves: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    kernels: list[tuple[torch.nn.Module, Any]] = field(default_factory=list)
    replaced: list[Any] = field(default_factory=list)
    _places: set[tuple[int, int]] = field(default_factory=set)

    @classmethod
    def prepare(cls, model: torch.nn.Module, staged: Mapping[str, Tensors]) -> Switch:
        """Pack, and find what is to be copied; the live model is not touched, and may serve meanwhile."""
        switch, modules = cls(), dict(model.named_modules())
        for name, tensors in staged.items():
            module = modules[name]
            if may_pack_ahead(module, tensors):
                switch._add_packed(name, module, tensors)
            elif not isinstance(
                getattr(module, "quant_method", None), QuantizeMethodBase
            ):  # only some have one
                switch._add(name, module, tensors)
        return switch

    def run(self) -> None:
        """Let the new version serve in all modules that are ready."""
        for live, staged in self.moves:
            live.copy_(staged)
        for module, kernel in self.kernels:
            self.replaced.append(getattr(module, PACKED))
            setattr(module, PACKED, kernel)

    def _add_packed(self, name: str, module: torch.nn.Module, tensors: Tensors) -> None:
        twin = pack_ahead(module, tensors)
        if self._add(name, module, {**twin._parameters, **twin._buffers}):
            self.packed.append(name)
            self.kernels.append((module, twin.cpu_linear))

    def _add(self, name: str, module: torch.nn.Module, tensors: Tensors) -> bool:
        """False, and nothing is added, where the live tensors have another layout than the staged ones."""
        moves = []
        for key, tensor in tensors.items():
            if key in module._non_persistent_buffers_set:
                continue  # computed when the model is built; vLLM's reload leaves them, too
            live = module._parameters.get(key, module._buffers.get(key))
            if live is None or live.shape != tensor.shape or live.dtype != tensor.dtype:
                return False
            if live.numel():
                moves.append((plain(live), plain(tensor)))
        self.moves += [move for move in moves if not self._is_known(*move)]
        self.ready.add(name)
        return True

    def _is_known(self, live: torch.Tensor, staged: torch.Tensor) -> bool:
        """Whether another name of tied tensors brought this move."""
        where = (live.data_ptr(), staged.data_ptr())
        known = where in self._places
        self._places.add(where)
        return known


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without vLLM's parameter class, so that no framework code runs on a copy into it."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(torch.Tensor)

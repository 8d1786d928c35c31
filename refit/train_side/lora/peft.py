"""Trainers with LoRA adapters: Bridge's PEFT around the frozen base, initialised alike in every layout.

Written for megatron-bridge 0.6. Bridge draws each factor from the random state that a rank happens to have, so that
what it draws depends on the layout and, on CUDA, on the rank. Here, in `initialise` alone, the first rank of a factor's
own group draws it whole, from a seed and the layer's global name, and hands out the slices.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from refit.train_side import cpu_compat
from refit.train_side.options import LoraOptions

Chunks = list[Any]


def wrapping(options: LoraOptions, seed: int) -> Callable[[Chunks], Chunks]:
    """A hook for Bridge's provider: freezes the loaded base, and wraps its targets in adapters that add nothing yet."""
    cpu_compat.import_bridge()
    from refit.train_side.lora.layers import SummedLoRA

    def wrap(chunks: Chunks) -> Chunks:
        lora = SummedLoRA(
            target_modules=[*options.targets], dim=options.rank, alpha=options.alpha, dropout=0.0
        )
        lora(chunks, training=True)
        initialise(chunks, seed)
        return chunks

    return wrap


@dataclass(frozen=True, slots=True)
class Adapter:
    """One wrapped layer of this rank. `param` is its base weight by the name of `describe().params`."""

    param: str
    wrapper: Any

    @property
    def factors(self) -> tuple[Any, Any]:
        """The linear layers that hold A [rank, inputs] and B [outputs, rank], each cut as Bridge cuts it."""
        return self.wrapper.adapter.linear_in, self.wrapper.adapter.linear_out

    @property
    def group(self) -> Any:
        """The group over which this layer is cut: tensor parallel, or expert tensor parallel."""
        return self.wrapper.adapter.tp_group

    @property
    def is_row_parallel(self) -> bool:
        return bool(self.wrapper.adapter.input_is_parallel)

    @property
    def rank(self) -> int:
        return int(self.wrapper.adapter.dim)

    @property
    def scale(self) -> float:
        return float(self.wrapper.adapter.alpha / self.wrapper.adapter.dim)


def adapters(chunks: Iterable[Any]) -> Iterator[Adapter]:
    """The adapters of this rank's chunks, in an order that is equal on the ranks that share them."""
    from megatron.bridge.peft.adapter_wrapper import AdapterWrapper
    from megatron.core.utils import unwrap_model

    for number, chunk in enumerate(chunks):
        for name, module in unwrap_model(chunk).named_modules():
            if isinstance(module, AdapterWrapper):
                yield Adapter(f"chunk{number}/{name}.to_wrap.weight", module)


@contextlib.contextmanager
def switched_off(chunks: Iterable[Any]) -> Iterator[None]:
    """Inside, the model is its base."""
    found = [adapter.wrapper for adapter in adapters(chunks)]
    for wrapper in found:
        wrapper.disable_adapter_layers()
    try:
        yield
    finally:
        for wrapper in found:
            wrapper.enable_adapter_layers()


def initialise(chunks: Chunks, seed: int) -> None:
    """A is drawn as Xavier's normal, B is zero. Collective over each factor's own group."""
    from megatron.bridge.models.conversion.model_bridge import _megatron_local_name_to_global
    from megatron.core.utils import get_model_config

    config = get_model_config(chunks[0])
    for adapter in adapters(chunks):
        chunk, _, name = adapter.param.partition("/")
        number = int(chunk.removeprefix("chunk"))
        global_name = _megatron_local_name_to_global(chunks, config, name, number)
        lora_a, lora_b = adapter.factors
        hand_out(lora_a.weight, adapter.group, lambda shape, name=global_name: _drawn(shape, seed, name))
        with torch.no_grad():
            lora_b.weight.zero_()


def hand_out(weight: Tensor, group: Any, draw: Callable[[tuple[int, ...]], Tensor]) -> None:
    """Let the group's first rank `draw` the whole factor: scattered if it is cut, broadcast if all hold it whole."""
    size, dim = dist.get_world_size(group), weight.partition_dim if weight.tensor_model_parallel else None
    whole = tuple(n * size if i == dim else n for i, n in enumerate(weight.shape))
    mine, parts = torch.empty_like(weight, requires_grad=False), None
    if dist.get_rank(group) == 0:
        factor = draw(whole).to(weight)
        parts = [part.contiguous() for part in (factor.chunk(size, dim) if dim is not None else [factor])]
    if dim is None:
        mine = parts[0] if parts else mine
        dist.broadcast(mine, group=group, group_src=0)
    else:
        dist.scatter(mine, parts, group=group, group_src=0)
    with torch.no_grad():
        weight.copy_(mine)


def _drawn(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    random = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
    return torch.randn(shape, generator=random) * math.sqrt(2 / sum(shape))

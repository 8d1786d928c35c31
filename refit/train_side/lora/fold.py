"""Base and adapter as one weight: folded in float32 on the rank that holds the shard, rounded once.

A folded weight has the shape and the place of its base weight, so that manifest, plan and export are the base model's.
The base itself is not written. Every refit folds anew: `Fold.weights` is collective over the groups of the adapters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from refit.plan import RankManifest
from refit.train_side.lora.peft import Adapter, adapters
from refit.transfer.memory import dtype_name


@dataclass(frozen=True, slots=True)
class Fold:
    """The adapters of one rank, and the dtype that folded weights are rounded to: the one that the engines store."""

    adapters: tuple[Adapter, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, chunks: Iterable[Any], dtype: torch.dtype, params: Collection[str]) -> Fold:
        """`params` are this rank's parameters by name. Raises ValueError for an adapter of none of them."""
        found = tuple(adapters(chunks))
        astray = sorted(adapter.param for adapter in found if adapter.param not in params)
        if astray:
            raise ValueError(
                f"{len(astray)} adapters belong to no single weight, {astray[0]} first: layers that keep several "
                "weights, such as grouped experts, cannot be folded; leave them out of the targets"
            )
        return cls(found, dtype)

    def manifest(self, base: RankManifest) -> RankManifest:
        """What the base model's manifest says, with the dtype of the folded weights."""
        folded, dtype = {adapter.param for adapter in self.adapters}, dtype_name(self.dtype)
        tensors = {holding.tensor for holding in base.holdings if holding.param in folded}
        return replace(
            base,
            tensors=tuple(replace(t, dtype=dtype) if t.name in tensors else t for t in base.tensors),
            params=tuple(replace(p, dtype=dtype) if p.name in folded else p for p in base.params),
        )

    def weights(self, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of `live`, this rank's parameters by name, that have adapters: folded, in new memory. Collective."""
        with torch.no_grad():
            return {
                adapter.param: folded(live[adapter.param], adapter).to(self.dtype)
                for adapter in self.adapters
                if adapter.param in live
            }


def folded(base: Tensor, adapter: Adapter) -> Tensor:
    """base + (alpha / r) B A of this rank's shard, in float32. Raises ValueError if the shapes do not fit."""
    lora_a, lora_b = (linear.weight.detach() for linear in adapter.factors)
    size = dist.get_world_size(adapter.group)
    cut, wanted = (lora_b, base.shape[0]) if adapter.is_row_parallel else (lora_a, adapter.rank)
    if cut.shape[0] * size != wanted:
        which = "B" if adapter.is_row_parallel else "A"
        raise ValueError(
            f"{adapter.param}: lora_{which} is {tuple(cut.shape)} on each of {size} ranks of its group, "
            f"which makes {cut.shape[0] * size} rows and not {wanted}; the base weight is {tuple(base.shape)}"
        )
    parts = [torch.empty_like(cut) for _ in range(size)]
    dist.all_gather(parts, cut.contiguous(), group=adapter.group)
    lora_a, lora_b = (lora_a, torch.cat(parts)) if adapter.is_row_parallel else (torch.cat(parts), lora_b)
    wanted_a, wanted_b = (adapter.rank, base.shape[1]), (base.shape[0], adapter.rank)
    if (tuple(lora_a.shape), tuple(lora_b.shape)) != (wanted_a, wanted_b):
        raise ValueError(
            f"{adapter.param}: lora_A {tuple(lora_a.shape)} and lora_B {tuple(lora_b.shape)} do not make "
            f"the base weight's {tuple(base.shape)}: they must be {wanted_a} and {wanted_b}"
        )
    return torch.addmm(base.float(), lora_b.float(), lora_a.float(), alpha=adapter.scale)

"""Generalized tensor parallelism: weights cut once more along their rows, over a `gtp_remat` axis.

Written for megatron-core 0.19. Each rank stores `rows = (O + padding) / G` rows of its O-row tensor parallel
weight, from row `rank * rows` on; the padding is at the tail, after alignment to 16 * G rows (32 * G for MXFP8).
megatron-bridge 0.6 does not know GTP: it can neither load into a shard nor export one. Both are done here with
whole weights, one at a time. On a CPU such a model can be built, loaded, exported and refitted, not run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from refit.train_side.lowering.pieces import LocalParam


def is_shard(weight: Any) -> bool:
    """True for a plain (not quantized) GTP shard."""
    from megatron.core.tensor_parallel.generalized_tensor_parallelism import GTPShardedParam

    return type(weight) is GTPShardedParam


def local_param(name: str, weight: Tensor) -> LocalParam:
    """`weight` as the arithmetic of lowering sees it, GTP shard or not."""
    shape, strides = tuple(weight.shape), weight.stride()
    if not is_shard(weight):
        return LocalParam.whole(name, shape, strides)
    # pad_length is the padding of the whole weight, the same number on every rank.
    num_tp_rows = shape[0] * weight.gtp_remat_size - weight.pad_length
    return LocalParam(name, shape, strides, weight.group.rank() * shape[0], num_tp_rows)


@contextlib.contextmanager
def sharded_after_loading(provider: Any) -> Iterator[None]:
    """Models that `provider` builds within are loaded whole; then Megatron's own slicer cuts them."""
    from megatron.core.tensor_parallel import gtp_api

    cut = gtp_api.wrap_module_params_gtp
    pending: list[tuple[Any, list[str], Any, Any]] = []

    def cut_later(module: Any, names: list[str], group: Any, is_grouped: bool | None = None) -> None:
        pending.append((module, names, group, is_grouped))

    def cut_now(chunks: list[Any]) -> list[Any]:
        for module, names, group, is_grouped in pending:
            whole = {name: getattr(module, name) for name in names}
            cut(module, names, group, is_grouped)
            for name, weight in whole.items():
                if weight is not None and hasattr(weight, "allreduce"):
                    getattr(module, name).allreduce = weight.allreduce  # the cut drops it
        pending.clear()
        return chunks

    provider.register_pre_wrap_hook(cut_now)
    with mock.patch.object(gtp_api, "wrap_module_params_gtp", cut_later):
        yield


class WholeWeights(list):
    """Conversion tasks that give Bridge whole weights: a shard is gathered when its task is reached.

    Every rank iterates over the same tasks in the same order, or the gathers hang.
    """

    def __init__(self, tasks: Iterable[Any]) -> None:
        super().__init__(tasks)

    def __iter__(self) -> Iterator[Any]:
        for task in super().__iter__():
            if is_shard(task.param_weight):
                yield dataclasses.replace(task, param_weight=_gathered(task.param_weight))
            else:
                yield task


def _gathered(shard: Any) -> Tensor:
    mine = shard.data.as_subclass(Tensor)
    parts = [torch.empty_like(mine) for _ in range(shard.gtp_remat_size)]
    dist.all_gather(parts, mine, group=shard.group)
    whole = torch.cat(parts)
    return whole[: whole.shape[0] - shard.pad_length]

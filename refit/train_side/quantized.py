"""A trainer as engines of another precision see it: the same calls, with quantized tensors in place of bf16 ones."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from refit.plan import RankManifest, canonical
from refit.transfer.precision.scheme import Scheme, quantized, without_parts
from refit.transfer.precision.source import QuantizedSource, stored_in


class Trainer(Protocol):
    """What is needed of `PolicyTrainer` or `BareTrainer`."""

    rank: int

    def describe(self, scheme: Scheme = ...) -> RankManifest: ...

    def params(self) -> dict[str, Tensor]: ...

    def export(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]: ...

    def export_blocks(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]: ...


class TrainerGroup:
    """The collectives of `QuantizedSource`, over the trainers' own default process group."""

    def gather(self, value: Any) -> Sequence[Any]:
        """As JSON, so that nothing is pickled: tuples come back as lists."""
        device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
        sizes = _gathered(torch.tensor([mine.numel()], device=device))
        longest = max(int(size) for size in sizes)
        texts = _gathered(torch.nn.functional.pad(mine, (0, longest - mine.numel())))
        pairs = zip(texts, sizes, strict=True)
        return [json.loads(bytes(text[: int(size)].tolist())) for text, size in pairs]

    def agree_on_maximum(self, values: Tensor) -> None:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)


def _gathered(mine: Tensor) -> list[Tensor]:
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return found


class QuantizedTrainer:
    """`describe`, `params` and `export` of a trainer, in the form that a scheme's engines store.

    Tensors that trainers and engines store in the same FP8 blocks (`stored`) are passed on as they are; the others are
    quantized from the weights of the moment of the call. `params` and `export` are collective over the trainers. The
    export quantizes whole tensors, so that an audit compares two ways to the same bytes.
    """

    def __init__(
        self, trainer: Trainer, scheme: Scheme, stored: frozenset[str], source: QuantizedSource
    ) -> None:
        self.rank = trainer.rank
        self._trainer = trainer
        self._scheme = scheme
        self._stored = stored
        self._source = source

    @classmethod
    def prepare(cls, trainer: Trainer, scheme: Scheme) -> QuantizedTrainer:
        """Collective over the trainers; allocates nothing of a tensor's size."""
        group, manifest = TrainerGroup(), trainer.describe(scheme)
        mine = sorted(stored_in(manifest, scheme)), sorted(reason.tensor for reason in manifest.misc)
        stored, misc = (set().union(*each) for each in zip(*group.gather(mine), strict=True))
        source = QuantizedSource.prepare(manifest, scheme, group)
        return cls(trainer, scheme, frozenset(stored - misc), source)

    def describe(self) -> RankManifest:
        """What this rank will hold when `params` is called, in the engine's names and dtypes."""
        return self._source.manifest

    def params(self) -> dict[str, Tensor]:
        """The live parameters and the quantized ones, by the names of `describe().params`."""
        with torch.no_grad():
            return self._source.params(self._trainer.params())

    def export(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Full tensors as the engine's checkpoint has them; all, or those named."""
        whole = None if names is None else without_parts(names, self._scheme)
        wanted = None if names is None else set(names)
        stored: list[str] = []
        for name, tensor in self._trainer.export(whole):
            if canonical(name)[0] in self._stored:
                stored.append(name)
                continue  # what Bridge decoded; the blocks themselves follow
            for part in quantized([(name, tensor)], self._scheme):
                if wanted is None or part[0] in wanted:
                    yield part
        if stored:
            for name, tensor in self._trainer.export_blocks(stored):
                if wanted is None or name in wanted:
                    yield name, tensor

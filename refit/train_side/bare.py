"""One rank of a Megatron model without an optimizer: built, loaded, described and exported, not trained.

For validation runs, which need many layouts in little time. Model, loading and export are those of the trainer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from refit.plan import RankManifest
from refit.train_side import build, checkpoint, cpu_compat
from refit.train_side.lowering.model import LoweredModel
from refit.train_side.options import TrainOptions, TrainParallel
from refit.transfer.precision.scheme import Scheme


def preload() -> None:
    """Import what every rank needs (10 to 40 s), in the parent of processes that are to be forked."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    torch.set_num_threads(1)
    cpu_compat.import_bridge()


class BareTrainer:
    """Every method except `describe` and `params` is collective over the trainers."""

    def __init__(self, model: build.BuiltModel, lowered: LoweredModel, rank: int) -> None:
        self.rank = rank
        self._model = model
        self._lowered = lowered

    @classmethod
    def build(
        cls,
        model_dir: str | Path,
        parallel: TrainParallel,
        precision: str,
        rank: int,
        address: str,
        timeout_s: float,
        before_describing: Callable[[Sequence[torch.nn.Module]], None] = lambda _: None,
    ) -> BareTrainer:
        """Join the trainers at `address` ("host:port") and load the HF checkpoint in `model_dir`."""
        build.open_process_groups(parallel, rank, parallel.world_size, address, timeout_s)
        options = TrainOptions(precision=precision)
        build.seed_everything(options.seed)
        model = build.build_model(model_dir, parallel, options, trainable=True)
        before_describing(model.chunks)
        with cpu_compat.cpu_megatron():
            lowered = LoweredModel.prepare(model, model_dir)
        return cls(model, lowered, rank)

    def describe(self, scheme: Scheme = MappingProxyType({})) -> RankManifest:
        """See PolicyTrainer.describe."""
        return self._lowered.manifest(self.rank, scheme)

    def params(self) -> dict[str, Tensor]:
        """See PolicyTrainer.params."""
        return self._lowered.live_params()

    def weights(self) -> dict[str, Tensor]:
        """The parameters themselves; `params` is their memory."""
        return self._lowered.weights()

    def change(self, make: Callable[[Tensor], Tensor]) -> None:
        """Set every element of every parameter to `make` of its old values, in place, as an optimizer does."""
        done: set[int] = set()
        with torch.no_grad():
            for param in self.weights().values():
                plain = param.detach().as_subclass(Tensor)
                if plain.data_ptr() not in done or not plain.numel():
                    done.add(plain.data_ptr())
                    plain.copy_(make(plain))

    def export(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """See PolicyTrainer.export."""
        return checkpoint.export(self._model, self._lowered, names)

    def export_blocks(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """See PolicyTrainer.export_blocks."""
        return checkpoint.export_blocks(self._model, self._lowered, names)

    def save(self, folder: str | Path) -> None:
        """Write what Bridge exports as an HF checkpoint; rank 0 writes."""
        checkpoint.save(self.export(None), self._lowered.model_dir, Path(folder), self.rank)

    def close(self) -> None:
        """Leave the process groups."""
        build.close_process_groups()

"""HF tensors out of a Megatron model by Bridge's own gathers: the conventional path, and checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from torch import Tensor

from refit.train_side import cpu_compat
from refit.train_side.build import BuiltModel
from refit.train_side.gtp import WholeWeights
from refit.train_side.lowering import LoweredModel


def export(
    model: BuiltModel, lowered: LoweredModel, names: Collection[str] | None
) -> Iterator[tuple[str, Tensor]]:
    """See PolicyTrainer.export. Only the conversion tasks that make a named tensor run."""
    wanted = None if names is None else set(names)
    unknown = set() if wanted is None else wanted - set(lowered.hf_shapes)
    if unknown:
        raise KeyError(f"the model has no HF tensors {sorted(unknown)}")
    tasks = WholeWeights(lowered.tasks_for(wanted))
    stream = model.bridge.export_hf_weights(model.chunks, show_progress=False, conversion_tasks=tasks)
    yield from _clipped(cpu_compat.stepwise(iter(stream)), lowered, wanted)


def _clipped(
    stream: Iterator[tuple[str, Tensor]], lowered: LoweredModel, wanted: set[str] | None
) -> Iterator[tuple[str, Tensor]]:
    """Bridge emits the padded vocabulary; the HF tensor ends at its own last row."""
    for name, weight in stream:
        if name not in lowered.hf_shapes:
            continue  # a buffer that Bridge copies from the checkpoint; no parameter makes it
        shape = lowered.hf_shapes[name]
        if tuple(weight.shape) != shape:
            if weight.shape[0] < shape[0] or tuple(weight.shape[1:]) != shape[1:]:
                raise ValueError(f"{name}: Bridge exported {tuple(weight.shape)}, the checkpoint has {shape}")
            weight = weight[: shape[0]]
        for each in (name, *lowered.copies_of(name)):
            if wanted is None or each in wanted:  # a task may make more than was asked for
                yield each, weight


def save(weights: Iterator[tuple[str, Tensor]], model_dir: Path, path: Path, rank: int) -> None:
    """Rank 0 writes the tensors beside the config of the checkpoint that the model was built from."""
    from safetensors.torch import save_file

    kept = {name: weight.clone().contiguous() for name, weight in weights if rank == 0}
    if rank != 0:
        return
    path.mkdir(parents=True, exist_ok=True)
    for config in ("config.json", "generation_config.json"):
        if (model_dir / config).exists():
            shutil.copyfile(model_dir / config, path / config)
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})

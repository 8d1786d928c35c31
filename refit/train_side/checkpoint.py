"""HF tensors out of a Megatron model by Bridge's own gathers: the conventional path, and checkpoints."""

from __future__ import annotations

import collections
import dataclasses
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from refit.train_side import cpu_compat
from refit.train_side.build import BuiltModel
from refit.train_side.lora.fold import Fold
from refit.train_side.lowering.fp8_params import NUM_TERMS, BlockParam, BlockTasks, one_per_block
from refit.train_side.lowering.gtp import WholeWeights
from refit.train_side.lowering.model import LoweredModel, param_name
from refit.transfer.memory import torch_dtype
from refit.transfer.precision.checkpoint import INDEX_FILE
from refit.transfer.precision.fp8 import FP8_BLOCK

FILE_BYTES = 5 * 10**9
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def export(
    model: BuiltModel,
    lowered: LoweredModel,
    names: Collection[str] | None,
    fold: Fold | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """See PolicyTrainer.export. Only the conversion tasks that make a named tensor run.

    With `fold` weights that have adapters are exported folded.
    """
    wanted = None if names is None else set(names)
    unknown = set() if wanted is None else wanted - set(lowered.hf_shapes)
    if unknown:
        raise KeyError(f"the model has no HF tensors {sorted(unknown)}")
    tasks = lowered.tasks_for(wanted)
    if fold is not None:
        tasks = _folded(tasks, fold)
    stream = model.bridge.export_hf_weights(
        model.chunks, show_progress=False, conversion_tasks=WholeWeights(tasks), merge_adapter_weights=False
    )
    yield from _clipped(cpu_compat.stepwise(iter(stream)), lowered, wanted)


def _folded(tasks: list[Any], fold: Fold) -> list[Any]:
    own = {param_name(task): task.param_weight for task in tasks if task.param_weight is not None}
    own |= fold.weights(own)
    return [dataclasses.replace(task, param_weight=own.get(param_name(task))) for task in tasks]


def export_blocks(
    model: BuiltModel, lowered: LoweredModel, names: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """The FP8 elements and scales of the named tensors, as the ranks store them, by the names of their parts.

    Collective like `export`. Every rank that stores one of the tensors must store it in blocks.
    """
    wanted = set(names)

    def gathered(read: Callable[[BlockParam], Tensor]) -> Iterator[tuple[str, Tensor]]:
        tasks = BlockTasks(lowered.tasks_for(wanted), read)
        stream = model.bridge.export_hf_weights(model.chunks, show_progress=False, conversion_tasks=tasks)
        return _clipped(cpu_compat.stepwise(iter(stream)), lowered, wanted)

    elements, scale = FP8_BLOCK.parts
    for name, tensor in gathered(BlockParam.values):
        yield elements.name(name), tensor.to(torch_dtype(elements.dtype))
    scales: dict[str, Tensor] = {}
    for number in range(NUM_TERMS):
        for name, tensor in gathered(partial(BlockParam.scale_term, number=number)):
            term = one_per_block(name, tensor.float())
            scales[name] = scales[name] + term if number else term
    for name, tensor in scales.items():
        yield scale.name(name), tensor


def _clipped(
    stream: Iterator[tuple[str, Tensor]], lowered: LoweredModel, wanted: set[str] | None
) -> Iterator[tuple[str, Tensor]]:
    """Bridge emits the padded vocabulary; the HF tensor ends at its own last row."""
    for emitted, weight in stream:
        name = emitted.replace(".base_layer.", ".")  # Bridge's word for a weight with an adapter
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


def save(
    weights: Iterator[tuple[str, Tensor]],
    model_dir: Path,
    path: Path,
    rank: int,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Rank 0 writes an HF checkpoint: the tensors, beside config and tokenizer of the one the model was built from.

    Tensors go into files of up to `file_bytes`, with an index where there are several, so that rank 0 has no more than
    one such file in host memory. Raises OSError there if it cannot write, once the export has ended on all ranks.
    """
    try:
        if rank == 0:
            _write_all(weights, model_dir, path, file_bytes)
    finally:
        collections.deque(
            weights, maxlen=0
        )  # the export gathers over all trainers, whether or not one can write


def _write_all(weights: Iterator[tuple[str, Tensor]], model_dir: Path, path: Path, file_bytes: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for other in model_dir.iterdir():
        if other.is_file() and not _holds_weights(other):
            shutil.copyfile(other, path / other.name)
    files = [_write(path, number, part) for number, part in enumerate(_parts(weights, file_bytes), start=1)]
    places: dict[str, str] = {}
    for number, (written, names) in enumerate(files, start=1):
        several = f"model-{number:05}-of-{len(files):05}.safetensors"
        name = "model.safetensors" if len(files) == 1 else several
        written.rename(path / name)
        places |= dict.fromkeys(names, name)
    if len(files) > 1:
        (path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _holds_weights(file: Path) -> bool:
    return file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")


def _parts(weights: Iterator[tuple[str, Tensor]], file_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Copies in host memory, as many as fit into a file; a larger tensor is a file of its own."""
    part: dict[str, Tensor] = {}
    size_bytes = 0
    for name, weight in weights:
        if part and size_bytes + weight.nbytes > file_bytes:
            yield part
            part, size_bytes = {}, 0
        part[name] = weight.detach().to("cpu", copy=True).contiguous()
        size_bytes += weight.nbytes
    yield part


def _write(path: Path, number: int, part: Mapping[str, Tensor]) -> tuple[Path, tuple[str, ...]]:
    """A file, whose name waits for the number of all, and the tensors in it."""
    from safetensors.torch import save_file

    file = path / f"model-{number:05}.safetensors"
    save_file(dict(part), file, metadata={"format": "pt"})
    return file, tuple(part)

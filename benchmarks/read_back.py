"""Seconds of work per GiB that finding one flipped bit in a model takes, and what one row costs. Prints one JSON line.

    python -m benchmarks.read_back            # about 100 MB of weights in bf16 over TP2
    python -m benchmarks.read_back --tiny     # under a second of work

The ranks of the engine are threads' worth of memory in this process, with the real answers (`transfer.reading`), a real
control store on loopback and the manifests of a TP2 engine; the other side is an HF checkpoint on disk. Seconds are CPU
seconds of the whole process with one torch thread, per GiB of the model; medians over the repeats.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from refit.plan import Manifest, RankManifest, hf_names
from refit.plan.naming import is_stacked
from refit.plan.sides import Side
from refit.plan.synth.config import model_from_config
from refit.plan.synth.gen import gen_manifest
from refit.plan.synth.parallel import parse_gen
from refit.service.diff import DiffReport, diff
from refit.service.holders import CheckpointWeights, EngineWeights
from refit.service.reader import Reader
from refit.transfer.memory import copy_cast, strided_box, torch_dtype
from refit.transfer.reading import PLAIN, Holder, Readable, Reads, Unreadable
from refit.transfer.rendezvous import ControlStore

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 32003,
    "tie_word_embeddings": False,
}
TINY = CONFIG | {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 259}
PLANTED = "model.layers.1.mlp.down_proj.weight"
RANK = 1


class MemoryRanks:
    """An engine whose ranks are tensors of this process. `params[rank][name]` may be changed at will."""

    def __init__(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor], version: int = 1) -> None:
        self.manifest, self.version, self.name = manifest, version, "engine 0"
        self.asked: list[int] = []
        self.unreadable: dict[str, str] = {}
        self.kinds: dict[str, str] = {}
        self.broken = ""
        self._reads = [Reads() for _ in manifest.ranks]
        self.params = [
            {spec.name: torch.zeros(spec.shape, dtype=torch_dtype(spec.dtype)) for spec in rank.params}
            for rank in manifest.ranks
        ]
        self.load(tensors)

    @property
    def num_workers(self) -> int:
        return len(self.manifest.ranks)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill every holding from canonical tensors."""
        for rank, params in zip(self.manifest.ranks, self.params, strict=True):
            for held in rank.holdings:
                part = tensors[held.tensor][tuple(map(slice, held.region.starts, held.region.stops))]
                copy_cast(strided_box(params[held.param], held.region.shape, held.strides, held.offset), part)

    def ask(self, info: Mapping[str, Any], timeout_s: float) -> None:  # noqa: ARG002 - nothing waits
        for rank, reads in enumerate(self._reads):
            holder = Holder(
                rank,
                self.version,
                lambda rank=rank: self.manifest.ranks[rank],
                lambda rank=rank: _Params(self, rank),
                self.broken,
            )
            reads.answer(info, holder)

    def close(self) -> None:
        for reads in self._reads:
            reads.close()


class _Params:
    def __init__(self, ranks: MemoryRanks, rank: int) -> None:
        self._ranks, self._rank = ranks, rank

    def manifest(self, described: RankManifest) -> RankManifest:
        return described

    def param(self, name: str) -> Readable:
        self._ranks.asked.append(self._rank)
        if name in self._ranks.unreadable:
            raise Unreadable(self._ranks.unreadable[name])
        return Readable(self._ranks.kinds.get(name, PLAIN), self._ranks.params[self._rank][name])


def make_model(config: Mapping[str, Any], layout: str) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """(manifest of an engine, canonical tensors with random values)."""
    manifest = gen_manifest(model_from_config("model", config), parse_gen(layout))
    random = torch.Generator().manual_seed(0)
    specs = Side.of(manifest).specs.values()
    return manifest, {
        spec.name: torch.randn(spec.shape, generator=random, dtype=torch.float32).to(torch_dtype(spec.dtype))
        for spec in specs
    }


def write_checkpoint(tensors: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """Canonical tensors as an HF checkpoint, experts apart."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, tensor in tensors.items():
        parts = tensor.unbind() if is_stacked(name) else (tensor,)
        found |= {hf: part.contiguous() for hf, part in zip(hf_names(name, tensor.shape), parts, strict=True)}
    save_file(found, folder / "model.safetensors")
    return folder


def plant(ranks: MemoryRanks, tensor: str, rank: int, place: int) -> tuple[int, ...]:
    """Flip the lowest bit of element `place` of the first holding of a tensor on a rank; its index in the tensor."""
    held = next(held for held in ranks.manifest.ranks[rank].holdings if held.tensor == tensor)
    box = strided_box(ranks.params[rank][held.param], held.region.shape, held.strides, held.offset)
    index = torch.unravel_index(torch.tensor(place), box.shape)
    bits = box.view({2: torch.int16, 4: torch.int32}[box.element_size()])
    bits[index] ^= 1
    return tuple(int(at) + low for at, low in zip(index, held.region.starts, strict=True))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Plant, find, read one row; prints and returns one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    manifest, tensors = make_model(TINY if arguments.tiny else CONFIG, "tp=2")
    ranks = MemoryRanks(manifest, tensors)
    control = ControlStore.host(run_id="benchmark")
    seconds, walls = [], []
    try:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = CheckpointWeights.open(write_checkpoint(tensors, Path(folder)))
            index = plant(ranks, PLANTED, RANK, 12345 % tensors[PLANTED].numel())
            for _ in range(arguments.repeats):
                began = time.process_time(), time.perf_counter()
                report = diff(checkpoint, EngineWeights(Reader(ranks, control)))
                seconds.append(time.process_time() - began[0])
                walls.append(time.perf_counter() - began[1])
                _require_found(report, index)
            row = Reader(ranks, control).read("model.embed_tokens.weight", 7)
    finally:
        ranks.close()
        control.close()
    size_gib = report.num_bytes / (1 << 30)
    line = {
        "benchmark": "read_back",
        "hardware": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
        "plan": Side.of(manifest).digest,
        "bytes": report.num_bytes,
        "tensors": report.num_tensors,
        "found": str(report.differences[0]),
        "cpu_s_p50": statistics.median(seconds),
        "wall_s_p50": statistics.median(walls),
        "cpu_s_per_gib_p50": statistics.median(seconds) / size_gib,
        "cpu_s_per_gib_max": max(seconds) / size_gib,
        "row_bytes": row.tensor.nbytes,
        "row_moved_bytes": row.moved_bytes,
    }
    print(json.dumps(line))
    return line


def _require_found(report: DiffReport, index: tuple[int, ...]) -> None:
    found = [(one.name, one.index, one.right) for one in report.differences]
    goal = [(PLANTED, index, f"engine 0 rank {RANK}")]
    assert found == goal, f"planted {goal}, found {found}"


if __name__ == "__main__":
    main(sys.argv[1:])

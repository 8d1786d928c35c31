"""A stage plan made ready to run many times: sizes, strides and digest weights worked out once.

What is left per refit and segment is two `as_strided` calls and one entry in a batched copy, about 5 us; without this,
20,000 small routes would cost a second of Python.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from refit.plan import Bucket, Plan, Region, Round, Segment, StagePlan
from refit.transfer.digest import Weighing, digest
from refit.transfer.memory import bits_dtype, torch_dtype

KEPT_ELEMENTS = (
    1 << 14
)  # weights are kept for boxes up to this size; larger ones spend their time in arithmetic anyway


@dataclass(frozen=True, slots=True)
class Move:
    """One segment: where it lies in its bucket (elements of `wire`, row-major) and in this rank's param.

    `is_run`: the box is one contiguous run of the param too.
    """

    segment: Segment
    wire: torch.dtype
    bits: torch.dtype
    num_bytes: int
    start: int
    strides: tuple[int, ...]
    tensor_shape: tuple[int, ...]
    is_run: bool
    weighing: Weighing | None

    @classmethod
    def of(cls, segment: Segment, tensor_shape: tuple[int, ...], device: torch.device) -> "Move":
        wire = torch_dtype(segment.wire_dtype)
        num_elements = segment.region.num_elements
        is_kept = 0 < num_elements <= KEPT_ELEMENTS and len(segment.shape) > 0
        return cls(
            segment,
            wire,
            bits_dtype(wire),
            num_elements * wire.itemsize,
            segment.start_byte // wire.itemsize,
            row_major(segment.shape),
            tensor_shape,
            is_run(segment.shape, segment.strides),
            Weighing.of(segment.region, wire.itemsize, device) if is_kept else None,
        )

    def digest(self, bits: Tensor) -> int | Tensor:
        """The digest of this box, or the partial of its weighing: see `Weighing.finish`."""
        if self.weighing is not None:
            return self.weighing.partial(bits)
        return digest(bits, self.segment.region, self.tensor_shape)

    @property
    def region(self) -> Region:
        return self.segment.region


@dataclass(frozen=True, slots=True)
class CompiledBucket:
    """A bucket with its moves. `num_bytes` are those on the wire, padding included; `payload_bytes` are without."""

    peer: int
    num_bytes: int
    payload_bytes: int
    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class CompiledRound:
    """A round with compiled buckets; same index and order as in the plan."""

    index: int
    sends: tuple[CompiledBucket, ...]
    receives: tuple[CompiledBucket, ...]


@dataclass(frozen=True, slots=True)
class CompiledStage:
    """A stage plan ready to run."""

    stage: int
    group_ranks: tuple[int, ...]
    rounds: tuple[CompiledRound, ...]

    @property
    def moves(self) -> Iterator[Move]:
        """Every move of the stage."""
        for round_ in self.rounds:
            for bucket in (*round_.sends, *round_.receives):
                yield from bucket.moves

    @property
    def payload_bytes(self) -> tuple[int, int]:
        """Bytes sent and received, without padding."""
        sent = sum(bucket.payload_bytes for round_ in self.rounds for bucket in round_.sends)
        return sent, sum(bucket.payload_bytes for round_ in self.rounds for bucket in round_.receives)


def compile_stage(plan: Plan, stage_plan: StagePlan, device: torch.device) -> CompiledStage:
    """Work out everything that does not depend on where the params lie."""
    shapes = {name: tensor.shape for name, tensor in plan.tensors.items()}
    rounds = tuple(_round(round_, shapes, device) for round_ in stage_plan.rounds)
    return CompiledStage(stage_plan.stage, stage_plan.group_ranks, rounds)


def _round(round_: Round, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> CompiledRound:
    sends = tuple(_bucket(bucket, shapes, device) for bucket in round_.sends)
    return CompiledRound(
        round_.index, sends, tuple(_bucket(bucket, shapes, device) for bucket in round_.receives)
    )


def _bucket(bucket: Bucket, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> CompiledBucket:
    moves = tuple(Move.of(segment, shapes[segment.tensor], device) for segment in bucket.segments)
    return CompiledBucket(bucket.peer, bucket.num_bytes, sum(move.num_bytes for move in moves), moves)


def is_run(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """True if a box of these strides is contiguous in row-major order."""
    wanted = row_major(shape)
    return all(size == 1 or a == b for size, a, b in zip(shape, strides, wanted, strict=True))


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))

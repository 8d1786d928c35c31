"""A stage plan made ready to run many times: parcels, copies and digest weights worked out once.

A bucket travels as parcels. A segment of at least `alone_bytes` is a parcel of its own, so that each end may send it
from, or receive it into, the param itself; what lies between two of these is packed into one parcel. The cut depends
on sizes in the plan only, so both ends make the same one.

What is left per refit and small segment is one memmove, about 0.7 us in Python; without this, 20,000 small routes would
cost a second.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from refit.plan import Bucket, Plan, PlanOptions, Region, Round, Segment, StagePlan
from refit.plan.options import ALIGNMENT_BYTES
from refit.transfer.gather import SLOT, Gather, Rows, rows_of_moves
from refit.transfer.memory import bits_dtype, torch_dtype
from refit.transfer.runs import Runs, RunsInMaking, is_run, row_major
from refit.transfer.weighing import Odd, ParcelWeighing, WeighingInMaking

if TYPE_CHECKING:
    from refit.transfer.kernels.parcel import ParcelKernels

MIN_ALONE_BYTES = (
    256 << 10
)  # a parcel costs gloo about 40 us over both ends, as much as two copies of so many bytes


@dataclass(frozen=True, slots=True)
class Move:
    """One segment: where it lies in its parcel (bytes, row-major there) and in this rank's param.

    `is_run`: the box is one contiguous run of the param too. `is_cast`: the param has another dtype than the wire.
    """

    segment: Segment
    wire: torch.dtype
    bits: torch.dtype
    num_bytes: int
    start_byte: int
    strides: tuple[int, ...]
    is_run: bool
    is_cast: bool

    @classmethod
    def of(cls, segment: Segment, first_byte: int, param_dtype: torch.dtype) -> "Move":
        wire = torch_dtype(segment.wire_dtype)
        return cls(
            segment,
            wire,
            bits_dtype(wire),
            segment.region.num_elements * wire.itemsize,
            segment.start_byte - first_byte,
            row_major(segment.shape),
            is_run(segment.shape, segment.strides),
            param_dtype != wire,
        )

    @property
    def region(self) -> Region:
        return self.segment.region

    @property
    def start(self) -> int:
        """Elements of the wire dtype before it in the parcel."""
        return self.start_byte // self.wire.itemsize


@dataclass(frozen=True, slots=True)
class CompiledParcel:
    """Bytes of one message. `num_bytes` are those on the wire, `payload_bytes` are without padding.

    `slot_byte`: where it is packed in the slot of its round; None: it is sent from, or received into, the param of its
    only move. `runs` and `boxes` are the copies between the parcel and the params: contiguous runs, and the others.
    `kernels` does the same copies, and the digests, in one launch each where kernels can run. `rows`: its boxes in the
    params, which the transport takes from there and puts there by itself; None where it is packed.
    """

    peer: int
    num_bytes: int
    payload_bytes: int
    moves: tuple[Move, ...]
    slot_byte: int | None
    runs: Runs
    boxes: tuple[Move, ...]
    weighing: ParcelWeighing
    kernels: "ParcelKernels | None"
    rows: tuple[Rows, ...] | None

    @property
    def box_in_place(self) -> Odd | None:
        """The box of a parcel of one that is never packed, to be weighed where it lies."""
        return self.weighing.alone if self.rows is not None and self.slot_byte is not None else None

    def places(self) -> tuple[Rows, ...]:
        """Where its bytes lie for a transport that gathers."""
        if self.rows is not None:
            return self.rows
        assert self.slot_byte is not None, "a parcel without a place in the slot is one run"
        return (Rows(SLOT, self.slot_byte, (), (), self.num_bytes),)


@dataclass(frozen=True, slots=True)
class CompiledRound:
    """A round with its parcels, in the order of the plan; same index as in the plan. A slot holds `slot_bytes`.

    For a transport that gathers, the parcels of a pair are one: `gathered_sends` and `gathered_receives`.
    """

    index: int
    sends: tuple[CompiledParcel, ...]
    receives: tuple[CompiledParcel, ...]
    slot_bytes: int
    gathered_sends: tuple[Gather, ...] = ()
    gathered_receives: tuple[Gather, ...] = ()


@dataclass(frozen=True, slots=True)
class CompiledStage:
    """A stage plan ready to run. `gathers`: for a transport that gathers, which gets one parcel per round and peer.

    `params`: those it touches, with the dtypes it was compiled for; `reach_bytes`: how far into each the runs go.
    `sums`: (tensor, dst_rank) of each digest that the stage yields.
    """

    stage: int
    group_ranks: tuple[int, ...]
    rounds: tuple[CompiledRound, ...]
    params: Mapping[str, torch.dtype]
    reach_bytes: tuple[int, ...]
    sums: tuple[tuple[str, int], ...]
    gathers: bool

    @property
    def parcels(self) -> Iterator[CompiledParcel]:
        """Every parcel of the stage."""
        for round_ in self.rounds:
            yield from round_.sends
            yield from round_.receives

    @property
    def has_kernels(self) -> bool:
        """All parcels of a stage have kernels, or none."""
        return any(parcel.kernels is not None for parcel in self.parcels)

    @property
    def payload_bytes(self) -> tuple[int, int]:
        """Bytes sent and received, without padding."""
        sent = sum(parcel.payload_bytes for round_ in self.rounds for parcel in round_.sends)
        return sent, sum(parcel.payload_bytes for round_ in self.rounds for parcel in round_.receives)

    @property
    def slot_bytes(self) -> int:
        """What the largest round packs."""
        return max((round_.slot_bytes for round_ in self.rounds), default=0)


def compile_stage(
    plan: Plan,
    stage_plan: StagePlan,
    rank: int,
    dtypes: Mapping[str, str],
    device: torch.device,
    *,
    gathers: bool = False,
) -> CompiledStage:
    """Work out everything that does not depend on where the params lie. `dtypes`: of this rank's params, by name.

    `gathers`: whether the transport of the stage does. On CUDA it gets packed parcels all the same.
    """
    is_gathered = gathers and device.type == "cpu"
    making = _StageInMaking(plan, rank, dtypes, device, is_gathered)
    rounds = tuple(making.round(round_) for round_ in stage_plan.rounds)
    return CompiledStage(
        stage_plan.stage,
        stage_plan.group_ranks,
        rounds,
        making.runs.dtypes,
        tuple(making.runs.reach_bytes),
        making.weighing.sums,
        is_gathered,
    )


def kernels_run_on(device: torch.device) -> bool:
    """Whether Triton's kernels do the copies and digests there; everywhere else torch does."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def alone_bytes(options: PlanOptions) -> int:
    """From this size on a segment is a parcel of its own.

    A rank sends, and receives, at most bucket_bytes in a round, so at most half of max_ops_per_round parcels come of
    the large segments and the gaps between them.
    """
    return max(MIN_ALONE_BYTES, 4 * options.bucket_bytes // options.max_ops_per_round)


class _StageInMaking:
    def __init__(
        self, plan: Plan, rank: int, dtypes: Mapping[str, str], device: torch.device, gathers: bool
    ) -> None:
        self._gathers = gathers
        self._shapes = {name: tensor.shape for name, tensor in plan.tensors.items()}
        self._alone_bytes = alone_bytes(plan.options)
        self._rank = rank
        self._device = device
        self.runs = RunsInMaking(dtypes, device)
        self.weighing = WeighingInMaking(self._shapes, device)

    def round(self, round_: Round) -> CompiledRound:
        used = 0
        sides: list[tuple[CompiledParcel, ...]] = []
        for buckets, is_send in ((round_.sends, True), (round_.receives, False)):
            parcels: list[CompiledParcel] = []
            for bucket in buckets:
                for segments, num_bytes in _cut(bucket, self._alone_bytes):
                    parcel = self._parcel(bucket.peer, segments, num_bytes, used, is_send)
                    parcels.append(parcel)
                    used += 0 if parcel.slot_byte is None else _aligned(num_bytes)
            sides.append(tuple(parcels))
        gathered = [self._gathered(parcels) for parcels in sides]
        return CompiledRound(round_.index, sides[0], sides[1], used, gathered[0], gathered[1])

    def _gathered(self, parcels: Sequence[CompiledParcel]) -> tuple[Gather, ...]:
        """One per peer, for a transport that gathers."""
        if not self._gathers:
            return ()
        places: dict[int, list[Rows]] = {}
        for parcel in parcels:
            if parcel.peer != self._rank:
                places.setdefault(parcel.peer, []).extend(parcel.places())
        return tuple(Gather.of(peer, rows) for peer, rows in places.items())

    def _parcel(
        self, peer: int, segments: Sequence[Segment], num_bytes: int, used: int, is_send: bool
    ) -> CompiledParcel:
        first = segments[0].start_byte
        moves = tuple(Move.of(s, first, self.runs.dtype(s.param)) for s in segments)
        is_direct = len(moves) == 1 and moves[0].is_run and not moves[0].is_cast
        runs, boxes = self.runs.of(moves)
        dst_rank = peer if is_send else self._rank
        weighing = self.weighing.of(moves, dst_rank)
        rows = None
        if self._gathers and peer != self._rank:
            rows = rows_of_moves(moves, [self.runs.positions[s.param] for s in segments])
        return CompiledParcel(
            peer,
            num_bytes,
            sum(move.num_bytes for move in moves),
            moves,
            None if is_direct else used,
            runs,
            boxes,
            weighing,
            self._kernels(segments, dst_rank, is_direct),
            None if rows is None else tuple(rows),
        )

    def _kernels(self, segments: Sequence[Segment], dst_rank: int, is_direct: bool) -> "ParcelKernels | None":
        """None where no kernel runs. Importing Triton takes seconds, so that is left to the ranks that use it."""
        if not kernels_run_on(self._device):
            return None
        from refit.transfer.kernels.parcel import Params, ParcelKernels

        params = Params(self.runs.positions, self.runs.dtypes)
        sums = [self.weighing.index(segment.tensor, dst_rank) for segment in segments]
        first = segments[0].start_byte
        return ParcelKernels.of(segments, first, params, sums, self._device, is_direct=is_direct)


def _cut(bucket: Bucket, alone: int) -> Iterator[tuple[list[Segment], int]]:
    """The segments of each parcel and its bytes on the wire: without padding after its last segment."""
    waiting: list[Segment] = []
    for segment in bucket.segments:
        if _num_bytes(segment) >= alone:
            if waiting:
                yield waiting, _extent(waiting)
                waiting = []
            yield [segment], _num_bytes(segment)
        else:
            waiting.append(segment)
    if waiting:
        yield waiting, _extent(waiting)


def _num_bytes(segment: Segment) -> int:
    return segment.region.num_elements * torch_dtype(segment.wire_dtype).itemsize


def _extent(segments: Sequence[Segment]) -> int:
    return segments[-1].start_byte + _num_bytes(segments[-1]) - segments[0].start_byte


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

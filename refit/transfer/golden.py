"""The golden path: gather, broadcast, slice. The oracle for the bulk path, so it knows nothing of routes or buckets.

Per tensor: every trainer of the stage sends all that it holds to the stage's first trainer, which assembles the full
tensor in the wire dtype; the full tensor is broadcast; each generator copies its own holdings out of it. Holdings and
classes come from the manifests. Replicated holdings must agree bit for bit.

Extra memory: the largest tensor, on every rank of the stage, and on the root one holding more.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refit.plan import BULK, Classified, Holding, Manifest, Region, coalesce_holdings
from refit.plan.region import uncovered
from refit.transfer.bulk import StageJob
from refit.transfer.digest import digest
from refit.transfer.errors import TransportError
from refit.transfer.groups import Group
from refit.transfer.memory import as_bits, as_bytes, copy_cast, strided_box, torch_dtype
from refit.transfer.report import DIGEST, PACK, UNPACK, WIRE, BulkReport, Tally
from refit.transfer.transports.seam import Parcel


@dataclass(frozen=True, slots=True)
class Piece:
    """One box of a tensor and the rank that holds it; `box` is that memory, on the holder itself only."""

    rank: int
    region: Region
    box: Tensor | None


@dataclass(frozen=True, slots=True)
class Held:
    """One holding and the joint rank that has it."""

    rank: int
    holding: Holding


def move_stage(job: StageJob) -> BulkReport:
    """Move one stage. Same input, same memory afterwards and same digests as `bulk.move_stage`.

    bytes_sent and bytes_received count what the generators wanted, so the sums of both sides agree; the wire carries
    more: each full tensor to each rank of the group.
    """
    mover = _GoldenMover(job)
    for number, tensor in enumerate(mover.tensors()):
        mover.move(number, tensor)
    return mover.tally.report()


def assemble(
    full: Tensor, pieces: Sequence[Piece], group: Group, number: int, deadline: float, tally: Tally
) -> None:
    """Fill `full` on every rank of the group from pieces that cover it. The holder of the first piece is the root.

    Pieces are cast to the dtype of `full` by their holders. Pieces that overlap must agree. `number` is the tag.
    """
    missing = uncovered(Region.whole(tuple(full.shape)), (piece.region for piece in pieces))
    if missing:
        raise TransportError(
            f"golden: tensor number {number}: nobody holds {missing[0]} of shape {tuple(full.shape)}"
        )
    root = pieces[0].rank
    written: list[Piece] = []
    for piece in pieces:
        packed = _gathered(piece, root, full, group, number, deadline, tally)
        if group.rank == root:
            _place(packed, piece, full, written)
    clock = time.perf_counter()
    words = f"golden broadcast of {full.numel() * full.element_size()} bytes from rank {root}"
    work = group.broadcast(as_bytes(full), root)
    group.wait_collective(words, work, deadline)
    tally.clock(WIRE, clock)


def _gathered(
    piece: Piece, root: int, full: Tensor, group: Group, number: int, deadline: float, tally: Tally
) -> Tensor:
    """The piece in the dtype of `full`, on the root; on other ranks the result has no meaning."""
    packed = torch.empty(piece.region.shape, dtype=full.dtype, device=full.device)
    clock = time.perf_counter()
    if piece.box is not None:
        copy_cast(packed, piece.box)
    clock = tally.clock(PACK, clock)
    payload = as_bytes(packed)
    if piece.rank == root or group.rank not in (piece.rank, root) or payload.numel() == 0:
        return packed
    if group.rank == root:
        ticket = group.transport.post([], [Parcel(piece.rank, payload)], number)
    else:
        ticket = group.transport.post([Parcel(root, payload)], [], number)
    group.transport.wait(ticket, deadline)
    tally.clock(WIRE, clock)
    return packed


def _place(packed: Tensor, piece: Piece, full: Tensor, written: list[Piece]) -> None:
    for other in written:
        common = piece.region.intersect(other.region)
        if common is not None:
            mine = cut(packed, _counted_from(common, piece.region))
            if not torch.equal(as_bits(mine), as_bits(cut(full, common))):
                raise TransportError(
                    f"golden: ranks {other.rank} and {piece.rank} hold different bits of {common}"
                )
    copy_cast(cut(full, piece.region), packed)
    written.append(piece)


class _GoldenMover:
    def __init__(self, job: StageJob) -> None:
        self.job = job
        self.tally = Tally()
        self._num_train = job.plan.num_train
        self._train = _by_tensor(job.plan.train.manifest, 0)
        self._gen = _by_tensor(job.plan.gen.manifest, self._num_train)
        self._stage_of = [rank.stage for rank in job.plan.train.manifest.ranks]

    def tensors(self) -> Iterator[Classified]:
        """The bulk tensors of this stage, in plan order: each belongs to the first stage that holds any of it."""
        for tensor in self.job.plan.tensors.values():
            if tensor.kind != BULK:
                continue  # misc goes by broadcast
            if min(self._stage_of[held.rank] for held in self._train[tensor.name]) == self.job.stage.stage:
                yield tensor

    def move(self, number: int, tensor: Classified) -> None:
        full = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype), device=self.job.device)
        extra_bytes = 2 * full.numel() * full.element_size()
        self.tally.peak_extra_bytes = max(self.tally.peak_extra_bytes, extra_bytes)
        holders = [
            held for held in self._train[tensor.name] if self._stage_of[held.rank] == self.job.stage.stage
        ]
        pieces = [Piece(held.rank, held.holding.region, self._my_box(held)) for held in holders]
        assemble(full, pieces, self.job.group, number, self.job.deadline, self.tally)
        wanted = self._gen[tensor.name]
        if self.job.rank >= self._num_train:
            self._take(tensor, full, [held.holding for held in wanted if held.rank == self.job.rank])
        elif self.job.rank == pieces[0].rank:
            self._account(tensor, full, wanted)

    def _take(self, tensor: Classified, full: Tensor, holdings: Sequence[Holding]) -> None:
        """On a generator: slice the full tensor into the own holdings."""
        for holding in holdings:
            clock = time.perf_counter()
            box = self._param_box(holding)
            copy_cast(box, cut(full, holding.region))
            self.tally.bytes_received += box.numel() * full.element_size()
            clock = self.tally.clock(UNPACK, clock)
            if self.job.with_digests:
                self.tally.add_digest(tensor.name, self.job.rank, digest(box, holding.region, tensor.shape))
            self.tally.clock(DIGEST, clock)

    def _account(self, tensor: Classified, full: Tensor, wanted: Sequence[Held]) -> None:
        """On the root: bytes and digests of what each generator has to take."""
        clock = time.perf_counter()
        for held in wanted:
            part = cut(full, held.holding.region)
            self.tally.bytes_sent += part.numel() * full.element_size()
            if self.job.with_digests:
                self.tally.add_digest(tensor.name, held.rank, digest(part, held.holding.region, tensor.shape))
        self.tally.clock(DIGEST, clock)

    def _my_box(self, held: Held) -> Tensor | None:
        return self._param_box(held.holding) if held.rank == self.job.rank else None

    def _param_box(self, holding: Holding) -> Tensor:
        return strided_box(
            self.job.params[holding.param], holding.region.shape, holding.strides, holding.offset
        )


def _by_tensor(manifest: Manifest, first_rank: int) -> dict[str, list[Held]]:
    found: dict[str, list[Held]] = {}
    for rank in manifest.ranks:
        for holding in coalesce_holdings(rank.holdings):
            found.setdefault(holding.tensor, []).append(Held(first_rank + rank.rank, holding))
    return found


def cut(full: Tensor, region: Region) -> Tensor:
    """The box of a full tensor, as a view."""
    return full[region.slices()]


def _counted_from(region: Region, base: Region) -> Region:
    """`region` in coordinates that begin at the first element of `base`."""
    starts = tuple(start - at for start, at in zip(region.starts, base.starts, strict=True))
    stops = tuple(stop - at for stop, at in zip(region.stops, base.starts, strict=True))
    return Region(starts, stops)

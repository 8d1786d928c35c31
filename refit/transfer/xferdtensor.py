"""One tensor from one mesh to another, both inside one process group."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup
from torch.distributed.tensor.placement_types import Placement

from refit.plan import (
    BULK,
    Holding,
    Manifest,
    ParamSpec,
    Plan,
    PlanError,
    PlanOptions,
    RankManifest,
    Region,
    Round,
    StagePlan,
    TensorSpec,
    build_plan,
)
from refit.plan.dtypes import ITEM_BYTES
from refit.transfer import bulk, golden, m2n
from refit.transfer.compiled import compile_stage
from refit.transfer.forced import is_golden_forced
from refit.transfer.groups import Group
from refit.transfer.m2n import M2N
from refit.transfer.memory import copy_cast, dtype_name, torch_dtype
from refit.transfer.placements import Layout, Mesh
from refit.transfer.protocol import GOLDEN, P2P
from refit.transfer.report import WIRE, BulkReport, Tally
from refit.transfer.runs import row_major
from refit.transfer.transports.process_group import ProcessGroupTransport, wait_for_work
from refit.transfer.transports.seam import Transport

NAME = "tensor"
MAX_DIMS = 8
DTYPES = tuple(sorted(ITEM_BYTES))
BACKENDS = (P2P, GOLDEN, M2N)


@dataclass(frozen=True, slots=True)
class Side:
    """One side as all ranks know it."""

    layout: Layout
    dtype: str


@dataclass(frozen=True, slots=True)
class Agreed:
    """What all ranks of the group agree on before a byte moves."""

    shape: tuple[int, ...]
    src: Side
    dst: Side


def xferdtensor(
    src: Tensor | None,
    src_mesh: Mesh,
    src_placements: Sequence[Placement],
    dst: Tensor | None,
    dst_mesh: Mesh,
    dst_placements: Sequence[Placement],
    group: ProcessGroup,
    *,
    backend: str | None = None,
    timeout_s: float = 300.0,
    bucket_bytes: int = 64 << 20,
    transport: Transport | None = None,
) -> BulkReport:
    """Fill the local tensors `dst` with what the local tensors `src` hold. Collective over `group`.

    Meshes hold ranks of `group`; they may overlap. `src` is None on ranks outside the source mesh, `dst` on ranks
    outside the destination mesh. Cuts are those of torch.chunk; local shapes are exchanged and checked, so a wrong one
    raises PlanError on every rank. Where the dtypes differ the sender casts. `golden` is the oracle: gather, broadcast,
    slice; `m2n` is NCCL's own and raises PlanError for what it cannot do. No backend: `golden` where
    NRL_XFERDTENSOR_GOLDEN=1, else `p2p`. Ranks that choose differently all raise PlanError. `transport` carries the
    bytes in place of `group`, which is then left with the exchange of shapes.
    """
    backend = _backend(backend)
    deadline = time.monotonic() + timeout_s
    rank, size = group.rank(), group.size()
    ranks = tuple(range(size))
    way = ProcessGroupTransport(group, ranks, rank) if transport is None else transport
    joint = Group("xferdtensor", ranks, rank, way, group)
    rows = _all_rows([_row(src), _row(dst)], BACKENDS.index(backend), group, deadline)
    agreed = _agreed(rows, src_mesh, src_placements, dst_mesh, dst_placements)
    if 0 in agreed.shape:
        return BulkReport()
    source = None if src is None else src.detach().contiguous()
    target = None if dst is None else dst.detach()
    landing = target if target is None or target.is_contiguous() else torch.empty_like(target).contiguous()
    if backend == M2N:
        report = _by_m2n(agreed, source, landing, group, deadline)
    elif backend == P2P:
        report = _by_plan(agreed, source, landing, joint, deadline, bucket_bytes)
    else:
        report = _by_golden(agreed, source, landing, joint, deadline)
    if target is not None and landing is not None and landing is not target:
        copy_cast(target, landing)
    return report


def _by_plan(
    agreed: Agreed, src: Tensor | None, dst: Tensor | None, group: Group, deadline: float, bucket_bytes: int
) -> BulkReport:
    plan = _plan(agreed, bucket_bytes)
    held = [tensor for tensor in (src, dst) if tensor is not None]
    if not held:
        return BulkReport()
    params = {name: tensor for name, tensor in (("src", src), ("dst", dst)) if tensor is not None}
    device = held[0].device
    own = _own_stage(plan, agreed, group.rank, len(group.ranks))
    dtypes = {name: dtype_name(tensor.dtype) for name, tensor in params.items()}
    stage = compile_stage(plan, own, group.rank, dtypes, device, gathers=group.transport.gathers)
    return bulk.move_stage(
        bulk.StageJob(plan, stage, group.rank, params, group, deadline, device, with_digests=False)
    )


def _by_m2n(
    agreed: Agreed, src: Tensor | None, dst: Tensor | None, group: ProcessGroup, deadline: float
) -> BulkReport:
    given, wanted = agreed.src, agreed.dst
    m2n.require_m2n(agreed.shape, given.layout, given.dtype, wanted.layout, wanted.dtype)
    sides = [m2n.Descriptor.of(side.layout, agreed.shape, side.dtype) for side in (given, wanted)]
    clock = time.perf_counter()
    m2n.reshard(src, dst, sides, group, deadline)
    tally = Tally()
    tally.clock(WIRE, clock)
    tally.bytes_received = 0 if dst is None else dst.numel() * dst.element_size()
    return tally.report()


def _by_golden(
    agreed: Agreed, src: Tensor | None, dst: Tensor | None, group: Group, deadline: float
) -> BulkReport:
    assert group.process_group is not None, "xferdtensor makes its group with a process group"
    device = _device(group.process_group)
    full = torch.empty(agreed.shape, dtype=torch_dtype(agreed.dst.dtype), device=device)
    regions = agreed.src.layout.regions(agreed.shape)
    pieces = [
        golden.Piece(rank, region, src if rank == group.rank else None) for rank, region in regions.items()
    ]
    tally = Tally()
    golden.assemble(full, pieces, group, 0, deadline, tally)
    if dst is not None:
        region = agreed.dst.layout.regions(agreed.shape)[group.rank]
        copy_cast(dst, golden.cut(full, region))
        tally.bytes_received = dst.numel() * dst.element_size()
    tally.peak_extra_bytes = 2 * full.numel() * full.element_size()
    return tally.report()


def _backend(asked: str | None) -> str:
    if asked is None:
        try:
            return GOLDEN if is_golden_forced(os.environ) else P2P
        except ValueError as error:
            raise PlanError(str(error)) from error
    if asked not in BACKENDS:
        raise PlanError(f"xferdtensor backend {asked!r}; use {P2P!r}, {GOLDEN!r} or {M2N!r}")
    return asked


def _agreed(
    rows: Sequence[tuple["Row", "Row"]],
    src_mesh: Mesh,
    src_placements: Sequence[Placement],
    dst_mesh: Mesh,
    dst_placements: Sequence[Placement],
) -> Agreed:
    """From what every rank holds; the same checks pass or fail on all ranks alike."""
    src_side = _side(0, "src", rows, src_mesh, src_placements)
    dst_side = _side(1, "dst", rows, dst_mesh, dst_placements)
    src_shape = src_side.layout.full_shape([rows[rank][0][2] for rank in src_side.layout.ranks])
    dst_shape = dst_side.layout.full_shape([rows[rank][1][2] for rank in dst_side.layout.ranks])
    if src_shape != dst_shape:
        raise PlanError(
            f"the source is a tensor of shape {src_shape}, the destination of {dst_shape}; they must agree"
        )
    return Agreed(src_shape, src_side, dst_side)


type Row = tuple[bool, str, tuple[int, ...]]

ABSENT, PRESENT, REFUSED = range(3)


def _row(tensor: Tensor | None) -> list[int]:
    """What a rank says of a local tensor. One that cannot be moved is said to be so, so that all ranks refuse it."""
    if tensor is None:
        return [ABSENT] + [0] * (2 + MAX_DIMS)
    dtype = dtype_name(tensor.dtype)
    if dtype not in DTYPES or tensor.dim() > MAX_DIMS:
        return [REFUSED, tensor.element_size(), tensor.dim()] + [0] * MAX_DIMS
    return [PRESENT, DTYPES.index(dtype), tensor.dim(), *tensor.shape, *[0] * (MAX_DIMS - tensor.dim())]


def _all_rows(
    mine: list[list[int]], backend: int, group: ProcessGroup, deadline: float
) -> list[tuple[Row, Row]]:
    """Exchange what every rank holds and the back end that it chose."""
    own = torch.tensor([*mine, [backend] + [0] * (2 + MAX_DIMS)], dtype=torch.int64, device=_device(group))
    everyone = [torch.empty_like(own) for _ in range(group.size())]
    work = group.allgather([everyone], [own])
    wait_for_work("exchange of local shapes", work, deadline)
    found = [tensor.tolist() for tensor in everyone]
    chosen = [BACKENDS[rows[2][0]] for rows in found]
    if len(set(chosen)) > 1:
        raise PlanError(f"ranks 0 to {len(chosen) - 1} chose the back ends {chosen}; choose one on all ranks")
    return [(_read(rank, rows[0]), _read(rank, rows[1])) for rank, rows in enumerate(found)]


def _read(rank: int, row: list[int]) -> Row:
    kind, dtype, num_dims, *shape = row
    if kind == REFUSED:
        raise PlanError(
            f"rank {rank} gives a tensor of {num_dims} dims with items of {dtype} bytes; dtypes are "
            f"{', '.join(DTYPES)}, with <= {MAX_DIMS} dims: move any other format as uint8"
        )
    return kind == PRESENT, DTYPES[dtype], tuple(shape[:num_dims])


def _side(
    number: int, words: str, rows: Sequence[tuple[Row, Row]], mesh: Mesh, placements: Sequence[Placement]
) -> Side:
    present = [rank for rank, row in enumerate(rows) if row[number][0]]
    if not present:
        raise PlanError(f"no rank gives a local tensor for {words}")
    dtypes = {rows[rank][number][1] for rank in present}
    num_dims = {len(rows[rank][number][2]) for rank in present}
    layout = Layout.of(mesh, placements, len(rows[present[0]][number][2]))
    if set(present) != set(layout.ranks):
        raise PlanError(
            f"ranks {present} give a local tensor for {words}, but its mesh is {sorted(layout.ranks)}"
        )
    if len(dtypes) > 1 or len(num_dims) > 1:
        raise PlanError(
            f"local tensors of {words} differ: dtypes {sorted(dtypes)}, numbers of dims {sorted(num_dims)}"
        )
    return Side(layout, dtypes.pop())


@lru_cache(maxsize=256)
def _plan(agreed: Agreed, bucket_bytes: int) -> Plan:
    train = _manifest("train", "src", agreed.src, agreed.shape)
    gen = _manifest("gen", "dst", agreed.dst, agreed.shape)
    plan = build_plan(train, gen, PlanOptions(bucket_bytes=bucket_bytes, whitelist=(NAME,)))
    if plan.tensors[NAME].kind != BULK:
        raise PlanError(f"cannot move {agreed.src.dtype} to {agreed.dst.dtype}: {plan.tensors[NAME].reason}")
    return plan


def _manifest(side: str, param: str, held: Side, shape: tuple[int, ...]) -> Manifest:
    """The side in the planner's terms; its rank i is `layout.ranks[i]` of the group. Local memory is row-major."""
    regions = held.layout.regions(shape)
    return Manifest(
        side,
        tuple(
            RankManifest(
                side,
                number,
                0,
                0,
                (TensorSpec(NAME, shape, held.dtype),),
                (ParamSpec(param, regions[rank].shape, held.dtype),),
                _holdings(param, regions[rank]),
                (),
            )
            for number, rank in enumerate(held.layout.ranks)
        ),
    )


def _holdings(param: str, region: Region) -> tuple[Holding, ...]:
    if region.is_empty:
        return ()
    return (Holding(NAME, region, param, 0, row_major(region.shape)),)


def _own_stage(plan: Plan, agreed: Agreed, rank: int, size: int) -> StagePlan:
    """What this group rank does in either role, with group ranks for peers."""
    sources, targets = agreed.src.layout.ranks, agreed.dst.layout.ranks
    joint = (*sources, *targets)
    rounds: dict[int, Round] = {}
    for role in [number for number, member in enumerate(joint) if member == rank]:
        for stage in plan.rank_plan(role).stages:
            for round_ in stage.rounds:
                sends = tuple(replace(bucket, peer=joint[bucket.peer]) for bucket in round_.sends)
                receives = tuple(replace(bucket, peer=joint[bucket.peer]) for bucket in round_.receives)
                known = rounds.get(round_.index, Round(round_.index, (), ()))
                rounds[round_.index] = Round(round_.index, known.sends + sends, known.receives + receives)
    return StagePlan(0, tuple(range(size)), tuple(rounds[index] for index in sorted(rounds)))


def _device(group: ProcessGroup) -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device()) if "nccl" in group.name() else torch.device("cpu")
    )

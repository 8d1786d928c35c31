"""The `m2n` back end of xferdtensor: NCCL's own reshard between two meshes, from the package nccl-extensions.

It can do less than `p2p`, and says so before any rank enters a collective: every limit below is a PlanError that
names the limit, alike on all ranks. The limits are those of nccl-extensions 0.1.0: of its Python layer, and the array
sizes of its native planner as vLLM 0.31 records them.

Checks and descriptors are tested on a CPU against the package itself; the reshard has not been run for lack of a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup

from refit.plan import PlanError
from refit.transfer.placements import Layout
from refit.transfer.transports.seam import wait_for_stream

M2N = "m2n"
MAX_DIMS = 3
MAX_MESH_AXES = 2
MAX_SOURCES = 16
MAX_TARGETS = 64
MIN_NCCL = (2, 30, 5)
DTYPES = frozenset(
    (
        "int8",
        "uint8",
        "int32",
        "int64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "float8_e4m3fn",
        "float8_e5m2",
    )
)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One side in M2N's terms: a mesh of one or two axes over the ranks from `start_rank` on.

    `cut_dims` has one entry per axis: the tensor dim that the axis cuts, or None. At least one axis cuts, if only into
    one part: the library has no form for two axes of replicas.
    """

    mesh_dims: tuple[int, ...]
    start_rank: int
    cut_dims: tuple[int | None, ...]
    local_shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, layout: Layout, shape: tuple[int, ...], dtype: str) -> "Descriptor":
        local_shape = layout.regions(shape)[layout.ranks[0]].shape
        if all(dim is None for dim in layout.cut_dims):
            return cls((len(layout.ranks), 1), layout.ranks[0], (None, 0), local_shape, dtype)
        return cls(layout.mesh_shape, layout.ranks[0], layout.cut_dims, local_shape, dtype)

    def tensor(self, m2n: Any, local: Tensor | None) -> Any:
        """The package's descriptor; `local` is None on ranks outside the mesh."""
        placements = [m2n.Replicate() if dim is None else m2n.Shard(dim) for dim in self.cut_dims]
        mesh = m2n.Mesh(self.mesh_dims, start_rank=self.start_rank)
        dtype = getattr(torch, self.dtype)
        return m2n.DistTensor(local, self.local_shape, dtype, mesh=mesh, placements=placements)


def require_m2n(shape: tuple[int, ...], src: Layout, src_dtype: str, dst: Layout, dst_dtype: str) -> None:
    """Raise PlanError naming the first limit of M2N that this transfer exceeds."""
    if not 1 <= len(shape) <= MAX_DIMS:
        raise _refusal("tensor rank", f"the tensor has {len(shape)} dims, M2N moves 1 to {MAX_DIMS}")
    if src_dtype != dst_dtype:
        raise _refusal("no casts", f"the source is {src_dtype}, the destination {dst_dtype}")
    if src_dtype not in DTYPES:
        raise _refusal("dtypes", f"M2N does not move {src_dtype}; it moves {', '.join(sorted(DTYPES))}")
    for words, layout in (("source", src), ("destination", dst)):
        _require_side(words, layout, shape)
    both = sorted(set(src.ranks) & set(dst.ranks))
    if both:
        raise _refusal("disjoint meshes", f"ranks {both} are in the source and in the destination mesh")
    _require_fan(shape, src, dst)


def _require_side(words: str, layout: Layout, shape: tuple[int, ...]) -> None:
    first, count = layout.ranks[0], len(layout.ranks)
    if len(layout.mesh_shape) > MAX_MESH_AXES:
        raise _refusal(
            "mesh axes",
            f"the {words} mesh has shape {layout.mesh_shape}, at most {MAX_MESH_AXES} axes can be",
        )
    if layout.ranks != tuple(range(first, first + count)):
        raise _refusal(
            "contiguous rank intervals",
            f"the {words} mesh holds ranks {layout.ranks}, not {first} to {first + count - 1} in order",
        )
    cuts = [
        (dim, parts) for dim, parts in zip(layout.cut_dims, layout.mesh_shape, strict=True) if dim is not None
    ]
    if len(cuts) > 1:
        raise _refusal("one shard axis a side", f"the {words} is cut along {len(cuts)} mesh axes")
    for dim, parts in cuts:
        if shape[dim] % parts:
            raise _refusal(
                "even cuts", f"dim {dim} of {shape} does not cut into {parts} equal parts for the {words}"
            )


def _require_fan(shape: tuple[int, ...], src: Layout, dst: Layout) -> None:
    """How many different boxes of one side one box of the other meets; replicas count once."""
    sources, targets = set(src.regions(shape).values()), set(dst.regions(shape).values())
    fan_in = max(sum(one.intersect(other) is not None for other in sources) for one in targets)
    if fan_in > MAX_SOURCES:
        raise _refusal(
            "sources into one destination",
            f"{fan_in} sources feed one destination, at most {MAX_SOURCES} can",
        )
    fan_out = max(sum(one.intersect(other) is not None for other in targets) for one in sources)
    if fan_out > MAX_TARGETS:
        raise _refusal(
            "destinations of one source",
            f"one source feeds {fan_out} destinations, at most {MAX_TARGETS} can be",
        )


def _refusal(limit: str, problem: str) -> PlanError:
    return PlanError(f"xferdtensor backend 'm2n' refuses (limit: {limit}): {problem}; use backend 'p2p'")


def reshard(
    src: Tensor | None, dst: Tensor | None, sides: Sequence[Descriptor], group: ProcessGroup, deadline: float
) -> None:
    """Move one tensor; collective over `group`, an NCCL group. `sides`: source and destination, within the limits.

    Local tensors are contiguous. Raises PlanError without CUDA or the package, TransportError at the deadline.
    """
    m2n = import_m2n()
    require_nccl(group)
    stream = torch.cuda.current_stream()
    given, wanted = sides[0].tensor(m2n, src), sides[1].tensor(m2n, dst)
    with m2n.init() as handle:
        handle.reshard(group._comm_ptr(), given, wanted, stream=stream)  # type: ignore[attr-defined]
        wait_for_stream(stream, deadline)


def require_nccl(group: ProcessGroup) -> None:
    """The communicator must come from the same libnccl that M2N links, and that must be new enough."""
    if "nccl" not in group.name():
        raise _refusal("NCCL groups only", f"the group is {group.name()}, M2N runs over NCCL on CUDA devices")
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    if version < MIN_NCCL:
        found, needed = (".".join(map(str, numbers)) for numbers in (version, MIN_NCCL))
        raise _refusal(
            "NCCL version",
            f"torch uses NCCL {found}, M2N needs {needed} in the same process",
        )


def import_m2n() -> Any:
    """The package, or a PlanError that says how to get it."""
    try:
        import nccl.m2n
    except ImportError as error:
        raise PlanError(
            f"xferdtensor backend 'm2n' needs the package nccl-extensions ({error}); install nccl-extensions[cu13], "
            f"or use backend 'p2p'"
        ) from error
    return nccl.m2n

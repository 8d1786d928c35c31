"""Meshes and placements: which box of a tensor each rank of a mesh has. The same rules as torch's DTensor.

Axes of the mesh are taken from left to right. `Shard(dim)` cuts the part that is left of dim `dim` by `torch.chunk`'s
rule: chunks of ceil(size / parts) elements, the last one shorter, later ones empty. `Replicate()` cuts nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from refit.plan.errors import PlanError
from refit.plan.manifest import Holding, Manifest, ParamSpec, RankManifest, TensorSpec
from refit.plan.region import Region


@dataclass(frozen=True, slots=True)
class Shard:
    """This mesh axis cuts dim `dim` of the tensor."""

    dim: int

    def __post_init__(self) -> None:
        if self.dim < 0:
            raise PlanError(f"Shard({self.dim}): give the dim counted from the front, 0 or more")


@dataclass(frozen=True, slots=True)
class Replicate:
    """All ranks along this mesh axis have the same part of the tensor."""


type Placement = Shard | Replicate


@dataclass(frozen=True, slots=True)
class Mesh:
    """Axis sizes, and the ranks in row-major order of the mesh (the last axis runs fastest)."""

    sizes: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.sizes) or prod(self.sizes) != len(self.ranks):
            raise PlanError(f"mesh {self.sizes} needs {prod(self.sizes)} ranks, got {len(self.ranks)}")
        if len(set(self.ranks)) != len(self.ranks):
            raise PlanError(f"mesh {self.sizes} names a rank twice: {self.ranks}")

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """Position of a rank on every axis."""
        if rank not in self.ranks:
            raise PlanError(f"rank {rank} is not in the mesh of ranks {self.ranks}")
        position = self.ranks.index(rank)
        found: list[int] = []
        for size in reversed(self.sizes):
            position, index = divmod(position, size)
            found.append(index)
        return tuple(reversed(found))


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """Start and stop of the `index`-th of `parts` chunks of `size` elements; equal where the chunk is empty."""
    step = -(-size // parts)
    return min(size, index * step), min(size, (index + 1) * step)


def placed(shape: tuple[int, ...], mesh: Mesh, placements: tuple[Placement, ...], rank: int) -> Region:
    """The box of a tensor that one rank has. It may be empty."""
    if len(placements) != len(mesh.sizes):
        raise PlanError(
            f"{len(placements)} placements for a mesh of {len(mesh.sizes)} axes; one per axis is needed"
        )
    region = Region.whole(shape)
    for placement, size, index in zip(placements, mesh.sizes, mesh.coordinate(rank), strict=True):
        match placement:
            case Replicate():
                pass
            case Shard(dim):
                if dim >= len(shape):
                    raise PlanError(f"Shard({dim}) on a tensor of shape {shape}, which has {len(shape)} dims")
                start, stop = chunk(region.shape[dim], size, index)
                base = region.starts[dim]
                region = region.with_dim(dim, base + start, base + stop)
    return region


def mesh_manifest(
    side: str,
    mesh: Mesh,
    tensors: Mapping[str, tuple[TensorSpec, tuple[Placement, ...]]],
) -> Manifest:
    """One side whose ranks hold each tensor as one contiguous param of the tensor's own name."""
    ranks: list[RankManifest] = []
    for rank in sorted(mesh.ranks):
        params: list[ParamSpec] = []
        holdings: list[Holding] = []
        for name, (spec, placements) in tensors.items():
            region = placed(spec.shape, mesh, placements, rank)
            params.append(ParamSpec(name, region.shape, spec.dtype))
            if not region.is_empty:
                holdings.append(Holding(name, region, name, 0, row_major(region.shape)))
        specs = tuple(spec for spec, _ in tensors.values())
        ranks.append(RankManifest(side, rank, 0, 0, specs, tuple(params), tuple(holdings), ()))
    return Manifest(side, tuple(ranks))


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous box, in elements."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))

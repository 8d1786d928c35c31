"""DTensor placements as regions: what each rank of a mesh holds of one tensor. Uneven cuts follow `torch.chunk`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard

from refit.plan import PlanError, Region

type Mesh = torch.Tensor | DeviceMesh


@dataclass(frozen=True, slots=True)
class Layout:
    """A mesh of group ranks (row-major) and, per mesh axis, the tensor dim that it cuts, or None for replicas."""

    ranks: tuple[int, ...]
    mesh_shape: tuple[int, ...]
    cut_dims: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if prod(self.mesh_shape) != len(self.ranks) or len(set(self.ranks)) != len(self.ranks):
            raise PlanError(
                f"a mesh of shape {self.mesh_shape} needs that many different ranks, got {self.ranks}"
            )
        if len(self.cut_dims) != len(self.mesh_shape):
            raise PlanError(
                f"{len(self.cut_dims)} placements for a mesh of {len(self.mesh_shape)} axes; give one per axis"
            )

    @classmethod
    def of(cls, mesh: Mesh, placements: Sequence[Placement], num_dims: int) -> "Layout":
        """From torch's own types. Raises PlanError for a placement that is neither Shard nor Replicate."""
        ranks = mesh.mesh if isinstance(mesh, DeviceMesh) else mesh
        cut_dims = tuple(_cut_dim(placement, num_dims) for placement in placements)
        return cls(tuple(map(int, ranks.reshape(-1).tolist())), tuple(ranks.shape), cut_dims)

    def regions(self, shape: Sequence[int]) -> dict[int, Region]:
        """The box of each rank; may be empty. Axes cut one after the other, each what the one before left."""
        found: dict[int, Region] = {}
        coordinates = product(*map(range, self.mesh_shape))
        for rank, coordinate in zip(self.ranks, coordinates, strict=True):
            region = Region.whole(shape)
            for position, parts, dim in zip(coordinate, self.mesh_shape, self.cut_dims, strict=True):
                if dim is not None:
                    region = _chunk(region, dim, position, parts)
            found[rank] = region
        return found

    def full_shape(self, local_shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """The shape of the whole from local shapes in the order of `ranks`. Raises PlanError if they do not fit."""
        num_dims = len(local_shapes[0])
        coordinates = list(product(*map(range, self.mesh_shape)))
        full = tuple(
            sum(
                shape[dim]
                for shape, coordinate in zip(local_shapes, coordinates, strict=True)
                if all(cut == dim or at == 0 for cut, at in zip(self.cut_dims, coordinate, strict=True))
            )
            for dim in range(num_dims)
        )
        for (rank, region), shape in zip(self.regions(full).items(), local_shapes, strict=True):
            if region.shape != tuple(shape):
                raise PlanError(
                    f"rank {rank} has a local tensor of shape {tuple(shape)}, but its share of {full} under placements "
                    f"{self.cut_dims} is {region.shape} (torch.chunk)"
                )
        return full


def _cut_dim(placement: Placement, num_dims: int) -> int | None:
    match placement:
        case Replicate():
            return None
        case Shard() if type(placement) is Shard and -num_dims <= placement.dim < num_dims:
            return placement.dim % num_dims
        case _:
            raise PlanError(
                f"placement {placement} of a tensor with {num_dims} dims; use Shard(dim) or Replicate()"
            )


def _chunk(region: Region, dim: int, position: int, parts: int) -> Region:
    start, stop = region.starts[dim], region.stops[dim]
    step = -(-(stop - start) // parts)
    return region.with_dim(dim, min(start + position * step, stop), min(start + (position + 1) * step, stop))

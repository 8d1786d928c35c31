"""What a trainer must be able to say and give so that its weights can be refitted: `WeightSource`.

`PolicyTrainer` (Megatron-Core) is a source. So is any torch module whose parameters carry HF names: `ModelSource` takes
plain tensors (one process, or DDP replicas) and DTensors (FSDP2, TP, any mesh of Shard and Replicate). A trainer of
another kind implements the three methods; nothing else of it is needed.
"""

import collections
from collections.abc import Collection, Iterator, Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from refit.plan import Holding, PlanError, RankManifest, Region, TensorSpec, canonical
from refit.transfer.endpoint import Endpoint
from refit.transfer.memory import dtype_name, param_spec
from refit.transfer.placements import Layout
from refit.transfer.protocol import RefitReport


class WeightSource(Protocol):
    """One trainer rank. All trainer ranks make the same calls in the same order."""

    def describe(self) -> RankManifest:
        """The tensors of the whole checkpoint by canonical HF name, and where the elements held here lie.

        Called once per prepare; must not gather. `rank` counts trainers from 0; ranks that hold different layers carry
        different `stage` numbers. A tensor without holdings on any rank, or with a MiscReason, goes by broadcast.
        """
        ...

    def params(self) -> Mapping[str, Tensor]:
        """The live memory by the names of `describe().params`; read during the bulk phase of every refit."""
        ...

    def export(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(HF name, full tensor) of `names`, or of all. Collective over the trainers; rank 0's tensors are sent."""
        ...


class ModelSource:
    """Parameters by HF name, plain or DTensor, of one rank. Holds no copy: refits send what the tensors hold then."""

    def __init__(self, tensors: Mapping[str, Tensor], rank: int) -> None:
        self._tensors = dict(tensors)
        self._rank = rank

    @classmethod
    def of_model(cls, model: torch.nn.Module, rank: int | None = None) -> "ModelSource":
        """Of a module whose parameter names are HF names, as those of `transformers` are; tied ones count once.

        `rank` is this process's number among the trainers, by default its rank in torch.distributed.
        """
        if rank is None:
            rank = dist.get_rank() if dist.is_initialized() else 0
        return cls(dict(model.named_parameters()), rank)

    def describe(self) -> RankManifest:
        """See WeightSource. Raises PlanError for a placement other than Shard and Replicate."""
        tensors: dict[str, TensorSpec] = {}
        holdings: list[Holding] = []
        num_experts = _num_experts(self._tensors)
        for name, tensor in self._tensors.items():
            stacked, expert = canonical(name)
            local, region = _local(tensor), _region_of(name, tensor, self._rank)
            shape, starts, stops, strides = tuple(tensor.shape), region.starts, region.stops, local.stride()
            if expert is not None:
                shape, strides = (num_experts[stacked], *shape), (max(1, local.numel()), *strides)
                starts, stops = (expert, *starts), (expert + 1, *stops)
            tensors[stacked] = TensorSpec(stacked, shape, dtype_name(tensor.dtype))
            if not region.is_empty:
                holdings.append(Holding(stacked, Region(starts, stops), name, 0, tuple(strides)))
        params = tuple(param_spec(name, tensor) for name, tensor in self.params().items())
        return RankManifest("train", self._rank, 0, 0, tuple(tensors.values()), params, tuple(holdings), ())

    def params(self) -> dict[str, Tensor]:
        """The local tensors by HF name."""
        return {name: _local(tensor) for name, tensor in self._tensors.items()}

    def export(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """See WeightSource; a DTensor is gathered over its mesh. Raises KeyError for a name that is not held."""
        for name in self._tensors if names is None else names:
            tensor = self._tensors[name].detach()
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def send_version(endpoint: Endpoint, source: WeightSource, version: int, attempt: int) -> RefitReport:
    """One trainer rank's part of a refit: bulk from live memory, misc by broadcast, then the report."""
    endpoint.begin(version, attempt)
    with endpoint.phase("params"):  # a source may compute them, with the other trainers
        params = source.params()
    endpoint.move_bulk(params)
    if endpoint.misc_names:
        with endpoint.phase("export"):
            exported = source.export(endpoint.misc_names)
            if endpoint.rank == 0:
                endpoint.send_misc(exported)
            else:
                collections.deque(exported, maxlen=0)  # it may gather over all trainers
    return endpoint.put_report()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _region_of(name: str, tensor: Tensor, rank: int) -> Region:
    """The box that this rank holds; what a mesh says is for its own ranks only."""
    if not isinstance(tensor, DTensor):
        return Region.whole(tuple(tensor.shape))
    mesh = tensor.device_mesh
    region = Layout.of(mesh, tensor.placements, tensor.dim()).regions(tensor.shape)[dist.get_rank()]
    found = tuple(_local(tensor).shape)
    if region.shape != found:
        raise PlanError(
            f"rank {rank} holds {found} of {name!r}, but {tensor.placements} of {tuple(tensor.shape)} on a mesh of "
            f"{tuple(mesh.shape)} give it {region.shape}: cut it as torch.chunk does, without padding"
        )
    return region


def _num_experts(names: Collection[str]) -> dict[str, int]:
    """How many experts each stacked tensor has: one more than the highest index."""
    found: dict[str, int] = {}
    for name in names:
        stacked, expert = canonical(name)
        if expert is not None:
            found[stacked] = max(found.get(stacked, 0), expert + 1)
    return found

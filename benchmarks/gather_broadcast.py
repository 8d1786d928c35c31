"""The conventional refit: full tensors gathered on trainer 0, broadcast packed to the generators, sliced there."""

from collections.abc import Iterator, Mapping

import torch

from refit.plan import Holding, Plan, RankManifest, Region, TensorSpec
from refit.transfer import golden
from refit.transfer.broadcast import receive_packed, send_packed
from refit.transfer.groups import Group
from refit.transfer.memory import copy_cast, strided_box, torch_dtype
from refit.transfer.transports.seam import Parcel

CPU = torch.device("cpu")


class GatherBroadcast:
    """One rank's part. `everyone` is a group of all ranks, `misc` one of trainer 0 and the generators."""

    def __init__(
        self,
        plan: Plan,
        manifest: RankManifest,
        params: Mapping[str, torch.Tensor],
        everyone: Group,
        misc: Group | None,
    ) -> None:
        self._plan, self._params, self._everyone, self._misc = plan, params, everyone, misc
        self._rank = everyone.rank
        tensors = plan.tensors.values()
        self._specs = {t.name: TensorSpec(t.name, t.shape, t.dtype) for t in tensors}
        self._mine: dict[str, list[Holding]] = {}
        for holding in manifest.holdings:
            self._mine.setdefault(holding.tensor, []).append(holding)
        self._held: dict[str, list[tuple[int, Holding]]] = {name: [] for name in self._specs}
        for rank in plan.train.manifest.ranks:
            for held in rank.holdings:
                if all(held.region != known.region for _, known in self._held[held.tensor]):
                    self._held[held.tensor].append((rank.rank, held))

    def run(self, chunk_bytes: int, deadline: float) -> None:
        if self._rank >= self._plan.num_train:
            self._receive(chunk_bytes, deadline)
        elif self._rank == 0:
            assert self._misc is not None, "trainer 0 is in the misc group"
            send_packed(self._gathered(deadline), self._misc, self._specs, chunk_bytes, deadline, CPU)
        else:
            for _ in self._gathered(deadline):
                pass

    def _receive(self, chunk_bytes: int, deadline: float) -> None:
        assert self._misc is not None, "generators are in the misc group"
        for name, full in receive_packed(self._misc, self._specs, chunk_bytes, deadline, CPU):
            for holding in self._mine.get(name, []):
                copy_cast(self._box(holding), golden.cut(full, holding.region))

    def _gathered(self, deadline: float) -> Iterator[tuple[str, torch.Tensor]]:
        for number, (name, spec) in enumerate(self._specs.items()):
            full = torch.empty(spec.shape if self._rank == 0 else 0, dtype=torch_dtype(spec.dtype))
            for holder, holding in self._held[name]:
                if self._rank in (0, holder):
                    self._bring(full, holding, holder, number, deadline)
            yield name, full

    def _bring(self, full: torch.Tensor, holding: Holding, holder: int, tag: int, deadline: float) -> None:
        """One holding to trainer 0."""
        if holder == 0:
            copy_cast(golden.cut(full, holding.region), self._box(holding))
            return
        packed = torch.empty(holding.region.shape, dtype=full.dtype)
        payload = packed.view(-1).view(torch.uint8)
        if self._rank == holder:
            copy_cast(packed, self._box(holding))
            self._everyone.transport.wait(
                self._everyone.transport.post([Parcel(0, payload)], [], tag), deadline
            )
        else:
            ticket = self._everyone.transport.post([], [Parcel(holder, payload)], tag)
            self._everyone.transport.wait(ticket, deadline)
            copy_cast(golden.cut(full, holding.region), packed)

    def _box(self, holding: Holding) -> torch.Tensor:
        region: Region = holding.region
        return strided_box(self._params[holding.param], region.shape, holding.strides, holding.offset)

"""What a lane keeps from one stage, and one refit, to the next."""

from collections.abc import Mapping

import torch
from torch import Tensor

from refit.transfer.compiled import CompiledStage
from refit.transfer.runs import LiveParams, Seen

KEPT_BYTES = 64 << 20  # larger slots are given back: there the copies outweigh the page faults
ALIGNMENT_BYTES = 64


class Workspace:
    """Slot memory that stays mapped: to fault pages in costs as much as to copy them. One thread at a time.

    On CUDA nothing is kept here, since torch keeps device memory anyway.
    """

    def __init__(self) -> None:
        self._kept = torch.empty(0, dtype=torch.uint8)
        self._seen: dict[int, tuple[CompiledStage, Seen]] = {}

    def live_params(self, stage: CompiledStage, params: Mapping[str, Tensor]) -> LiveParams:
        """The params of a stage, checked unless they are those of the last call for it."""
        known, seen = self._seen.get(stage.stage, (stage, None))
        live = LiveParams(params, stage.params, stage.reach_bytes, seen if known is stage else None)
        self._seen[stage.stage] = stage, live.seen
        return live

    def slots(self, count: int, num_bytes: int, device: torch.device) -> tuple[Tensor, ...]:
        """`count` pieces of `num_bytes` each, whose contents have no meaning. Valid until the next call."""
        stride = -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if device.type == "cuda" or count * stride > KEPT_BYTES:
            return tuple(torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(count))
        if self._kept.numel() < count * stride:
            self._kept = torch.empty(count * stride, dtype=torch.uint8)
        return tuple(self._kept[at * stride : at * stride + num_bytes] for at in range(count))

"""The parcels of a stage in the memory of one rank: packed into slots, unpacked from them, weighed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from refit.transfer.compiled import CompiledParcel, CompiledStage, Move
from refit.transfer.digest import unsigned
from refit.transfer.memory import as_bytes, strided_box
from refit.transfer.runs import LiveParams


@dataclass(frozen=True, slots=True)
class Boxed:
    """A parcel with the memory that holds its bytes: a part of a slot, or the param itself."""

    parcel: CompiledParcel
    payload: Tensor


class Packing:
    """Copies and digests between the parcels of `stage` and `params`, on `device`."""

    def __init__(self, stage: CompiledStage, params: LiveParams, device: torch.device) -> None:
        self.params = params
        self._bases = _kernel_bases(stage, params, device)
        self._sums = torch.zeros(len(stage.sums), dtype=torch.int64, device=device)

    @property
    def digests(self) -> list[int]:
        """The sums of the stage over all that was weighed, in the order of `stage.sums`."""
        return unsigned(self._sums)

    def boxed(self, parcel: CompiledParcel, slot: Tensor) -> Boxed:
        """The parcel in its place: in `slot`, or in the param where it is one run there."""
        if parcel.slot_byte is None:
            return Boxed(parcel, as_bytes(self._box(parcel.moves[0])))
        return Boxed(parcel, slot[parcel.slot_byte : parcel.slot_byte + parcel.num_bytes])

    def copy(self, boxed: Boxed, is_pack: bool) -> None:
        """Pack or unpack a parcel: by one kernel, or runs by memmove and all other boxes in one batched call."""
        parcel, payload = boxed.parcel, boxed.payload
        if parcel.slot_byte is None:
            return
        if parcel.kernels is not None and self._bases is not None:
            parcel.kernels.copy(self._bases, payload, is_pack)
            return
        parcel.runs.copy(self.params, payload, is_pack)
        if parcel.boxes:
            typed = _Typed(payload)
            packed = [typed.box(move) for move in parcel.boxes]
            boxes = [self._box(move) for move in parcel.boxes]
            targets, sources = (packed, boxes) if is_pack else (boxes, packed)
            torch._foreach_copy_(targets, sources)

    def weigh(self, boxed: Boxed, is_packed: bool) -> None:
        """Add the digests of what the params hold, or of the packed bytes where they have just been sent."""
        parcel = boxed.parcel
        in_place = parcel.box_in_place
        if in_place is not None:
            in_place.add_box(self._box(parcel.moves[0]), self._sums)
            return
        if not is_packed:
            self.copy(boxed, is_pack=True)
        if parcel.kernels is not None and self._bases is not None:
            parcel.kernels.add_digests(self._bases, boxed.payload, self._sums)
        else:
            parcel.weighing.add(boxed.payload, self._sums)

    def _box(self, move: Move) -> Tensor:
        """The segment in this rank's memory: as bits, or as values of the param's own dtype if a cast follows."""
        segment = move.segment
        whole = self.params.values if move.is_cast else self.params.bits
        return strided_box(whole(segment.param), segment.shape, segment.strides, segment.offset)


def is_copied(parcel: CompiledParcel) -> bool:
    """False where the transport takes the bytes from the params, or puts them there, by itself."""
    return parcel.rows is None


def _kernel_bases(stage: CompiledStage, params: LiveParams, device: torch.device) -> Tensor | None:
    """The addresses that kernels start from; None where torch does the copies: no CUDA, or a param not aligned."""
    if not stage.has_kernels:
        return None
    from refit.transfer.kernels.parcel import bases_of

    return bases_of(params.addresses, device)


class _Typed:
    """A parcel's bytes seen through the dtypes that occur in it."""

    def __init__(self, payload: Tensor) -> None:
        self._payload = payload
        self._views: dict[torch.dtype, Tensor] = {}

    def box(self, move: Move) -> Tensor:
        """The segment inside the parcel."""
        dtype = move.wire if move.is_cast else move.bits
        view = self._views.get(dtype)
        if view is None:
            usable = self._payload.numel() // dtype.itemsize * dtype.itemsize
            view = self._views[dtype] = self._payload[:usable].view(dtype)
        return torch.as_strided(view, move.segment.shape, move.strides, view.storage_offset() + move.start)

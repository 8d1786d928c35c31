"""A rank's answers to a reader: its manifest, rows of tensors, digests of boxes. Reads memory, changes nothing.

Every ask and its answers stand in the reader's own run id of a control store, so that a read that fails fails alone:

    ask/<n>              {"what": "describe" | "rows" | "digests", ...}, from the reader
    answer/<n>/<rank>    {"version": V, ...} from every rank that the ask names, all ranks for "describe"
    bytes/<n>/<rank>     the elements of the boxes it gives, in order, each box row-major
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from refit.plan.manifest import Holding, RankManifest
from refit.plan.read import by_tensor, memory_of
from refit.plan.region import Region
from refit.plan.wire import encode_rank_manifest
from refit.transfer.digest import MASK, digest
from refit.transfer.errors import TransportError
from refit.transfer.memory import as_bytes, copy_cast, strided_box, torch_dtype
from refit.transfer.rendezvous import ControlStore

PLAIN, THROUGH_KERNEL, REORDERED, SHADOWED = "plain", "through kernel", "reordered", "shadowed"
INVERTED = "inverted"


class Unreadable(RuntimeError):  # noqa: N818 - a finding about one parameter, told to who asked for it
    """Live memory of this parameter is in a layout that cannot be put back into the loader's."""


@dataclass(frozen=True, slots=True)
class Readable:
    """`tensor` in the shape of its ParamSpec, for reading only. `kind` says how it was had.

    plain: the live memory itself. through kernel: what the kernel multiplies with; zeros have lost their sign.
    reordered: a copy of live memory with the kernel's permutation undone. shadowed: a head computes with a copy that
    differs from its parameter; `tensor` is what it computes with. inverted: the loader stores a function of it, which
    was undone, see `inverse`.
    """

    kind: str
    tensor: Tensor


class Memory(Protocol):
    """The parameters of one rank by their ParamSpec names."""

    def manifest(self, described: RankManifest) -> RankManifest:
        """`described`, and what can be read back beyond it."""
        ...

    def param(self, name: str) -> Readable:
        """Raises Unreadable with the reason."""
        ...


@dataclass(frozen=True, slots=True)
class Holder:
    """One rank when it is asked. `rank` counts inside its engine; `version` 0 is what was loaded from disk.

    `describe` gives its manifest under that rank, `memory` opens what it holds now. `broken` says why it must not
    serve, or "": what it holds is then no version.
    """

    rank: int
    version: int
    describe: Callable[[], RankManifest]
    memory: Callable[[], Memory]
    broken: str = ""


class Reads:
    """All reads of one rank. Keeps the connection to the last store, and inside a read what it unpacked last."""

    def __init__(self) -> None:
        self._control: ControlStore | None = None
        self._store = ""
        self._boxes: tuple[str, int, Boxes] | None = None

    def answer(self, info: Mapping[str, Any], holder: Holder) -> None:
        """Answer ask number `read` of the reader with `run_id` in `store`. What goes wrong is told to it.

        Raises TransportError when its control store cannot be reached.
        """
        control = self._join(info["store"], info["timeout_s"]).under(info["run_id"])
        ask, question = info["read"], dict[str, Any]()
        try:
            found: Any = control.peek(f"ask/{ask}")
            if found is None:
                raise TransportError(f"ask {ask} is not in the control store at {info['store']}")
            if holder.broken:
                raise TransportError(f"this worker holds no whole version: {holder.broken}")
            question = found
            answer = self._answered(question, control, ask, holder)
            if answer is not None:
                control.put(f"answer/{ask}/{holder.rank}", {"version": holder.version, **answer})
        except Exception as error:
            control.fail("read", f"gen {holder.rank}", f"{type(error).__name__}: {error}")
        if question.get("last", True):
            self.forget()

    def forget(self) -> None:
        """Free what a read has unpacked."""
        self._boxes = None

    def close(self) -> None:
        self.forget()
        if self._control is not None:
            self._control.close()
        self._control, self._store = None, ""

    def _join(self, store: str, timeout_s: float) -> ControlStore:
        if self._control is None or self._store != store:
            self.close()
            host, _, port = store.rpartition(":")
            self._control, self._store = ControlStore.join(host, int(port), "read", timeout_s), store
        return self._control

    def _answered(
        self, question: Mapping[str, Any], control: ControlStore, ask: str, holder: Holder
    ) -> dict[str, Any] | None:
        rank = str(holder.rank)
        match question["what"]:
            case "describe":
                return {"manifest": encode_rank_manifest(holder.memory().manifest(holder.describe()))}
            case "rows":
                give, witness = question["give"].get(rank, ()), question["witness"].get(rank, ())
                if not give and not witness:
                    return None
                boxes = self._open(control.run_id, holder)
                answer, payload = boxes.rows(question["tensor"], give, witness)
                control.put_bytes(f"bytes/{ask}/{rank}", payload)
                return answer
            case "digests":
                asked = question["boxes"].get(rank)
                return None if asked is None else self._open(control.run_id, holder).digests(asked)
            case what:
                raise TransportError(
                    f"a reader asks for {what!r}, which this worker does not know; update refit here"
                )

    def _open(self, run_id: str, holder: Holder) -> Boxes:
        key = (run_id, holder.version)
        if self._boxes is None or self._boxes[:2] != key:
            memory = holder.memory()
            self._boxes = (*key, Boxes(memory, memory.manifest(holder.describe())))
        return self._boxes[2]


class Boxes:
    """Boxes of canonical tensors as one rank's memory has them."""

    def __init__(self, memory: Memory, manifest: RankManifest) -> None:
        self._memory = memory
        self._holdings = by_tensor(manifest.holdings)
        self._specs = {spec.name: spec for spec in manifest.tensors}

    def rows(self, tensor: str, give: Sequence[Any], witness: Sequence[Any]) -> tuple[dict[str, Any], bytes]:
        """(answer, elements of the boxes in `give`). Both lists hold [starts, stops]; digests are of both."""
        kinds: dict[str, str] = {}
        digests: dict[str, list[str]] = {"give": [], "witness": []}
        payload = bytearray()
        for name, boxes in (("give", give), ("witness", witness)):
            for starts, stops in boxes:
                region = Region(tuple(starts), tuple(stops))
                box = self._box(tensor, region, kinds)
                value = digest(box, region, self._specs[tensor].shape)
                digests[name].append(f"{value:016x}")
                if name == "give":
                    payload += as_bytes(box.cpu()).numpy().tobytes()
        dtype = self._specs[tensor].dtype
        return {"digests": digests, "kinds": kinds, "num_bytes": len(payload), "dtype": dtype}, bytes(payload)

    def digests(self, boxes: Sequence[Any]) -> dict[str, Any]:
        """A digest, or the reason for none, of each [tensor, dtype, starts, stops], cast to that dtype."""
        kinds: dict[str, str] = {}
        found = []
        for tensor, dtype, starts, stops in boxes:
            try:
                value = self._digest(tensor, dtype, Region(tuple(starts), tuple(stops)), kinds)
                found.append({"digest": f"{value:016x}"})
            except Unreadable as reason:
                found.append({"reason": str(reason)})
        return {"digests": found, "kinds": kinds}

    def _digest(self, tensor: str, dtype: str, region: Region, kinds: dict[str, str]) -> int:
        total = 0
        for part in memory_of(self._holdings[tensor], region):
            view = self._view(part, kinds).to(torch_dtype(dtype))
            total += digest(view, part.region, self._specs[tensor].shape)
        return total & MASK

    def _box(self, tensor: str, region: Region, kinds: dict[str, str]) -> Tensor:
        """A contiguous copy of a box."""
        box = torch.empty(region.shape, dtype=torch_dtype(self._specs[tensor].dtype))
        for part in memory_of(self._holdings[tensor], region):
            at = tuple(
                slice(start - low, stop - low)
                for start, stop, low in zip(part.region.starts, part.region.stops, region.starts, strict=True)
            )
            copy_cast(box[at], self._view(part, kinds))
        return box

    def _view(self, part: Holding, kinds: dict[str, str]) -> Tensor:
        readable = self._memory.param(part.param)
        kinds[part.param] = readable.kind
        return strided_box(readable.tensor, part.region.shape, part.strides, part.offset)

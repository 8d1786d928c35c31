"""What one vLLM worker holds, read off vLLM's own loader: no table of names, no weight read or allocated.

The live model's `load_weights` runs on meta tensors of the HF shapes while `Recorder` watches. A copy of a
view of an HF tensor into a view of a parameter becomes holdings; whatever else a loader does to a tensor
makes that tensor misc, with the reason.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

from refit.gen_side.layout import Slot, loader_layout
from refit.gen_side.loader.hf_index import HfShapes
from refit.gen_side.loader.recorder import Computed, Copied, Filled, Recorder, Write
from refit.gen_side.loader.views import NotABox, View, boxes, contiguous_strides
from refit.plan.collector import collector_paused
from refit.plan.manifest import Holding, MiscReason, ParamSpec, RankManifest, TensorSpec, coalesce_holdings
from refit.plan.naming import canonical
from refit.plan.region import Region, first_overlap, uncovered
from refit.transfer.memory import param_spec

_log = logging.getLogger(__name__)

MAX_REFUSED = 64
"""A loader that fails on more tensors than this has a fault that leaving tensors out does not mend."""


class TraceError(RuntimeError):
    """vLLM's loader cannot be traced; the message holds its own error."""


@dataclass(frozen=True, slots=True)
class Inverse:
    """A parameter that the loader fills with copies and then makes `steps` of, element by element (Mamba's A).

    `holdings` say where the copies went. Their tensors are misc, and can be computed back from what is stored.
    """

    param: ParamSpec
    steps: tuple[str, ...]
    holdings: tuple[Holding, ...]


@dataclass(frozen=True, slots=True)
class LoaderTrace:
    """The loader of one worker. Holdings count elements of the parameters in the LOADER's layout."""

    tensors: tuple[TensorSpec, ...]
    params: tuple[ParamSpec, ...]
    holdings: tuple[Holding, ...]
    misc: tuple[MiscReason, ...]
    fills: tuple[Filled, ...]
    """Padding that the loader sets to a constant, in its order."""
    written: frozenset[str]
    """Every parameter that the loader writes to, misc or not."""
    partial: frozenset[str]
    """Of those, the ones with elements that neither a holding nor a fill covers."""
    unsure: bool
    """The loader may write more than `written`: it could not be followed to the end."""
    aliases: tuple[tuple[str, str], ...]
    """(second, first): two names of one live memory; the second is never written on its own."""
    deferred: frozenset[str]
    """HF tensors that attention layers take: vLLM keeps them until the end of a reload."""
    inverses: tuple[Inverse, ...]

    def manifest(self, *, gen_rank: int, stage: int, replica: int) -> RankManifest:
        """This worker's part of the generator manifest. dtypes are the engine's, hence those on the wire."""
        return RankManifest(
            "gen", gen_rank, stage, replica, self.tensors, self.params, self.holdings, self.misc
        )


def trace_loader(model: torch.nn.Module, hf_shapes: HfShapes) -> LoaderTrace:
    """Trace the loader of a live model. The model serves afterwards exactly as before.

    Raises TraceError when `load_weights` cannot run on meta tensors at all.
    """
    # Tracing 45,000 experts makes a million small objects; collections would walk the whole model each time.
    with collector_paused(), loader_layout(model) as slots:
        aliases = dict(_aliases(slots))
        kept = [slot for slot in slots if slot.param not in aliases]
        recorder, refused, reported = _run(model, slots, hf_shapes)
        writes = [w for w in recorder.writes if w.param not in aliases]
        values = recorder.read_values
        return _Compiler(kept, hf_shapes, writes, values, refused, reported, aliases).compile()


def _aliases(slots: Sequence[Slot]) -> Iterator[tuple[str, str]]:
    """Pairs of names of one live memory, such as a tied head: vLLM's loader knows the first name."""
    first: dict[tuple[int, int, tuple[int, ...]], str] = {}
    for slot in slots:
        live = slot.live
        if live is None or live.is_meta or not live.numel() or live.shape != slot.tensor.shape:
            continue  # gone after processing: it shares no memory with anyone
        key = (live.data_ptr(), live.numel(), tuple(live.stride()))
        if first.setdefault(key, slot.param) != slot.param:
            yield slot.param, first[key]


def _run(
    model: torch.nn.Module, slots: Sequence[Slot], hf_shapes: HfShapes
) -> tuple[Recorder, dict[str, str], frozenset[str]]:
    """(recorder, tensors the loader failed on with its error, parameters it says it loaded)."""
    params = {slot.param: slot.tensor for slot in slots}
    refused: dict[str, str] = {}
    while True:
        sources = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for name, (shape, dtype) in hf_shapes.items()
            if name not in refused
        }
        recorder = Recorder(params, sources)
        try:
            with torch.no_grad(), disable_mtp_completeness_check(), recorder:
                reported = model.load_weights(_feed(sources, recorder))
        except Exception as error:  # a loader may raise anything; the tensor it was given becomes misc
            if recorder.current in refused or not recorder.current or len(refused) >= MAX_REFUSED:
                raise TraceError(
                    f"the loader of {type(model).__name__} failed on meta tensors: {error}"
                ) from error
            refused[recorder.current] = (
                f"the loader fails without its values: {type(error).__name__}: {error}"
            )
            _log.info("refit trace: %s is misc: %s", recorder.current, refused[recorder.current])
            continue
        return recorder, refused, frozenset(reported or ())


def _feed(sources: dict[str, torch.Tensor], recorder: Recorder) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in sources.items():
        recorder.current = name
        yield name, tensor


class _Compiler:
    """Writes of one loader run -> LoaderTrace. Every tensor ends as held, misc or unused."""

    def __init__(
        self,
        slots: Sequence[Slot],
        hf_shapes: HfShapes,
        writes: Iterable[Write],
        read_values: set[str],
        refused: dict[str, str],
        reported: frozenset[str],
        aliases: dict[str, str],
    ) -> None:
        self.slots = {slot.param: slot for slot in slots}
        self.hf_shapes = hf_shapes
        self.aliases = aliases
        self.reported = reported
        self.misc: dict[str, str] = dict(refused)
        self.copied = tuple(dict.fromkeys(w for w in writes if isinstance(w, Copied)))
        self.fills = tuple(w for w in writes if isinstance(w, Filled) and 0 not in w.dst.sizes)
        self.computed = tuple(w for w in writes if isinstance(w, Computed))
        self.order = {write: position for position, write in enumerate(writes)}
        self.held: dict[Copied, tuple[Holding, ...]] = {}
        self.unsure = bool(refused)
        self.canonical = {name: canonical(name) for name in hf_shapes}
        for name in sorted(read_values):
            self.misc.setdefault(name, "the loader reads its values on the host")

    def compile(self) -> LoaderTrace:
        by_param = self._boxes_by_param()
        self._check_params(by_param)
        held = [h for copy in self.copied if copy.tensor not in self.misc for h in self.held[copy]]
        self._check_reported(held)
        return self._result(held, by_param)

    def _boxes_by_param(self) -> dict[str, list[tuple[str, Region]]]:
        """Fill `held`, and give the boxes of each parameter's own indices that plain copies write."""
        found: dict[str, list[tuple[str, Region]]] = defaultdict(list)
        for copy in self.copied:
            if self.slots[copy.param].deferred:
                self.misc.setdefault(
                    copy.tensor, f"{copy.param} belongs to attention, which vLLM finishes last"
                )
                continue
            try:
                regions = _param_boxes(self.slots[copy.param], copy.dst)
                self.held[copy] = self._held(copy)
            except NotABox as error:
                self.misc.setdefault(copy.tensor, str(error))
                continue
            found[copy.param].extend((copy.tensor, region) for region in regions)
        return found

    def _held(self, copy: Copied) -> tuple[Holding, ...]:
        """The copy as holdings under the canonical name; an expert becomes one row of dim 0."""
        shape, _ = self.hf_shapes[copy.tensor]
        found = boxes(shape, copy.src, copy.dst)
        name, expert = self.canonical[copy.tensor]
        if expert is None:
            return tuple(
                Holding(name, Region(b.starts, b.stops), copy.param, b.offset, b.strides) for b in found
            )
        return tuple(
            Holding(
                name,
                Region((expert, *b.starts), (expert + 1, *b.stops)),
                copy.param,
                b.offset,
                (b.num_elements, *b.strides),
            )
            for b in found
        )

    def _check_params(self, by_param: dict[str, list[tuple[str, Region]]]) -> None:
        """Where one parameter gets more than disjoint plain copies, all tensors in it are misc."""
        bad: dict[str, str] = {}
        for write in self.computed:
            bad.setdefault(write.param, write.reason)
            for name in write.tensors:
                self.misc.setdefault(name, _reason(write))
        for param, entries in by_param.items():
            clash = first_overlap([region for _, region in entries])
            if clash is not None:
                first, second = (entries[i][0] for i in clash)
                bad.setdefault(param, f"{first} and {second} are loaded into the same elements")
        for fill in self.fills:
            clash = self._fill_clash(fill, by_param.get(fill.param, []))
            if clash is not None:
                bad.setdefault(fill.param, clash)
        for copy in self.copied:
            if copy.param in bad:
                self.misc.setdefault(copy.tensor, f"{copy.param}: {bad[copy.param]}")

    def _fill_clash(self, fill: Filled, entries: list[tuple[str, Region]]) -> str | None:
        """A constant may be set under a tensor's own later copy, never over another write."""
        slot = self.slots[fill.param]
        try:
            regions = _param_boxes(slot, fill.dst)
        except NotABox as error:
            return f"padding of an irregular form: {error}"
        later = {c.tensor for c in self.copied if c.param == fill.param and self.order[c] > self.order[fill]}
        for tensor, box in entries:
            if any(box.intersect(region) is not None for region in regions) and (
                tensor != fill.tensor or tensor not in later
            ):
                return f"a constant set with {fill.tensor} overlaps what {tensor} loads"
        return None

    def _check_reported(self, held: list[Holding]) -> None:
        """A parameter that the loader says it loaded, but no write was seen: nothing may stay unseen."""
        seen = {w.param for w in (*self.copied, *self.computed, *self.fills)} | set(self.aliases)
        unseen = sorted(name for name in self.reported if name in self.slots and name not in seen)
        if unseen:
            self.unsure = True
            named = {h.tensor for h in held}
            for name in self.hf_shapes:
                if self.canonical[name][0] not in named and name not in self.misc:
                    self.misc[name] = f"the loader reports {unseen[0]} as loaded, but no copy was seen"

    def _result(self, held: list[Holding], by_param: dict[str, list[tuple[str, Region]]]) -> LoaderTrace:
        dtypes = self._wire_dtypes(held)
        misc = self._canonical_misc()
        holdings = coalesce_holdings(h for h in held if h.tensor not in misc)
        names = {h.tensor for h in holdings} | set(misc)
        shapes = self._canonical_shapes(names)
        tensors = tuple(TensorSpec(n, shapes[n][0], dtypes.get(n, shapes[n][1])) for n in sorted(names))
        used = sorted({h.param for h in holdings})
        params = tuple(param_spec(p, self.slots[p].tensor) for p in used)
        written = frozenset(w.param for w in (*self.copied, *self.computed, *self.fills))
        written = frozenset(p for p in written if not self.slots[p].deferred)
        return LoaderTrace(
            tensors=tensors,
            params=params,
            holdings=holdings,
            misc=tuple(MiscReason(name, misc[name]) for name in sorted(misc)),
            fills=self.fills,
            written=written,
            partial=frozenset(p for p in written if self._is_partial(p, by_param.get(p, []))),
            unsure=self.unsure,
            aliases=tuple(sorted(self.aliases.items())),
            deferred=frozenset(c.tensor for c in self.copied if self.slots[c.param].deferred),
            inverses=tuple(self._inverses(by_param)),
        )

    def _inverses(self, by_param: dict[str, list[tuple[str, Region]]]) -> Iterator[Inverse]:
        """Parameters with one computed write, the last one, after disjoint copies of tensors that go nowhere else."""
        writes = (*self.copied, *self.computed, *self.fills)
        for write in self.computed:
            copies = [copy for copy in self.copied if copy.param == write.param]
            tensors = {copy.tensor for copy in copies}
            if not write.steps or tensors != write.tensors or any(copy not in self.held for copy in copies):
                continue
            touching = [w for w in writes if w.param == write.param or _names(w) & tensors]
            last = max(touching, key=lambda w: self.order[w])
            reasons = {self.misc[tensor] for tensor in tensors}
            if len(touching) != len(copies) + 1 or last != write or reasons != {_reason(write)}:
                continue
            if first_overlap([region for _, region in by_param[write.param]]) is None:
                shape, dtype = tuple(self.slots[write.param].tensor.shape), _dtype(self.slots[write.param])
                held = coalesce_holdings(h for copy in copies for h in self.held[copy])
                yield Inverse(ParamSpec(write.param, shape, dtype), write.steps, held)

    def _wire_dtypes(self, held: list[Holding]) -> dict[str, str]:
        """Canonical tensor -> the one dtype it is stored in here; two dtypes make it misc."""
        found: dict[str, str] = {}
        for holding in held:
            name, dtype = holding.tensor, _dtype(self.slots[holding.param])
            if found.setdefault(name, dtype) != dtype:
                self.misc.setdefault(name, f"it is stored both as {found[name]} and as {dtype}")
        return found

    def _canonical_misc(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, reason in sorted(self.misc.items()):
            found.setdefault(canonical(name)[0], reason)
        return found

    def _canonical_shapes(self, names: set[str]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Canonical tensor -> (shape with the experts stacked, dtype in the checkpoint)."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        experts: dict[str, int] = defaultdict(int)
        for hf_name, (shape, dtype) in self.hf_shapes.items():
            name, expert = self.canonical[hf_name]
            if name in names:
                experts[name] = max(experts[name], 0 if expert is None else expert + 1)
                found[name] = ((experts[name], *shape) if expert is not None else shape, dtype)
        return found

    def _is_partial(self, param: str, entries: list[tuple[str, Region]]) -> bool:
        slot = self.slots[param]
        regions = [region for tensor, region in entries if tensor not in self.misc]
        if sum(region.num_elements for region in regions) == slot.tensor.numel():
            return False  # what is not misc is disjoint
        regions += [box for f in self.fills if f.param == param for box in _param_boxes(slot, f.dst)]
        return bool(uncovered(Region.whole(tuple(slot.tensor.shape)), regions))


def _names(write: Write) -> frozenset[str]:
    return write.tensors if isinstance(write, Computed) else frozenset({write.tensor})


def _reason(write: Computed) -> str:
    return f"{write.param}: {write.reason}"


def _param_boxes(slot: Slot, view: View) -> tuple[Region, ...]:
    """A strided view of a parameter as boxes of the parameter's own indices. Raises NotABox."""
    shape = tuple(slot.tensor.shape)
    if tuple(slot.tensor.stride()) != contiguous_strides(shape) and slot.tensor.numel() > 1:
        raise NotABox(f"{slot.param} of shape {shape} has strides {tuple(slot.tensor.stride())}")
    return _regions(shape, view)


@lru_cache(maxsize=1 << 16)
def _regions(shape: tuple[int, ...], view: View) -> tuple[Region, ...]:
    return tuple(Region(b.starts, b.stops) for b in boxes(shape, view, view))


def _dtype(slot: Slot) -> str:
    return str(slot.tensor.dtype).removeprefix("torch.")

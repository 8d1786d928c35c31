"""Parameters of a live engine in the loader's layout, or the reason why one cannot be read.

Same-shape memory is never trusted by its shape: after a commit of ours a parameter counts as *plain* only if
processing left its bytes as staged. Before the first commit only layers whose processing is known to leave weights
alone are. What the kernel keeps packed is read through it; what it permutes is put back in order, and after a commit
the result must have the digest that was staged. What the loader makes a function of is computed back.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from refit.gen_side.layout import detached_views
from refit.gen_side.live.audit import Committed, live_tensors, packed_params
from refit.gen_side.live.packed import read_packed
from refit.gen_side.live.permuted import is_prepacked, unpacked
from refit.gen_side.loader.trace import LoaderTrace
from refit.gen_side.loader.views import contiguous_strides
from refit.gen_side.switch import plain
from refit.plan.manifest import RankManifest
from refit.transfer.digest import whole_digest
from refit.transfer.inverse import undo
from refit.transfer.reading import (
    INVERTED,
    PLAIN,
    REORDERED,
    SHADOWED,
    THROUGH_KERNEL,
    Readable,
    Unreadable,
)

MAX_SHADOW_MACS = 1 << 32
"""A head's packed copy that needs more multiply-adds to read (2 s) is not compared with its plain weight."""
_LEAVES_WEIGHTS = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


class LiveMemory:
    """One worker's live parameters. Nothing is kept but the last one that had to be unpacked."""

    def __init__(self, model: torch.nn.Module, trace: LoaderTrace, committed: Committed | None) -> None:
        self._model = model
        self._inverses = {inverse.param.name: inverse for inverse in trace.inverses}
        self._specs = {spec.name: spec for spec in (*trace.params, *(i.param for i in trace.inverses))}
        self._committed = committed
        self._live = dict(live_tensors(model))
        self._packed = dict(packed_params(model, trace))
        self._views = {param: plain(view) for view, param in detached_views(model)}
        self._last: tuple[str, Readable] | None = None

    def manifest(self, described: RankManifest) -> RankManifest:
        """`described` with the tensors that can be computed back, in the dtype that a function of them is stored in."""
        dtypes = {h.tensor: i.param.dtype for i in self._inverses.values() for h in i.holdings}
        return replace(
            described,
            tensors=tuple(
                replace(spec, dtype=dtypes.get(spec.name, spec.dtype)) for spec in described.tensors
            ),
            params=(*described.params, *(i.param for i in self._inverses.values())),
            holdings=(*described.holdings, *(h for i in self._inverses.values() for h in i.holdings)),
            misc=tuple(reason for reason in described.misc if reason.tensor not in dtypes),
        )

    def param(self, name: str) -> Readable:
        """The parameter of that ParamSpec name. Raises Unreadable with the reason."""
        if self._last is not None and self._last[0] == name:
            return self._last[1]
        found = self._read(name)
        if found.kind != PLAIN:
            self._last = (name, found)
        return found

    def _read(self, name: str) -> Readable:
        spec, live = self._specs[name], plain(self._live[name])
        if name in self._packed and not live.numel():
            return Readable(THROUGH_KERNEL, self._through_kernel(name))
        if name in self._views:
            return Readable(PLAIN, self._of_view(name))
        module = self._model.get_submodule(name.rpartition(".")[0])
        if is_prepacked(module, name.rpartition(".")[2]):
            return Readable(REORDERED, self._reordered(name, module))
        if tuple(live.shape) != spec.shape or live.dtype != getattr(torch, spec.dtype):
            raise Unreadable(f"{name} is {live.dtype} {tuple(live.shape)} in memory, it was loaded as {spec}")
        self._require_as_loaded(name, module)
        if name in self._inverses:
            return Readable(INVERTED, self._inverted(name, live))
        if name in self._packed and spec.num_elements * spec.shape[1] <= MAX_SHADOW_MACS:
            used = self._through_kernel(name)
            if not torch.equal(used, live + 0):
                return Readable(SHADOWED, used)
        return Readable(PLAIN, live)

    def _through_kernel(self, name: str) -> torch.Tensor:
        spec = self._specs[name]
        tensor = read_packed(self._packed[name], spec.shape, getattr(torch, spec.dtype))
        if tensor is None:
            raise Unreadable(
                f"{name} of shape {spec.shape} is packed by its kernel, and too large to be read through it"
            )
        return tensor

    def _inverted(self, name: str, live: torch.Tensor) -> torch.Tensor:
        inverse = self._inverses[name]
        found = undo(inverse.steps, live)
        if found is None:
            tensor, steps = inverse.holdings[0].tensor, " of ".join(reversed(inverse.steps))
            raise Unreadable(
                f"{name} stores {steps} of {tensor}, and some elements are that of no finite {inverse.param.dtype}"
            )
        return found

    def _of_view(self, name: str) -> torch.Tensor:
        """What the kernel reads where a buffer was made as a view of the parameter, in the loader's shape."""
        spec, view = self._specs[name], self._views[name]
        if (
            view.storage_offset()
            or view.numel() != spec.num_elements
            or view.dtype != getattr(torch, spec.dtype)
        ):
            raise Unreadable(
                f"{name}: its kernel reads another buffer, {view.dtype} {tuple(view.shape)}, not {spec}"
            )
        return view.as_strided(spec.shape, contiguous_strides(spec.shape))

    def _reordered(self, name: str, module: torch.nn.Module) -> torch.Tensor:
        tensor = unpacked(module, name.rpartition(".")[2], self._specs[name].shape)
        committed = self._committed
        if committed is not None and name in committed.live:
            live = whole_digest(plain(self._live[name]))
            if live == committed.live[name] and whole_digest(tensor) != committed.loaded.params[name]:
                raise Unreadable(f"{name}: undoing the kernel's permutation does not give what was staged")
        return tensor

    def _require_as_loaded(self, name: str, module: torch.nn.Module) -> None:
        """Raise Unreadable unless processing is known to have left this parameter's bytes as they were loaded."""
        committed = self._committed
        if committed is not None and name in committed.loaded.params:
            if name not in committed.plain:
                raise Unreadable(
                    f"{name} was changed by vLLM's processing in a way that is not known how to undo"
                )
            return
        method = getattr(module, "quant_method", None)  # norms, convolutions and the like have none
        if method is None or isinstance(method, _LEAVES_WEIGHTS) or _decodes_at_use(module):
            return
        raise Unreadable(
            f"{name} was processed by {type(method).__name__} after loading, and no refit has shown what that changes; "
            "refit this engine once"
        )


def _decodes_at_use(module: torch.nn.Module) -> bool:
    """Whether a quantized layer computes with what was loaded, decoded at each use (`cpu_quantized`)."""
    from refit.gen_side import cpu_quantized

    method = module.quant_method
    kernels = (cpu_quantized.DecodingBlockKernel, cpu_quantized.DecodingMxfp8Kernel)
    held = [value for value in vars(method).values() if isinstance(value, kernels)]
    return isinstance(method, cpu_quantized.DecodingFp8Experts) or bool(held)

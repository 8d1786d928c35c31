"""A worker that refits adapters alone: its base stays as loaded, each version is a new adapter of vLLM's live LoRA.

Written for vLLM 0.31. The transaction is that of `refit.gen_side.engine`: a version is staged as plain tensors beside
the adapter that serves, and becomes the adapter to be served with the coordinator's decision. vLLM drops all loaded
adapters at the end of every update, whatever came of it, so the worker then loads the committed one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from refit.gen_side.engine import Ready, RefitWeightTransferEngine
from refit.gen_side.live.audit import AuditReport, Committed, Loaded
from refit.gen_side.loader.hf_index import HfShapes, read_hf_shapes
from refit.gen_side.staging import CommitReport, StagingError
from refit.plan.manifest import Holding, ParamSpec, RankManifest, TensorSpec
from refit.plan.naming import peft_names
from refit.plan.region import Region
from refit.transfer.digest import whole_digest
from refit.transfer.memory import dtype_name
from refit.transfer.reading import PLAIN, Holder, Memory, Readable, Reads, Unreadable

OPTIONS_KEY = "refit_lora"  # in vLLM's additional_config: the fields of LoraSpec
_PARTS = ("tensors", "params", "holdings")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """Adapters of strength `alpha / rank` on every HF tensor `<...>.<module>.weight`."""

    rank: int
    alpha: float
    modules: tuple[str, ...]

    def tensors(self, base: HfShapes, dtype: str) -> tuple[TensorSpec, ...]:
        """The adapter's tensors for the checkpoint `base`."""
        found = []
        for name, (shape, _) in base.items():
            if name.removesuffix(".weight").rpartition(".")[2] in self.modules:
                name_a, name_b = peft_names(name)
                found.append(TensorSpec(name_a, (self.rank, shape[1]), dtype))
                found.append(TensorSpec(name_b, (shape[0], self.rank), dtype))
        return tuple(found)


def request_of(version: int) -> LoRARequest:
    """What requests name to be served by the adapter of `version`.

    Name, id and path are the version's own: vLLM keys cached prefixes by name and path. The path is read by nobody.
    """
    return LoRARequest(f"refit-v{version}", version, f"refit://adapter/v{version}")


@dataclass(slots=True)
class AdapterStaging:
    """One version of the adapter on its way. Open until `commit` or `discard`."""

    specs: dict[str, TensorSpec]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    state: str = "open"

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def params(self) -> dict[str, torch.Tensor]:
        """Where bulk would arrive, by ParamSpec name; adapters come by broadcast and leave it as it is."""
        return {
            name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
            for name, spec in self.specs.items()
        }

    def load_misc(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Keep copies. Raises StagingError for a tensor that this engine's adapters do not have, or that is missing."""
        for name, tensor in weights:
            if name not in self.specs or tuple(tensor.shape) != self.specs[name].shape:
                wanted = self.specs[name].shape if name in self.specs else "no such tensor"
                raise StagingError(
                    f"adapter tensor {name} came as {tuple(tensor.shape)}; this engine has {wanted}: build both "
                    "with one policy.lora_rank and policy.lora_targets"
                )
            self.tensors[name] = tensor.clone()  # what came lies in a receive buffer
        missing = sorted(self.specs.keys() - self.tensors.keys())
        if missing:
            raise StagingError(f"{len(missing)} adapter tensors did not come, {missing[0]} first")

    def pack_ahead(self) -> None:
        """An adapter is given to vLLM at the commit."""

    def commit(self) -> None:
        self.state = "committed"

    def discard(self) -> None:
        self.state, self.tensors = "discarded", {}


class AdapterMemory:
    """The base as it lives, and the adapter that vLLM was given. `changed`: which of vLLM's slots are no longer it."""

    def __init__(
        self,
        base: Memory,
        held: RankManifest,
        adapter: Mapping[str, torch.Tensor],
        changed: Callable[[], tuple[str, ...]],
    ) -> None:
        self._base = base
        self._held = held
        self._adapter = adapter
        self._changed = changed

    def manifest(self, described: RankManifest) -> RankManifest:
        base = self._base.manifest(described)
        parts = {part: (*getattr(base, part), *getattr(self._held, part)) for part in _PARTS}
        return replace(base, **parts)

    def param(self, name: str) -> Readable:
        if name not in self._adapter:
            return self._base.param(name)
        changed = self._changed()
        if changed:
            raise Unreadable(f"vLLM's slots no longer hold the adapter that it was given, {changed[0]} first")
        return Readable(PLAIN, self._adapter[name])


class AdapterReads(Reads):
    """Reads of a worker whose memory is more than its base: `wider` makes the one of the other."""

    def __init__(self, wider: Callable[[Memory], Memory]) -> None:
        super().__init__()
        self._wider = wider

    def answer(self, info: Mapping[str, Any], holder: Holder) -> None:
        super().answer(info, replace(holder, memory=lambda: self._wider(holder.memory())))


class RefitAdapterEngine(RefitWeightTransferEngine):
    """The weight transfer backend `refit-lora`."""

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._spec = LoraSpec(**vllm_config.additional_config[OPTIONS_KEY])
        self._specs: dict[str, TensorSpec] = {}
        self._adapter: dict[str, torch.Tensor] = {}
        self._loaded: dict[str, int] = {}
        self._lora: Any = None
        self._held: RankManifest | None = None
        self._reads = AdapterReads(self._with_adapter)

    def load_adapter(self, lora_manager: Any) -> None:
        """Give vLLM the adapter committed last, if there is one. Raises nothing: see `status`."""
        self._lora = lora_manager
        if self._adapter:
            self._run("load adapter", self._load)

    def _load(self) -> None:
        version, lora_config = self._version, self.vllm_config.lora_config
        assert version is not None, "an adapter that was committed has a version"
        try:
            model = LoRAModel.from_lora_tensors(
                version,
                # vLLM multiplies B by alpha / rank in place
                {name: tensor.clone() for name, tensor in self._adapter.items()},
                PEFTHelper(
                    r=self._spec.rank, lora_alpha=self._spec.alpha, target_modules=[*self._spec.modules]
                ),
                device="cpu",
                dtype=lora_config.lora_dtype,
            )
            manager = self._lora._adapter_manager
            manager.add_adapter(model)
            manager.activate_adapter(version)
        except Exception as error:
            self._broken = f"adapter version {version} could not be loaded: {error}"
            raise
        self._loaded = self._slots()

    def _slots(self) -> dict[str, int]:
        """A digest of every live factor in vLLM's slots, by module."""
        return {
            f"{name}.{number}.{part}": whole_digest(stack)
            for name, module in self._lora._adapter_manager.modules.items()
            for part, stacks in (("A", module.lora_a_stacked), ("B", module.lora_b_stacked))
            for number, stack in enumerate(stacks)
        }

    def _manifest(self, gen_rank: int, stage: int, replica: int) -> RankManifest:
        dtype = dtype_name(self.vllm_config.lora_config.lora_dtype)
        tensors = self._spec.tensors(read_hf_shapes(self.model_config.model), dtype)
        self._specs = {spec.name: spec for spec in tensors}
        params = tuple(ParamSpec(spec.name, spec.shape, spec.dtype) for spec in tensors)
        holdings = tuple(
            Holding(spec.name, Region.whole(spec.shape), spec.name, 0, (spec.shape[1], 1)) for spec in tensors
        )
        self._held = RankManifest("gen", gen_rank, stage, replica, tensors, params, holdings, ())
        return self._held

    def _with_adapter(self, base: Memory) -> Memory:
        """The adapter can be read too, once there is one."""
        if self._held is None or not self._adapter:
            return base
        return AdapterMemory(base, self._held, self._adapter, self._changed_slots)

    def _new_staging(self) -> AdapterStaging:
        return AdapterStaging(self._specs)

    def _observe(self, staging: AdapterStaging) -> Loaded:  # noqa: ARG002 - the signature is the base's
        """Nothing: vLLM processes nothing here, and an audit reads the committed adapter itself."""
        return Loaded({}, {}, {}, {})

    def _commit(self, staging: AdapterStaging) -> CommitReport:
        started_s = time.perf_counter()
        staging.commit()
        self._adapter = staging.tensors
        return CommitReport(tuple(staging.tensors), (), (), (), time.perf_counter() - started_s)

    def _seal(self, staging: AdapterStaging, ready: Ready) -> Committed:  # noqa: ARG002 - so is this one
        """Nothing to look at: see `_observe`."""
        return Committed(ready.loaded, frozenset(), {})

    def _audited(self) -> AuditReport:
        """Digests of the adapter that vLLM was given, and which of vLLM's slots have changed since."""
        if not self._adapter:
            return AuditReport({}, {}, (), 0, 0, 0)
        digests = {name: whole_digest(tensor) for name, tensor in self._adapter.items()}
        hashes = {name: f"{value:016x}" for name, value in self._slots().items()}
        return AuditReport(digests, hashes, self._changed_slots(), len(digests), 0, 0)

    def _changed_slots(self) -> tuple[str, ...]:
        return tuple(sorted(name for name, value in self._slots().items() if value != self._loaded[name]))

"""Adapters alone as what a trainer offers: PEFT names, two tensors for every HF tensor that has an adapter.

Every worker of every engine needs all of them whole, since vLLM cuts adapters by itself: they go by broadcast.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor

from refit.plan import MiscReason, RankManifest, TensorSpec
from refit.plan.naming import canonical, peft_names
from refit.train_side import cpu_compat
from refit.train_side.build import BuiltModel
from refit.train_side.lora.peft import Adapter
from refit.train_side.lowering.model import LoweredModel, names_made_by, param_name
from refit.transfer.memory import dtype_name

WHY_MISC = "adapters go whole to every worker, whose vLLM cuts them"


class AdapterTrainer:
    """A `WeightSource`. `export` is collective over the trainers."""

    def __init__(
        self, model: BuiltModel, lowered: LoweredModel, adapters: tuple[Adapter, ...], rank: int
    ) -> None:
        self.rank = rank
        self._model = model
        self._lowered = lowered
        self._adapters = {adapter.param: adapter for adapter in adapters}

    def describe(self) -> RankManifest:
        """The adapters of this rank's layers: A [rank, inputs] and B [outputs, rank] by PEFT name, held by nobody."""
        tensors: dict[str, TensorSpec] = {}
        for task in self._lowered.own_tasks():
            adapter = self._adapters.get(param_name(task))
            if adapter is not None:
                tensors |= {spec.name: spec for spec in self._specs(task, adapter)}
        misc = tuple(MiscReason(name, WHY_MISC) for name in sorted(tensors))
        specs = tuple(tensors[name] for name in sorted(tensors))
        return RankManifest("train", self.rank, self._lowered.stage, 0, specs, (), (), misc)

    def params(self) -> dict[str, Tensor]:
        """Nothing is sent point to point."""
        return {}

    def export(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Whole factors by PEFT name, by Bridge's own gathers; all, or those named."""
        wanted = None if names is None else set(names)
        stream = self._model.bridge.export_adapter_weights(self._model.chunks, cpu=False, show_progress=False)
        for name, factor in cpu_compat.stepwise(iter(stream)):
            peft_name = f"base_model.model.{name}"
            if wanted is None or peft_name in wanted:
                yield peft_name, factor.detach()

    def _specs(self, task: Any, adapter: Adapter) -> Iterator[TensorSpec]:
        dtype = dtype_name(adapter.factors[0].weight.dtype)
        for name in names_made_by(task, self._lowered.num_experts):
            if canonical(name)[1] is not None:
                raise NotImplementedError(f"{name}: adapters of experts can be refitted merged only")
            outputs, inputs = self._lowered.hf_shapes[name]
            name_a, name_b = peft_names(name)
            yield TensorSpec(name_a, (adapter.rank, inputs), dtype)
            yield TensorSpec(name_b, (outputs, adapter.rank), dtype)

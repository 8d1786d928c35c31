"""A live Megatron model described in HF names: Bridge's conversion tasks, read and not run.

`LoweredModel.prepare` asks Bridge once for its tasks (one per parameter of any pipeline stage; collective over
the pipeline). After that a manifest costs no collective and allocates nothing of a tensor's size: rules turn
shapes into holdings. What has no rule, or what Bridge changes on the way out, is misc, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from refit.plan import (
    Holding,
    MiscReason,
    ParamSpec,
    RankManifest,
    TensorSpec,
    canonical,
    coalesce_holdings,
    hf_name,
)
from refit.train_side.build import BuiltModel
from refit.train_side.hf_folder import quick_lookups, tensor_shapes
from refit.train_side.lowering.copies import find_copies
from refit.train_side.lowering.export_changes import refuse_changes
from refit.train_side.lowering.fp8_params import (
    block_param,
    is_block_param,
    param_specs,
    parts_of,
    plain_memory,
    scale_holdings,
)
from refit.train_side.lowering.gtp import is_shard, local_param
from refit.train_side.lowering.pieces import CannotLowerError, HfTensor, LocalParam, holdings_of
from refit.train_side.lowering.rules import Subject, rules
from refit.transfer.memory import dtype_name
from refit.transfer.precision.fp8 import FP8_BLOCK
from refit.transfer.precision.scheme import Scheme

type Kinds = dict[tuple[type, str], str]


class StaleTasksError(RuntimeError):
    """A parameter is no longer the one that was described: build the description again."""


@dataclass(frozen=True, slots=True)
class LoweredModel:
    """The tasks of one rank's chunks and the shapes of the HF tensors that the whole model makes.

    `tasks` has every task of every stage in Bridge's order, equal on all ranks of a pipeline. `copies` gives
    the originals of HF tensors that are copies. `layouts` has what each of this rank's own parameters looked
    like, `not_plain` why some of them cannot be lowered.
    """

    model_dir: Path
    stage: int
    tasks: tuple[Any, ...]
    hf_shapes: Mapping[str, tuple[int, ...]]
    copies: Mapping[str, str]
    num_experts: int
    layouts: Mapping[str, tuple[Any, ...]]
    not_plain: Mapping[str, str]

    @classmethod
    def prepare(cls, model: BuiltModel, model_dir: str | Path) -> LoweredModel:
        """Collective over the pipeline stages. HF shapes come from the headers of the checkpoint.

        Raises ValueError if a parameter makes an HF tensor that the checkpoint does not have.
        """
        from megatron.core import parallel_state
        from megatron.core.utils import get_model_config

        model_bridge, pretrained = model.bridge._model_bridge, model.bridge.hf_pretrained
        with quick_lookups(pretrained):
            listed = model_bridge.build_conversion_tasks(pretrained, model.chunks)
        tasks = tuple(task for task in listed if task is not None)
        num_experts = get_model_config(model.chunks[0]).num_moe_experts or 0
        in_folder = tensor_shapes(Path(model_dir))
        made = {name for task in tasks for name in names_made_by(task, num_experts)}
        own = [task for task in tasks if task.param_weight is not None]
        missing = {name for task in own for name in _hf_names(task)} - set(in_folder)
        if missing:
            raise ValueError(f"the model makes HF tensors that {model_dir} does not have: {sorted(missing)}")
        copies = find_copies(in_folder, made)
        hf_shapes = {name: shape for name, shape in in_folder.items() if name in made or name in copies}
        return cls(
            model_dir=Path(model_dir),
            stage=parallel_state.get_pipeline_model_parallel_rank(),
            tasks=tasks,
            hf_shapes=hf_shapes,
            copies=copies,
            num_experts=num_experts,
            layouts={param_name(task): _layout(task.param_weight) for task in own},
            not_plain=_not_plain(model_bridge, own, hf_shapes, pretrained.state),
        )

    def own_tasks(self) -> Iterator[Any]:
        """The tasks whose parameter this rank stores."""
        return (task for task in self.tasks if task.param_weight is not None)

    def tasks_for(self, names: set[str] | None) -> list[Any]:
        """The tasks that make one of `names` (None: all), in an order equal on every rank."""
        if names is None:
            return list(self.tasks)
        originals = {self.copies.get(name, name) for name in names}
        return [task for task in self.tasks if originals & set(names_made_by(task, self.num_experts))]

    def copies_of(self, name: str) -> tuple[str, ...]:
        """The HF tensors that are copies of `name`."""
        return tuple(copy for copy, original in self.copies.items() if original == name)

    def weights(self) -> dict[str, Tensor]:
        """This rank's parameters by name. Raises StaleTasksError if one is not the one that was prepared."""
        return {param_name(task): self._live(task) for task in self.own_tasks()}

    def live_params(self) -> dict[str, Tensor]:
        """The memory of `weights` by the names of the manifest's params."""
        found: dict[str, Tensor] = {}
        for name, weight in self.weights().items():
            found |= plain_memory(name, weight)
        return found

    def manifest(self, rank: int, scheme: Scheme = MappingProxyType({})) -> RankManifest:
        """What this rank holds. No collective; cost is linear in its number of parameters.

        A tensor that engines store in FP8, as `scheme` says, and this rank in the same blocks, is held as its parts.
        """
        params: list[ParamSpec] = []
        holdings: list[Holding] = []
        misc: dict[str, str] = {}
        tensors: dict[str, TensorSpec] = {}
        kinds: dict[tuple[type, str], str] = {}
        for task in self.own_tasks():
            weight = self._live(task)
            params += param_specs(plain_memory(param_name(task), weight))
            names = [canonical(name)[0] for name in _hf_names(task)]
            specs = [TensorSpec(name, self._shape(name), dtype_name(weight.dtype)) for name in names]
            try:
                if is_block_param(weight) and all(scheme.get(name) == FP8_BLOCK.name for name in names):
                    holdings += self._lower_blocks(task, weight, kinds)
                    specs = [part for spec in specs for part in parts_of(spec)]
                else:
                    holdings += self._lower(task, weight, kinds)
            except CannotLowerError as error:
                misc |= dict.fromkeys(names, str(error))
            tensors |= {spec.name: spec for spec in specs}
        for copy, original in self.copies.items():
            if original in tensors:
                tensors[copy] = replace(tensors[original], name=copy)
                if original in misc:
                    misc[copy] = misc[original]
                holdings += [replace(h, tensor=copy) for h in holdings if h.tensor == original]
        return RankManifest(
            side="train",
            rank=rank,
            stage=self.stage,
            replica=0,
            tensors=tuple(tensors[name] for name in sorted(tensors)),
            params=tuple(params),
            holdings=coalesce_holdings(holding for holding in holdings if holding.tensor not in misc),
            misc=tuple(MiscReason(name, misc[name]) for name in sorted(misc)),
        )

    def _shape(self, name: str) -> tuple[int, ...]:
        """Shape of a canonical tensor: experts are stacked in front."""
        if name in self.hf_shapes:
            return self.hf_shapes[name]
        return (self.num_experts, *self.hf_shapes[hf_name(name, 0)])

    def _tensor(self, name: str) -> HfTensor:
        tensor_name, expert = canonical(name)
        return HfTensor(tensor_name, self.hf_shapes[name], expert)

    def _lower(self, task: Any, weight: Tensor, kinds: Kinds) -> list[Holding]:
        if is_block_param(weight):
            raise CannotLowerError(
                f"{param_name(task)} is stored in FP8 blocks, which these engines do not store"
            )
        return list(self._boxes(task, local_param(param_name(task), weight), kinds))

    def _lower_blocks(self, task: Any, weight: Tensor, kinds: Kinds) -> list[Holding]:
        """Holdings of elements, and of their scales."""
        name = param_name(task)
        blocks = block_param(name, weight)
        elements = LocalParam.whole(name, tuple(blocks.elements.shape), blocks.elements.stride())
        holdings = coalesce_holdings(self._boxes(task, elements, kinds))
        return [*holdings, *scale_holdings(name, blocks, holdings, self._shape)]

    def _boxes(self, task: Any, param: LocalParam, kinds: Kinds) -> Iterator[Holding]:
        if param.name in self.not_plain:
            raise CannotLowerError(self.not_plain[param.name])
        rule = rules().get(type(task.mapping))
        if rule is None:
            raise CannotLowerError(f"Bridge's {type(task.mapping).__name__} has no lowering rule")
        config = task.mapping._get_config(task.megatron_module)
        subject = Subject(task.mapping, task.megatron_module, config, param, self._tensor, kinds)
        yield from holdings_of(param, rule(subject))

    def _live(self, task: Any) -> Tensor:
        """The parameter as its module has it now, proven to be the one that was prepared."""
        name = param_name(task)
        weight = getattr(task.megatron_module, task.param_name.rpartition(".")[2])
        if weight is not task.param_weight or _layout(weight) != self.layouts[name]:
            raise StaleTasksError(
                f"parameter {name} was re-created since the description was prepared "
                f"(prepared {self.layouts[name][1:]}, now {_layout(weight)[1:]}): "
                "build the trainer's description again and prepare the refit anew"
            )
        return weight


def param_name(task: Any) -> str:
    """Stable name of a parameter on its rank: virtual pipeline chunk and Megatron's local name."""
    return f"chunk{task.vp_stage}/{task.param_name}"


def names_made_by(task: Any, num_experts: int) -> tuple[str, ...]:
    """HF names that exporting `task` yields: its own, and for an expert those of its peers on EP ranks."""
    own = _hf_names(task)
    if not task.mapping.is_expert or task.mapping.ep_size == 1:
        return own
    per_rank = num_experts // task.mapping.ep_size
    return tuple(name for template in own for name in _expert_peers(template, per_rank, num_experts))


def _hf_names(task: Any) -> tuple[str, ...]:
    hf_param = task.mapping.hf_param
    return (hf_param,) if isinstance(hf_param, str) else tuple(hf_param.values())


def _expert_peers(template: str, per_rank: int, num_experts: int) -> Iterator[str]:
    """HF names of the experts with the same local number on every EP rank; a fused tensor is its own peer."""
    name, expert = canonical(template)
    if expert is None:
        yield template
    else:
        yield from (hf_name(name, peer) for peer in range(expert % per_rank, num_experts, per_rank))


def _layout(weight: Tensor) -> tuple[Any, ...]:
    return id(weight), tuple(weight.shape), weight.stride(), weight.dtype


def _not_plain(
    model_bridge: Any,
    tasks: list[Any],
    hf_shapes: Mapping[str, tuple[int, ...]],
    state: Mapping[str, Any],
) -> dict[str, str]:
    """Why a parameter's memory does not hold the exported values themselves, by parameter name."""
    reasons = {}
    for task in tasks:
        try:
            plain = type(task.param_weight) in (Tensor, torch.nn.Parameter)
            if not plain and not is_shard(task.param_weight) and not is_block_param(task.param_weight):
                kind = type(task.param_weight).__name__
                raise CannotLowerError(f"{param_name(task)} is stored as {kind}")
            shapes = {name: hf_shapes[name] for name in _hf_names(task)}
            refuse_changes(model_bridge, task, shapes, state)
        except CannotLowerError as error:
            reasons[param_name(task)] = str(error)
    return reasons

"""A live Megatron model described in HF names: Bridge's conversion tasks, read and not run.

`LoweredModel.prepare` asks Bridge once for its tasks (one per parameter of any pipeline stage; collective over
the pipeline). After that a manifest costs no collective and allocates nothing of a tensor's size: rules turn
shapes into holdings. What has no rule, or what Bridge changes on the way out, is misc, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
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
)
from refit.train_side.build import BuiltModel
from refit.train_side.hf_folder import tensor_shapes
from refit.train_side.pieces import CannotLowerError, HfTensor, LocalParam, holdings_of
from refit.train_side.rules import Subject, rules


class StaleTasksError(RuntimeError):
    """A parameter is no longer the one that was described: build the description again."""


@dataclass(slots=True)
class LoweredModel:
    """The tasks of one rank's chunks and the shapes of the HF tensors that the whole model makes.

    `tasks` has every task of every stage in Bridge's order, equal on all ranks of a pipeline; those with a
    `param_weight` are this rank's own.
    """

    model_dir: Path
    bridge: Any
    stage: int
    tasks: list[Any]
    hf_shapes: dict[str, tuple[int, ...]]
    num_experts: int
    _layouts: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    @classmethod
    def prepare(cls, model: BuiltModel, model_dir: str | Path) -> LoweredModel:
        """Collective over the pipeline stages. Reads the headers of the checkpoint for the HF shapes."""
        from megatron.core import parallel_state

        tasks = [task for task in model.bridge.get_conversion_tasks(model.chunks) if task is not None]
        config = _config(model.chunks[0])
        lowered = cls(
            model_dir=Path(model_dir),
            bridge=model.bridge,
            stage=parallel_state.get_pipeline_model_parallel_rank(),
            tasks=tasks,
            hf_shapes={},
            num_experts=config.num_moe_experts or 0,
        )
        in_folder = tensor_shapes(Path(model_dir))
        made = {name for task in tasks for name in lowered.names_made_by(task)}
        lowered.hf_shapes = {name: shape for name, shape in in_folder.items() if name in made}
        for task in lowered.own_tasks():
            lowered._layouts[param_name(task)] = _layout(task)
        return lowered

    def own_tasks(self) -> Iterator[Any]:
        """The tasks whose parameter this rank stores."""
        return (task for task in self.tasks if task.param_weight is not None)

    def names_made_by(self, task: Any) -> tuple[str, ...]:
        """HF names that exporting `task` yields: its own, and for an expert those of its peers on EP ranks."""
        hf_param = task.mapping.hf_param
        own = (hf_param,) if isinstance(hf_param, str) else tuple(hf_param.values())
        if not task.mapping.is_expert or task.mapping.ep_size == 1:
            return own
        per_rank = self.num_experts // task.mapping.ep_size
        return tuple(name for template in own for name in _expert_peers(template, per_rank, self.num_experts))

    def tasks_for(self, names: set[str] | None) -> list[Any]:
        """The tasks that make one of `names` (None: all), in an order equal on every rank."""
        if names is None:
            return list(self.tasks)
        return [task for task in self.tasks if names & set(self.names_made_by(task))]

    def live_params(self) -> dict[str, Tensor]:
        """This rank's parameters by name. Raises StaleTasksError if one is not the one that was prepared."""
        return {param_name(task): _live(task, self._layouts) for task in self.own_tasks()}

    def manifest(self, rank: int) -> RankManifest:
        """What this rank holds. No collective; cost is linear in its number of parameters."""
        params: list[ParamSpec] = []
        holdings: list[Holding] = []
        misc: dict[str, str] = {}
        dtypes: dict[str, str] = {}
        for task in self.own_tasks():
            weight = _live(task, self._layouts)
            dtype = str(weight.dtype).removeprefix("torch.")
            params.append(ParamSpec(param_name(task), tuple(weight.shape), dtype))
            names = {canonical(name)[0]: dtype for name in self._own_names(task)}
            dtypes |= names
            try:
                holdings.extend(self._lower(task, weight))
            except CannotLowerError as error:
                misc |= dict.fromkeys(names, str(error))
        return RankManifest(
            side="train",
            rank=rank,
            stage=self.stage,
            replica=0,
            tensors=tuple(TensorSpec(name, self._shape(name), dtypes[name]) for name in sorted(dtypes)),
            params=tuple(params),
            holdings=coalesce_holdings(holding for holding in holdings if holding.tensor not in misc),
            misc=tuple(MiscReason(name, misc[name]) for name in sorted(misc)),
        )

    def _own_names(self, task: Any) -> tuple[str, ...]:
        hf_param = task.mapping.hf_param
        names = (hf_param,) if isinstance(hf_param, str) else tuple(hf_param.values())
        missing = [name for name in names if name not in self.hf_shapes]
        if missing:
            raise CannotLowerError(f"{param_name(task)}: the checkpoint has no tensors {missing}")
        return names

    def _shape(self, name: str) -> tuple[int, ...]:
        """Shape of a canonical tensor: experts are stacked in front."""
        if name in self.hf_shapes:
            return self.hf_shapes[name]
        return (self.num_experts, *self.hf_shapes[name.replace("experts.*.", "experts.0.", 1)])

    def _tensor(self, hf_name: str) -> HfTensor:
        name, expert = canonical(hf_name)
        return HfTensor(name, self.hf_shapes[hf_name], expert)

    def _lower(self, task: Any, weight: Tensor) -> Iterator[Holding]:
        _check_plain(task, weight)
        rule = rules().get(type(task.mapping))
        if rule is None:
            raise CannotLowerError(f"Bridge's {type(task.mapping).__name__} has no lowering rule")
        param = LocalParam.whole(param_name(task), tuple(weight.shape), weight.stride())
        config = task.mapping._get_config(task.megatron_module)
        subject = Subject(task.mapping, task.megatron_module, config, param, self._tensor)
        return holdings_of(param, rule(subject))


def param_name(task: Any) -> str:
    """Stable name of a parameter on its rank: virtual pipeline chunk and Megatron's local name."""
    return f"chunk{task.vp_stage}/{task.param_name}"


def _expert_peers(template: str, per_rank: int, num_experts: int) -> Iterator[str]:
    """HF names of the experts with the same local number on every EP rank; a fused tensor is its own peer."""
    name, expert = canonical(template)
    if expert is None:
        yield template
        return
    for peer in range(expert % per_rank, num_experts, per_rank):
        yield name.replace("experts.*.", f"experts.{peer}.", 1)


def _config(chunk: Any) -> Any:
    from megatron.core.utils import get_model_config

    return get_model_config(chunk)


def _layout(task: Any) -> tuple[Any, ...]:
    weight = task.param_weight
    return id(weight), tuple(weight.shape), weight.stride(), weight.dtype


def _live(task: Any, layouts: dict[str, tuple[Any, ...]]) -> Tensor:
    """The parameter as its module has it now, proven to be the one that was prepared."""
    name = param_name(task)
    weight = getattr(task.megatron_module, task.param_name.rpartition(".")[2])
    if weight is not task.param_weight or _layout(task) != layouts[name]:
        raise StaleTasksError(
            f"parameter {name} was re-created since the description was prepared "
            f"(now {tuple(weight.shape)} {weight.dtype}, prepared {layouts[name][1]} {layouts[name][3]}): "
            "call LoweredModel.prepare again and prepare the refit anew"
        )
    return weight


def _check_plain(task: Any, weight: Tensor) -> None:
    """Only memory that holds the exported values themselves can be lowered."""
    if type(weight) not in (Tensor, torch.nn.Parameter):
        raise CannotLowerError(f"{param_name(task)} is stored as {type(weight).__name__}")
    if task.export_hook is not None:
        raise CannotLowerError(f"{param_name(task)} has an export hook")

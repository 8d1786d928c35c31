"""What Bridge does to a tensor after its mapping: found out by running the bridge's own hook on meta tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from refit.train_side.lowering.pieces import CannotLowerError


def refuse_changes(
    model_bridge: Any, task: Any, shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Any]
) -> None:
    """Raise CannotLowerError unless `task`'s HF tensors leave Bridge as their mapping makes them.

    `shapes` are the tensors that the task makes; `state` is the checkpoint, which a hook may look into.
    """
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge

    if task.export_hook is not None:
        raise CannotLowerError(f"{task.global_param_name} has an export hook")
    unchanged = MegatronModelBridge.maybe_modify_converted_hf_weight
    if type(model_bridge).maybe_modify_converted_hf_weight is unchanged:
        return
    probes = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    kept = model_bridge.maybe_modify_converted_hf_weight(task, dict(probes), state)
    for name, probe in probes.items():
        if kept.get(name) is not probe:
            raise CannotLowerError(f"{type(model_bridge).__name__} changes {name} on export")

"""The one gate: every setting that cannot work is refused here, all at once, before any actor starts.

Each entry point calls `check`. The rules are in the files beside this one.
"""

from __future__ import annotations

import importlib.util
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refit.plan.errors import ConfigError
from refit.service.config import JobConfig
from refit.service.gate import layouts
from refit.service.gate.delta import deltas
from refit.service.gate.lora import lora
from refit.service.gate.model import read_facts
from refit.service.gate.precision import precisions
from refit.service.gate.rules import RULES, Case, Environment, sizes
from refit.train_side.tiny_models import TINY_MODELS

CONNECT_TIMEOUT_S = 10.0


def check(config: JobConfig, model_config: Mapping[str, Any] | None, environment: Environment) -> None:
    """Raise ConfigError listing every violation; return if the job can start.

    `model_config` is what `read_model_config` found; None stands for a folder without a readable config.
    """
    case = _case(config, model_config, environment)
    rules = (*RULES, layouts.stages, layouts.experts, precisions, lora, deltas)
    found = list(sizes(case)) or [violation for rule in rules for violation in rule(case)]
    if found:
        lines = "".join(f"\n  - {violation}" for violation in found)
        word = "setting" if len(found) == 1 else "settings"
        raise ConfigError(f"{len(found)} {word} cannot work; nothing was started{lines}")


def _case(config: JobConfig, model_config: Mapping[str, Any] | None, environment: Environment) -> Case:
    if model_config is None:
        return Case(config, None, environment)
    try:
        return Case(config, read_facts(model_config), environment)
    except ConfigError as error:
        return Case(config, None, environment, unknown=str(error))


def read_model_config(model: str) -> dict[str, Any] | None:
    """The HF config of a tiny model by name, or of a folder; None if there is no readable config.json."""
    if model in TINY_MODELS:
        return dict(TINY_MODELS[model]({}).to_dict())
    try:
        found = json.loads((Path(model) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return dict(found) if isinstance(found, dict) else None


def inspect_machine(config: JobConfig) -> Environment:
    """Ask this machine: free memory, CUDA devices, whether the port can be bound, and whether the cluster answers."""
    import psutil  # type: ignore[import-untyped]
    import torch

    port = config.cluster.port
    taken = (port,) if 0 < port < 2**16 and not _can_bind(port) else ()
    return Environment(
        int(psutil.virtual_memory().available),
        torch.cuda.device_count(),
        taken,
        cluster_answers=config.cluster.address is None or answers(config.cluster.address),
        has_nixl=importlib.util.find_spec("nixl") is not None,
    )


def answers(address: str) -> bool:
    """Whether somebody listens at "[ray://]host:port". Ray itself would try for minutes. "auto" is left to Ray."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return address == "auto"
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError):
        return False
    return True


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True

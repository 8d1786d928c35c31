"""vLLM's way in: the entry point `vllm.general_plugins`, called in every process that vLLM starts."""

from __future__ import annotations

BACKEND = "refit"


def register() -> None:
    """Make `WeightTransferConfig(backend="refit")` known. Calling it again changes nothing."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "refit.gen_side.engine", "RefitWeightTransferEngine"
        )

"""vLLM's way in: the entry point `vllm.general_plugins`, called in every process that vLLM starts."""

from __future__ import annotations

BACKEND = "refit"
ADAPTER_BACKEND = "refit-lora"


def register() -> None:
    """Make `WeightTransferConfig(backend="refit")` and "refit-lora" known, on a CPU also quantized checkpoints.

    Calling it again changes nothing.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "refit.gen_side.engine", "RefitWeightTransferEngine"
        )
        WeightTransferEngineFactory.register_engine(
            ADAPTER_BACKEND, "refit.gen_side.lora", "RefitAdapterEngine"
        )
        if current_platform.is_cpu():
            from refit.gen_side import cpu_quantized

            cpu_quantized.register()

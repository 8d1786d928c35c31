"""What every vLLM worker can be asked beside vLLM's own calls, through `worker_extension_cls` (vLLM 0.31)."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch


class RefitWorker:
    """Mixed into vLLM's worker class by vLLM itself; reached with `collective_rpc("refit_...")`."""

    def refit_status(self) -> dict[str, Any]:
        """What `RefitWeightTransferEngine.status` says of this worker; "state" is serving, staging or broken."""
        return self.weight_transfer_engine.status()

    def refit_finish(self, attempt: int, commit: bool, adapters: bool) -> dict[str, Any]:
        """vLLM's `finish_weight_update` with the decision on `attempt` at hand, and then the status, in one call.

        The device is idle before, as vLLM wants it in a pause. `adapters`: load the adapter too, see below.
        """
        self.synchronize_device()
        self.weight_transfer_engine.decide(attempt, commit)
        self.finish_weight_update()
        if adapters:
            self.refit_load_adapter()
        return self.weight_transfer_engine.status()

    def refit_receiving(self) -> bool:
        """Whether anything of a refit still goes on in the background of this worker."""
        return self.weight_transfer_engine.receiving()

    def refit_load_rest(self) -> None:
        """Go on with a receive in the background: misc, then packing and the report, in the background again."""
        self.weight_transfer_engine.load_rest()

    def refit_load_adapter(self) -> None:
        """Let vLLM serve the adapter that was committed last; it drops adapters at the end of every update."""
        self.weight_transfer_engine.load_adapter(self.model_runner.lora_manager)

    def refit_prepare_pipeline(self) -> None:
        """See `prepare_pipeline`."""
        prepare_pipeline(self.model_runner)

    def refit_describe(self) -> tuple[Any, ...]:
        """The fields of WorkerFacts: where this worker stands, and which switches are on in its live configuration."""
        from refit.gen_side.live.configuration import worker_facts

        return astuple(worker_facts(self.vllm_config))

    def refit_flip_element(self, param: str, index: int, worker: int | None = None) -> bool:
        """Fault injection for validation: flip one bit of one live element of `worker`, or of every worker.

        True if this worker did it.

        A weight that the kernel keeps packed is flipped by packing a flipped copy, through vLLM's own processing.
        """
        from vllm.distributed import get_world_group

        from refit.gen_side.live.packed import packed_modules, read_packed

        if worker not in (None, get_world_group().rank_in_group):
            return False
        self.weight_transfer_engine.settle()  # else the flipped element would pass for what was committed
        model = self.model_runner.get_model()
        modules = dict(model.named_modules())
        packed = dict(packed_modules(model))
        module = modules.get(param.rpartition(".")[0])
        name = param.rpartition(".")[2]
        if module is None or name not in {**module._parameters, **module._buffers}:
            return False
        live = module._parameters.get(name, module._buffers.get(name))
        if live.numel():
            _flip(live.data, index)
        elif param in packed:
            spec = self.weight_transfer_engine.param_spec(param)
            weight = read_packed(module, spec.shape, getattr(torch, spec.dtype))
            _flip(weight, index)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
            module.quant_method.process_weights_after_loading(module)
        else:
            return False
        return True


def prepare_pipeline(runner: Any) -> None:
    """The one workaround for PP > 1 on the CPU: vLLM makes this buffer in a dummy run that eager mode skips.

    Later stages receive activations into it; without it their first step asserts. Elsewhere this is a no-op, since
    the buffer exists.
    """
    from vllm.distributed import get_pp_group

    if get_pp_group().is_first_rank or runner.intermediate_tensors is not None:
        return
    runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
        batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
    )


def _flip(tensor: torch.Tensor, index: int) -> None:
    """Flip the lowest bit of one element: the smallest change there is."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    flat = tensor.view(bits).view(-1)
    flat[index] = flat[index] ^ 1

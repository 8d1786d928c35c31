"""The rule of the gate for delta refits."""

from __future__ import annotations

from collections.abc import Iterator

from refit.service.gate.rules import Case, Violation
from refit.transfer.protocol import CUDA_IPC, GOLDEN


def deltas(case: Case) -> Iterator[Violation]:
    """A delta compares parcels of bulk in host memory with those of the last refit."""
    policy, refit = case.config.policy, case.config.refit
    if not refit.delta:
        return
    on_gpu = refit.backend == "nccl" or refit.transport == CUDA_IPC or not case.on_cpu
    unfit = (
        (not policy.nccl_xfer_refit, "without bulk nothing is compared", "add +policy.nccl_xfer_refit=true"),
        (policy.sends_adapters, "adapters go by broadcast and are no bulk", "use policy.lora_refit=merged"),
        (refit.bulk == GOLDEN, "the golden path sends full tensors", "use refit.bulk=p2p"),
        (on_gpu, "it compares weights in host memory, and here they are on GPUs", "use gloo without CUDA"),
    )
    for is_so, problem, remedy in unfit:
        if is_so:
            yield Violation("refit.delta", True, problem, f"Leave it out, or {remedy}")

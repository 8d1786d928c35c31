"""The policy that learns: one trainer rank's handle on a real Megatron model, its optimizer, its export."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from refit.plan import RankManifest
from refit.train_side import build, checkpoint, cpu_compat
from refit.train_side.batch import TrainBatch
from refit.train_side.lora import peft
from refit.train_side.lora.adapters import AdapterTrainer
from refit.train_side.lora.fold import Fold
from refit.train_side.lowering.model import LoweredModel
from refit.train_side.microbatches import Microbatch, response_span, split_batch
from refit.train_side.options import TrainOptions, TrainParallel
from refit.train_side.steps import Forward, run_schedule
from refit.transfer.precision.scheme import Scheme


class PolicyTrainer:
    """One rank of the trainers. Every method except `describe`, `params` and `rank` is collective over them.

    The optimizer is Megatron's own (Adam on float32 masters, gradients summed over data parallel ranks in
    float32, clipped by global norm). The initial weights stay as a second, frozen model: the reference.

    With LoRA the reference is the policy itself, its adapters switched off. What is described, given and exported
    are folded weights: base and adapter in one.
    """

    def __init__(
        self,
        policy: build.BuiltModel,
        reference: build.BuiltModel | None,
        optimizer: Any,
        description: LoweredModel,
        fold: Fold | None,
        options: TrainOptions,
        rank: int,
    ) -> None:
        self.rank = rank
        self._policy = policy
        self._reference = reference
        self._optimizer = optimizer
        self._description = description
        self._fold = fold
        self._options = options

    @classmethod
    def build(
        cls,
        model_dir: str | Path,
        parallel: TrainParallel,
        options: TrainOptions,
        rank: int,
        world_size: int,
        init_address: str,
        timeout_s: float,
    ) -> PolicyTrainer:
        """Join the trainers at `init_address` ("127.0.0.1:port") and load the HF checkpoint in `model_dir`.

        Every later collective of the trainers fails after `timeout_s`. Raises ValueError if `parallel` does
        not need exactly `world_size` ranks.
        """
        build.open_process_groups(parallel, rank, world_size, init_address, timeout_s)
        build.seed_everything(options.seed)
        policy = build.build_model(model_dir, parallel, options, trainable=True)
        reference, fold = None, None
        if options.lora is None:
            reference = build.build_model(model_dir, parallel, options, trainable=False)
        with cpu_compat.cpu_megatron():
            optimizer = _make_optimizer(policy, options)
            description = LoweredModel.prepare(policy, model_dir)
        if options.lora is not None:
            fold = Fold.of(policy.chunks, getattr(torch, options.lora.engine_dtype), description.layouts)
        return cls(policy, reference, optimizer, description, fold, options, rank)

    def logprobs(self, batch: TrainBatch) -> list[list[float]]:
        """Log-probability of every response token of the global batch under the current policy."""
        return self._logprobs(self._policy, batch)

    def reference_logprobs(self, batch: TrainBatch) -> list[list[float]]:
        """The same under the frozen initial policy."""
        with self._as_reference() as model:
            return self._logprobs(model, batch)

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[build.BuiltModel]:
        if self._reference is not None:
            yield self._reference
        else:
            with peft.switched_off(self._policy.chunks):
                yield self._policy

    def _logprobs(self, model: build.BuiltModel, batch: TrainBatch) -> list[list[float]]:
        microbatches = self._split(batch)
        found = run_schedule(model, Forward.logprobs(model, microbatches))
        shape = batch.num_samples, microbatches[0].length
        values = torch.zeros(shape, dtype=torch.float32, device=cpu_compat.compute_device())
        if _contributes():
            for microbatch, part in zip(microbatches, found, strict=True):
                for row, sample in enumerate(microbatch.sample_index):
                    if sample >= 0:
                        values[sample] = part[row]
        dist.all_reduce(values)  # exactly one rank filled each row
        return [values[i, response_span(batch, i)].tolist() for i in range(batch.num_samples)]

    def train_step(self, batch: TrainBatch) -> dict[str, float]:
        """One optimizer step on the global batch.

        Returns token means over the batch: `loss`, `kl_to_reference` (k3), `clip_fraction`; and `grad_norm`
        (before clipping), `lr`. Raises FloatingPointError if the gradient norm is not finite: the weights are
        then unusable.
        """
        microbatches = self._split(batch)
        with self._as_reference() as model:
            reference = run_schedule(model, Forward.logprobs(model, microbatches))
        with cpu_compat.cpu_megatron():
            for chunk in self._policy.chunks:
                chunk.zero_grad_buffer()
            self._optimizer.zero_grad()
        forward = Forward.losses(self._policy, microbatches, reference, self._options)
        sums = run_schedule(self._policy, forward)
        with cpu_compat.cpu_megatron():
            stepped, grad_norm, _ = self._optimizer.step()
        if not stepped or not math.isfinite(grad_norm):
            raise FloatingPointError(f"gradient norm is {grad_norm} on trainer rank {self.rank}")
        nothing = torch.zeros(3, device=cpu_compat.compute_device())
        total = torch.stack(sums).sum(0) if _contributes() else nothing
        dist.all_reduce(total)
        loss, kl, clipped = (total / batch.num_response_tokens).tolist()
        return {
            "loss": loss,
            "kl_to_reference": kl,
            "grad_norm": float(grad_norm),
            "clip_fraction": clipped,
            "lr": self._options.lr,
        }

    def _split(self, batch: TrainBatch) -> tuple[Microbatch, ...]:
        from megatron.core import parallel_state

        microbatches = split_batch(
            batch,
            self._options.num_microbatches,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        return tuple(microbatch.to(cpu_compat.compute_device()) for microbatch in microbatches)

    def describe(self, scheme: Scheme = MappingProxyType({})) -> RankManifest:
        """What this rank holds, in HF names. No collective, nothing of a tensor's size is allocated.

        `scheme` says which tensors engines store in FP8: those that this rank stores alike are held as their parts.

        Raises StaleTasks if a parameter was re-created since `build`.
        """
        if self._fold is None:
            return self._description.manifest(self.rank, scheme)
        return self._fold.manifest(self._description.manifest(self.rank))  # folded weights are in no blocks

    def params(self) -> dict[str, Tensor]:
        """This rank's live parameters by the names of `describe().params`; same check as `describe`.

        With LoRA collective, and the weights that have adapters are folded ones, in memory of their own.
        """
        live = self._description.live_params()
        return live if self._fold is None else live | self._fold.weights(live)

    def export(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Full HF tensors by Bridge's own gathers, vocabulary padding cut off; all of them, or those named.

        Collective: every trainer rank iterates to the end, in the same order, with the same `names`. A tensor
        is only valid until the next step. Raises KeyError for a name that the model does not have.
        """
        return checkpoint.export(self._policy, self._description, names, self._fold)

    def adapters(self) -> AdapterTrainer:
        """What a refit of the adapters alone is sent by."""
        if self._fold is None:
            raise ValueError("this policy has no adapters: give TrainOptions.lora")
        return AdapterTrainer(self._policy, self._description, self._fold.adapters, self.rank)

    def export_blocks(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """The parts of tensors that the ranks store in FP8 blocks, gathered as they are. Collective like `export`."""
        return checkpoint.export_blocks(self._policy, self._description, names)

    def save(self, path: str | Path) -> None:
        """Write an HF checkpoint (config.json and safetensors) of the current weights."""
        checkpoint.save(self.export(None), self._description.model_dir, Path(path), self.rank)

    def close(self) -> None:
        """Leave the process groups. The trainer cannot be used afterwards; safe to call twice."""
        build.close_process_groups()


def _contributes() -> bool:
    """True on the one rank of each model replica whose results count: last stage, first tensor rank."""
    from megatron.core import parallel_state

    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
    )


def _make_optimizer(policy: build.BuiltModel, options: TrainOptions) -> Any:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.utils import get_model_config

    # The schedules call it: sums gradients over data ranks and tied embeddings, divides by response tokens.
    get_model_config(policy.chunks[0]).finalize_model_grads_func = finalize_model_grads
    config = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_betas[0],
        adam_beta2=options.adam_betas[1],
        bf16=options.precision == "bf16",
        params_dtype=torch.bfloat16 if options.precision == "bf16" else torch.float32,
        clip_grad=options.max_grad_norm,
        use_distributed_optimizer=False,
    )
    return get_megatron_optimizer(config, policy.chunks, use_gloo_process_groups=False)

"""What one trainer process with LoRA adapters does in a test. Called as f(rank, world_size, address, ...)."""

import hashlib

from refit.plan import encode_rank_manifest
from refit.train_side.options import LoraOptions, TrainOptions
from tests.train_side.ranks import TIMEOUT_S, bytes_of, first_misplaced, sample_batch

LORA = LoraOptions(rank=8, alpha=16.0, engine_dtype="float32")


def build(rank, world_size, address, folder, parallel, lora=LORA, **options):
    from refit.train_side.policy import PolicyTrainer

    options = TrainOptions(lora=lora, **options)
    return PolicyTrainer.build(folder, parallel, options, rank, world_size, address, TIMEOUT_S)


def steps(rank, world_size, address, folder, parallel, num_steps, options):
    """`num_steps` optimizer steps: what they report, and what the trainer sends then."""
    trainer = build(rank, world_size, address, folder, parallel, **options)
    batch = sample_batch()
    base = _hashes(trainer)
    before = trainer.logprobs(batch)
    reports = [trainer.train_step(batch) for _ in range(num_steps)]
    exported = {name: weight.clone() for name, weight in trainer.export()}
    result = {
        "before": before,
        "reference": trainer.reference_logprobs(batch),
        "steps": reports,
        "after": trainer.logprobs(batch),
        "exported": {name: weight.float().numpy() for name, weight in exported.items()},
        "misplaced": first_misplaced(trainer, exported),
        "base_is_as_it_was": base == _hashes(trainer),
        "manifest": encode_rank_manifest(trainer.describe()),
    }
    trainer.close()
    return result


def _hashes(trainer):
    live = trainer._description.live_params()
    return {name: hashlib.sha256(bytes_of(param.detach())).hexdigest() for name, param in live.items()}


def drawn(rank, world_size, address, folder, parallel):
    """This rank's A factors, each with the layer's name in the whole model, its place in its group and its cut.

    Each rank starts from a random state of its own, as it does on CUDA.
    """
    from unittest import mock

    import torch
    from megatron.bridge.models.conversion.model_bridge import _megatron_local_name_to_global

    from refit.train_side import build as builds
    from refit.train_side.lora.peft import adapters

    own_state = mock.patch.object(builds, "seed_everything", lambda seed: torch.manual_seed(seed + 1 + rank))
    with own_state:
        trainer = build(rank, world_size, address, folder, parallel)
    chunks, found = trainer._policy.chunks, {}
    for adapter in adapters(chunks):
        weight = adapter.factors[0].weight
        local = adapter.param.partition("/")[2]
        name = _megatron_local_name_to_global(chunks, chunks[0].module.config, local, 0)
        found[name] = adapter.group.rank(), weight.partition_dim, weight.detach().float().numpy()
        assert not adapter.factors[1].weight.any(), f"{name}: B is not zero"
    live = trainer._description.live_params()
    for name, weight in trainer.params().items():
        assert torch.equal(weight.float(), live[name].float()), f"{name}: a fresh adapter changes it"
    trainer.close()
    return found


def handed_out(rank, world_size, address):
    """A factor that ranks 1 and 2 hold whole, and one that is cut between them along each dim, drawn anew by both."""
    import torch
    import torch.distributed as dist

    from refit.train_side.lora.peft import hand_out

    dist.init_process_group("gloo", init_method=f"tcp://{address}", rank=rank, world_size=world_size)
    group = dist.new_group([1, 2])
    results = []
    for dim in (None, 0, 1) if rank else ():
        weight = torch.nn.Parameter(torch.zeros(2, 3))
        weight.tensor_model_parallel, weight.partition_dim = dim is not None, dim
        hand_out(
            weight,
            group,
            lambda shape: torch.arange(12.0)[: _size(shape)].view(shape) + rank,
        )
        results.append(weight.tolist())
    dist.destroy_process_group()
    return results


def _size(shape):
    return shape[0] * shape[1]


def against_bridge(rank, world_size, address, folder, parallel):
    """The largest distance of folded weights, in units of their own rounding, to what Bridge merges by itself."""
    import torch

    from refit.train_side import cpu_compat

    trainer = build(rank, world_size, address, folder, parallel, precision="fp32", lr=1e-2)
    for _ in range(2):
        trainer.train_step(sample_batch())
    ours = {name: weight.clone() for name, weight in trainer.export()}
    policy = trainer._policy
    theirs = policy.bridge.export_hf_weights(policy.chunks, show_progress=False)
    worst, moved = 0.0, 0
    for name, merged in cpu_compat.stepwise(iter(theirs)):
        mine = ours[name].float()
        merged = merged[: mine.shape[0]].float()
        one = torch.finfo(torch.float32).eps * merged.abs().amax()
        worst = max(worst, ((mine - merged).abs().amax() / one).item())
    reference = dict(trainer._description.live_params())
    moved = sum(
        not torch.equal(param.float(), reference[name].float()) for name, param in trainer.params().items()
    )
    trainer.close()
    return {"worst": worst, "moved": moved, "names": len(ours)}


def misfits(rank, world_size, address, folder):
    """What is said on TP2 when a factor does not have the shape of its layer: too few rows of A, two wrong Bs."""
    import torch

    from refit.train_side.options import TrainParallel

    trainer = build(rank, world_size, address, folder, TrainParallel(tensor=2))
    said = []
    for layer, number, shape in (
        ("linear_qkv", 0, (3, 128)),
        ("linear_proj", 1, (100, 8)),
        ("linear_qkv", 1, (128, 4)),
    ):
        adapter = next(adapter for adapter in trainer._fold.adapters if layer in adapter.param)
        factor = adapter.factors[number]
        right, factor.weight = factor.weight, torch.nn.Parameter(torch.zeros(shape))
        try:
            trainer.params()
        except ValueError as error:
            said.append(str(error))
        factor.weight = right
    try:
        type(trainer._fold).of(trainer._policy.chunks, torch.float32, ())
    except ValueError as error:
        said.append(str(error))
    trainer.close()
    return said


def reductions(rank, world_size, address, folder):
    """(in a forward pass of all, in a backward pass of one QKV layer): all-reduces on TP2, with adapters on and off."""
    from unittest import mock

    import torch

    from refit.train_side import cpu_compat
    from refit.train_side.lora.peft import adapters
    from refit.train_side.options import TrainParallel
    from refit.train_side.steps import Forward, run_schedule

    trainer = build(rank, world_size, address, folder, TrainParallel(tensor=2), precision="fp32")
    policy, microbatches = trainer._policy, trainer._split(sample_batch())
    x = torch.ones(5, 1, 128, requires_grad=True)
    found = {}
    for switched in ("on", "off"):
        for adapter in adapters(policy.chunks):
            adapter.wrapper._adapter_enabled = switched == "on"
        with mock.patch.object(torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce) as reduce:
            run_schedule(policy, Forward.logprobs(policy, microbatches))
            forward = reduce.call_count
            qkv = next(a.wrapper for a in adapters(policy.chunks) if "qkv" in a.param)
            with cpu_compat.cpu_megatron():
                qkv(x)[0].sum().backward()
        found[switched] = forward, reduce.call_count - forward
    trainer.close()
    return found


def adapters_alone(rank, world_size, address, folder, parallel):
    """What a trainer of adapters offers after two steps; the largest error of base + (alpha / r) B A by tensor."""
    from pathlib import Path

    from safetensors.torch import load_file

    from refit.plan.naming import peft_names

    trainer = build(rank, world_size, address, folder, parallel, precision="fp32", lr=1e-2)
    for _ in range(2):
        trainer.train_step(sample_batch())
    offer = trainer.adapters()
    factors = {name: factor.clone() for name, factor in offer.export()}
    whole = {name: weight.clone() for name, weight in trainer.export()}
    base, errors = load_file(Path(folder) / "model.safetensors"), {}
    for name, weight in whole.items():
        lora_a, lora_b = (factors.get(factor) for factor in peft_names(name))
        if lora_a is not None:
            folded = base[name].float() + LORA.alpha / LORA.rank * lora_b @ lora_a
            errors[name] = (folded - weight).abs().max().item()
    some = sorted(factors)[:3]
    result = {
        "manifest": encode_rank_manifest(offer.describe()),
        "exported": {name: tuple(factor.shape) for name, factor in factors.items()},
        "errors": errors,
        "named": sorted(name for name, _ in offer.export(some)) == some,
        "params": offer.params(),
    }
    trainer.close()
    return result

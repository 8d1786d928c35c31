"""What one trainer process does in a test. Every function is called as f(rank, world_size, address, ...)."""

import random
import tracemalloc
import zlib
from pathlib import Path

from refit.plan import Holding, canonical, encode_rank_manifest
from refit.train_side.batch import TrainBatch
from refit.train_side.lowering.copies import find_copies
from refit.train_side.options import TrainOptions, TrainParallel

TIMEOUT_S = 60.0
LARGEST_EXACT_FLOAT32 = 1 << 24


def make_checkpoint(rank, world_size, address, name, folder, coded, overrides):
    """A tiny checkpoint. `coded`: float32, and each element is its own address, counted through the tensors."""
    import torch
    from safetensors.torch import load_file, save_file

    from refit.train_side.tiny_models import make_tiny_model

    make_tiny_model(name, folder, dtype="float32" if coded else "bfloat16", overrides=overrides)
    if coded:
        file = Path(folder) / "model.safetensors"
        weights = load_file(file)
        first = 0
        for key in sorted(weights):
            size = weights[key].numel()
            weights[key] = torch.arange(first, first + size, dtype=torch.float32).reshape(weights[key].shape)
            first += size
        assert first < LARGEST_EXACT_FLOAT32, f"{first} addresses are not exact in float32"
        shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
        outside_layers = {key for key in shapes if ".layers." not in key}
        for copy, original in find_copies(shapes, outside_layers).items():
            weights[copy] = weights[original].clone()
        save_file(weights, file, metadata={"format": "pt"})


def build(rank, world_size, address, folder, parallel, **options):
    from refit.train_side.policy import PolicyTrainer

    return PolicyTrainer.build(
        folder, parallel, TrainOptions(**options), rank, world_size, address, TIMEOUT_S
    )


def view(trainer, holding: Holding):
    """The memory that a holding names."""
    import torch

    param = trainer.params()[holding.param].detach()
    return torch.as_strided(
        param, holding.region.shape, holding.strides, param.storage_offset() + holding.offset
    )


def first_misplaced(trainer, weights):
    """The first element of this rank's holdings that is not the full tensor's element there, or None.

    `weights` are full tensors by HF name. For coded weights the found value is the address it came from.
    """
    import torch

    for holding in trainer.describe().holdings:
        tensor = stacked(weights, holding.tensor)
        box = tuple(
            slice(*bounds) for bounds in zip(holding.region.starts, holding.region.stops, strict=True)
        )
        wrong = (view(trainer, holding) != tensor[box]).nonzero()
        if wrong.numel():
            at = tuple(wrong[0].tolist())
            where = tuple(map(sum, zip(at, holding.region.starts, strict=True)))
            found, wanted = view(trainer, holding)[at].item(), tensor[box][at].item()
            return f"{holding.tensor}{list(where)} in {holding.param}: {found}, should be {wanted}"
        assert torch.equal(view(trainer, holding), tensor[box])
    return None


def stacked(weights, tensor_name):
    import torch

    if "experts.*." not in tensor_name:
        return weights[tensor_name]
    experts = {}
    for name, weight in weights.items():
        found, expert = canonical(name)
        if found == tensor_name:
            experts[expert] = weight
    return torch.stack([experts[expert] for expert in range(len(experts))])


def address_truth(rank, world_size, address, folder, parallel):
    """Load coded weights; compare the file, Bridge's export and this rank's holdings element for element."""
    import torch
    from safetensors.torch import load_file

    trainer = build(rank, world_size, address, folder, parallel, precision="fp32")
    weights = load_file(Path(folder) / "model.safetensors")
    exported = {name: weight.clone() for name, weight in trainer.export()}
    result = {
        "manifest": encode_rank_manifest(trainer.describe()),
        "exported": sorted(exported),
        "file": sorted(weights),
        "export_differs": [n for n, w in exported.items() if not torch.equal(w, weights[n])],
        "misplaced": first_misplaced(trainer, exported),
        "params_agree": {(s.name, s.shape, f"torch.{s.dtype}") for s in trainer.describe().params}
        == {(name, tuple(p.shape), str(p.dtype)) for name, p in trainer.params().items()},
    }
    trainer.close()
    return result


def sample_batch(num_samples=24, seed=0):
    """Ragged random prompts and responses; old logprobs of a uniform policy."""
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(256) for _ in range(rng.randrange(3, 12))) for _ in range(num_samples)]
    responses = [tuple(rng.randrange(256) for _ in range(rng.randrange(1, 13))) for _ in range(num_samples)]
    return TrainBatch(
        tuple(prompts),
        tuple(responses),
        tuple((-5.55,) * len(response) for response in responses),
        tuple(rng.gauss(0, 1) for _ in range(num_samples)),
    )


def two_steps(rank, world_size, address, folder, parallel, options):
    """Two optimizer steps; what they report, and whether holdings still are what Bridge exports."""
    trainer = build(rank, world_size, address, folder, parallel, **options)
    batch = sample_batch()
    before = trainer.logprobs(batch)
    steps = [trainer.train_step(batch) for _ in range(2)]
    exported = {name: weight.clone() for name, weight in trainer.export()}
    result = {
        "before": before,
        "steps": steps,
        "after": trainer.logprobs(batch),
        "reference": trainer.reference_logprobs(batch),
        "misplaced": first_misplaced(trainer, exported),
        "sums": {name: weight.double().sum().item() for name, weight in exported.items()},
        "bits": {name: zlib.crc32(bytes_of(weight)) for name, weight in exported.items()},
    }
    trainer.close()
    return result


def against_transformers(rank, world_size, address, folder, parallel, saved):
    """Train one step, save, and compare the policy's log-probabilities with transformers on the saved weights."""
    import torch
    from transformers import AutoModelForCausalLM

    trainer = build(rank, world_size, address, folder, parallel, lr=1e-3)
    batch = sample_batch()
    trainer.train_step(batch)
    trainer.save(saved)
    ours = trainer.logprobs(batch)
    trainer.close()
    if rank != 0:
        return None
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    deltas = []
    with torch.no_grad():
        for prompt, response, found in zip(batch.prompts, batch.responses, ours, strict=True):
            scores = model(torch.tensor([prompt + response])).logits[0].float().log_softmax(-1)
            theirs = [scores[len(prompt) - 1 + i, token].item() for i, token in enumerate(response)]
            deltas.extend(a - b for a, b in zip(theirs, found, strict=True))
    delta = torch.tensor(deltas, dtype=torch.float64)
    return {"k3": (delta.exp() - delta - 1).mean().item(), "max": delta.abs().max().item()}


def partial_export(rank, world_size, address, folder, parallel, names):
    """The named tensors alone, and the error for a name that does not exist."""
    trainer = build(rank, world_size, address, folder, parallel)
    some = {name: tuple(weight.shape) for name, weight in trainer.export(names)}
    try:
        list(trainer.export(["model.layers.99.mlp.up_proj.weight"]))
        error = None
    except KeyError as caught:
        error = str(caught)
    trainer.close()
    return some, error


def describe_cost(rank, world_size, address, folder):
    """Bytes of the model, peak bytes Python allocates in describe(), and the tensor operations it runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    operations = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operations.append(str(func))
            return func(*args, **(kwargs or {}))

    trainer = build(rank, world_size, address, folder, TrainParallel(tensor=world_size))
    num_bytes = sum(param.numel() * param.element_size() for param in trainer.params().values())
    trainer.describe()
    tracemalloc.start()
    with Watch():
        trainer.describe()
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    trainer.close()
    return {"model_bytes": num_bytes, "peak_bytes": peak_bytes, "operations": operations}


def stale_params(rank, world_size, address, folder):
    """Re-create one parameter, then ask for the description and the parameters."""
    import torch

    trainer = build(rank, world_size, address, folder, TrainParallel())
    module = trainer._policy.chunks[0].module.module.decoder.final_layernorm
    module.weight = torch.nn.Parameter(module.weight.detach().clone())
    errors = []
    for ask in (trainer.describe, trainer.params):
        try:
            ask()
        except RuntimeError as error:
            errors.append(f"{type(error).__name__}: {error}")
    trainer.close()
    return errors


def unknown_mappings(rank, world_size, address, folder):
    """A bridge with a mapping class of its own for down_proj, and a hook that changes o_proj."""
    from unittest import mock

    import torch

    from refit.train_side import cpu_compat

    cpu_compat.import_bridge()
    from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
    from megatron.bridge.models.conversion.param_mapping import AutoMapping
    from megatron.bridge.models.qwen.qwen3_bridge import Qwen3Bridge

    class DoubledMapping(AutoMapping):
        def megatron_to_hf(self, weights, module):
            return {name: 2 * weight for name, weight in super().megatron_to_hf(weights, module).items()}

    known = Qwen3Bridge.mapping_registry

    def registry(self):
        return MegatronMappingRegistry(
            *(
                DoubledMapping(mapping.megatron_param, mapping.hf_param)
                if str(mapping.hf_param).endswith("down_proj.weight")
                else mapping
                for mapping in known(self).get_all_mappings()
            )
        )

    def change(self, task, weights, state):
        return {name: w + 1 if name.endswith("o_proj.weight") else w for name, w in weights.items()}

    with (
        mock.patch.object(Qwen3Bridge, "mapping_registry", registry),
        mock.patch.object(Qwen3Bridge, "maybe_modify_converted_hf_weight", change),
    ):
        trainer = build(rank, world_size, address, folder, TrainParallel(), precision="fp32")
        manifest = trainer.describe()
        exported = {name: weight.clone() for name, weight in trainer.export()}
        trainer.close()
    one = "model.layers.0.mlp.down_proj.weight"
    param = trainer.params()["chunk0/decoder.layers.0.mlp.linear_fc2.weight"]
    return {
        "misc": {reason.tensor: reason.reason for reason in manifest.misc},
        "held": sorted({holding.tensor for holding in manifest.holdings}),
        "tensors": sorted(spec.name for spec in manifest.tensors),
        "export_is_doubled": torch.equal(exported[one], 2 * param),
    }


def cuda_requests(rank, world_size, address):
    """What CUDA requests give inside, between and after the scopes of `cpu_compat`."""
    import sys

    import torch

    from refit.train_side import cpu_compat

    cpu_compat.import_bridge()
    from megatron.core.extensions.transformer_engine import HAVE_TE

    with cpu_compat.cpu_megatron():
        inside = {
            "device": str(torch.cuda.current_device()),
            "made": str(torch.zeros(2, device="cuda").device),
            "moved": str(torch.zeros(2).cuda().device),
            "type": torch.zeros(2, dtype=torch.bfloat16).type(),
        }
    made, between = [], []
    for kind in cpu_compat.stepwise(torch.zeros(1).type() for _ in range(2)):
        made.append(kind)
        between.append(torch.zeros(1).type())
    return {
        "inside": inside | {"stepwise": made},
        "between_steps": between,
        "after": torch.zeros(2, dtype=torch.bfloat16).type(),
        "no_transformer_engine": not HAVE_TE and "transformer_engine" not in sys.modules,
    }


def bytes_of(weight):
    import torch

    return weight.contiguous().view(torch.uint8).numpy().tobytes()


def description_cost(rank, world_size, address, folder):
    """Processor seconds and bytes of describing a model that is built from a checkpoint of headers alone."""
    import time

    from refit.train_side import build, cpu_compat
    from refit.train_side.lowering.model import LoweredModel
    from refit.train_side.options import TrainOptions

    parallel = TrainParallel()
    build.open_process_groups(parallel, rank, world_size, address, TIMEOUT_S)
    bridge = cpu_compat.import_bridge().AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider(load_weights=False)
    build.configure(provider, parallel, TrainOptions())
    with cpu_compat.cpu_megatron():
        chunks = provider.provide_distributed_model(
            ddp_config=build._ddp_config(), wrap_with_ddp=False, use_cpu_initialization=True, bf16=True
        )
        started_s = time.process_time()
        lowered = LoweredModel.prepare(build.BuiltModel(bridge, chunks, provider.vocab_size), folder)
    prepared_s = time.process_time()
    manifest = lowered.manifest(0)
    text = encode_rank_manifest(manifest)
    return {
        "prepare_s": prepared_s - started_s,
        "describe_s": time.process_time() - prepared_s,
        "manifest_bytes": len(text),
        "num_params": len(manifest.params),
        "misc": manifest.misc,
    }


def rule_names(rank, world_size, address):
    """The names of Bridge's mapping classes that have a rule."""
    from refit.train_side import cpu_compat
    from refit.train_side.lowering import rules

    cpu_compat.import_bridge()
    return {kind.__name__: rule.__name__ for kind, rule in rules.rules().items()}


def fused_experts(rank, world_size, address):
    """Holdings of one expert's [rows, 3] cut by TP2, of fused HF tensors in both orientations; asserts all."""
    from types import SimpleNamespace

    import pytest

    from refit.train_side import cpu_compat
    from refit.train_side.lowering import rules
    from refit.train_side.lowering.pieces import CannotLowerError, HfTensor, LocalParam, holdings_of

    cpu_compat.import_bridge()

    def held(rule, local_shape, hf_shape, kind, transpose):
        mapping = SimpleNamespace(
            hf_param="t",
            tp_rank=1,
            tp_size=2,
            megatron_param="decoder.layers.0.mlp.experts.linear_fc1.weight3",
            transpose_on_export=transpose,
            _MODULE_TYPE_REGISTRY={},
            _detect_parallelism_type=lambda module: kind,
        )
        param = LocalParam.whole("p", local_shape, (local_shape[1], 1))
        subject = rules.Subject(mapping, None, None, param, lambda name: HfTensor(name, hf_shape, None))
        return [
            (h.region.starts, h.region.stops, h.offset, h.strides[1:])
            for h in holdings_of(param, rule(subject))
        ]

    gated, plain = rules.fused_gated_expert, rules.fused_expert
    # gate and up of TP rank 1: rows 2..4 and 6..8 of the fused 8; transposed they are columns
    assert held(gated, (4, 3), (5, 8, 3), "column", False) == [
        ((3, 2, 0), (4, 4, 3), 0, (3, 1)),
        ((3, 6, 0), (4, 8, 3), 6, (3, 1)),
    ]
    assert held(gated, (4, 3), (5, 3, 8), "column", True) == [
        ((3, 0, 2), (4, 3, 4), 0, (1, 3)),
        ((3, 0, 6), (4, 3, 8), 6, (1, 3)),
    ]
    assert held(plain, (3, 4), (5, 3, 8), "row", False) == [((3, 0, 4), (4, 3, 8), 0, (4, 1))]
    assert held(plain, (3, 4), (5, 8, 3), "row", True) == [((3, 4, 0), (4, 8, 3), 0, (1, 4))]
    for kind, hf_shape in (("row", (5, 8, 3)), ("column", (5, 4, 6))):
        with pytest.raises(CannotLowerError):  # it would fit transposed, which Bridge does not do here
            held(plain, (3, 4), hf_shape, kind, False)

"""What one trainer process does in a test of quantized refits. Every function is called as in `ranks`."""

from pathlib import Path

from refit.plan import canonical, encode_rank_manifest
from refit.train_side.options import TrainOptions, TrainParallel
from tests.train_side.ranks import TIMEOUT_S, build, bytes_of, stacked


def quantized_truth(rank, world_size, address, folder, parallel, form):
    """Twice, with weights that changed in between: quantized holdings against the whole export, quantized."""
    import torch

    from refit.train_side.hf_folder import tensor_shapes
    from refit.train_side.quantized import QuantizedTrainer

    trainer = build(rank, world_size, address, folder, parallel)
    scheme = {canonical(n)[0]: form for n in tensor_shapes(Path(folder)) if n.endswith("_proj.weight")}
    offer = QuantizedTrainer.prepare(trainer, scheme)
    wrong, num_compared = [], 0
    for _ in range(2):
        params = offer.params()
        whole = {name: value.clone() for name, value in offer.export()}
        for holding in offer.describe().holdings:
            param, region = params[holding.param].detach(), holding.region
            mine = torch.as_strided(
                param, region.shape, holding.strides, param.storage_offset() + holding.offset
            )
            box = tuple(map(slice, region.starts, region.stops))
            wanted = stacked(whole, holding.tensor)[box]
            if bytes_of(mine) != bytes_of(wanted):
                wrong.append(f"{holding.tensor} {region}")
            num_compared += 1
        with torch.no_grad():
            for param in trainer.params().values():
                param.detach().mul_(-1.5)
    names = [name for name in whole if name.endswith(("scale_inv", "weight_scale"))][:3]
    some = {name: tuple(value.shape) for name, value in offer.export(names)}
    result = {
        "wrong": wrong,
        "compared": num_compared,
        "agreed": offer._source.num_agreed,
        "some": sorted(some) == sorted(names),
        "misc": [reason.tensor for reason in offer.describe().misc],
        "manifest": encode_rank_manifest(offer.describe()),
    }
    trainer.close()
    return result


def quantized_refits(rank, world_size, address, folder, engine_folder):
    """Two refits from a job's own trainer actor to memory that stands for an engine of the quantized checkpoint."""
    import secrets
    from concurrent.futures import ThreadPoolExecutor

    import torch
    from safetensors.torch import load_file

    from refit.plan import PlanOptions
    from refit.service.actors import TrainActor
    from refit.service.agreement import Terms, agree_on_plan
    from refit.transfer.digest import MASK
    from refit.transfer.endpoint import Endpoint
    from refit.transfer.precision.checkpoint import quantize_checkpoint
    from refit.transfer.rendezvous import ControlStore
    from refit.transfer.slices import Slice
    from tests.gen_side.rounds import manifest_of

    quantize_checkpoint(folder, engine_folder, "fp8")
    actor = TrainActor(0, f"{engine_folder}.log")
    actor.build(str(folder), TrainParallel(), TrainOptions(), address, TIMEOUT_S, str(engine_folder))
    names = sorted(load_file(Path(engine_folder) / "model.safetensors"))
    on_disk = load_file(Path(engine_folder) / "model.safetensors")
    held = {
        name: torch.zeros_like(stacked(on_disk, name)) for name in sorted({canonical(n)[0] for n in names})
    }
    trained = manifest_of(held)
    manifest = type(trained)("gen", 0, 0, 0, trained.tensors, trained.params, trained.holdings, ())
    control = ControlStore.host(run_id=secrets.token_hex(4))
    store = f"127.0.0.1:{control.port}"
    terms = Terms(1, 1, PlanOptions(bucket_bytes=1 << 18), "gloo", "p2p", 2, TIMEOUT_S)
    with ThreadPoolExecutor(2) as pool:
        plan = pool.submit(agree_on_plan, control, terms)
        joined = ControlStore.join("127.0.0.1", control.port, control.run_id)
        endpoint = pool.submit(Endpoint.prepare, joined, manifest, TIMEOUT_S)
        actor.prepare_refit(store, control.run_id, TIMEOUT_S)
        plan, endpoint = plan.result(TIMEOUT_S), endpoint.result(TIMEOUT_S)
        wrong = []
        for version in (1, 2):
            receiving = pool.submit(_receive, endpoint, held, version)
            actor.refit(version, version)
            report = receiving.result(TIMEOUT_S)
            whole = {name: value.clone() for name, value in actor._offer.export()}
            if version == 1:
                wrong += [n for n in names if bytes_of(whole[n]) != bytes_of(on_disk[n])]
            wrong += [n for n in held if bytes_of(held[n]) != bytes_of(stacked(whole, n))]
            audited = actor.verify_digests()
            mine = {name: f"{by_rank[1]:016x}" for name, by_rank in report.digests.items()}
            wrong += [n for n in mine if audited[n]["1"] != mine[n]]
            parts = [Slice.of_message(each) for each in actor.slices({"1": list(mine)}, TIMEOUT_S)]
            sums = {n: sum(part.digest for part in parts if part.tensor == n) & MASK for n in mine}
            wrong += [n for n in mine if f"{sums[n]:016x}" != mine[n]]
            with torch.no_grad():
                for param in actor._policy.params().values():
                    param.detach().mul_(-1.5)
        endpoint.close()
    kinds = {tensor.name: tensor.kind for tensor in plan.tensors.values()}
    result = {"wrong": wrong, "kinds": kinds, "bytes": report.bytes_received}
    actor.close()
    joined.close()
    control.close()
    return result


def _receive(endpoint, held, version):
    endpoint.begin(version, version)
    endpoint.move_bulk(held)
    return endpoint.put_report()


def block_truth(rank, world_size, address, folder, parallel):
    """Twice: what a trainer with doubles of Transformer Engine's blocks holds and exports, against whole tensors."""
    from refit.train_side.bare import BareTrainer
    from refit.train_side.hf_folder import tensor_shapes
    from refit.train_side.quantized import QuantizedTrainer
    from refit.transfer.precision.scheme import quantized
    from refit.validation.te_double import BlockParamDouble, quantize_anew, store_in_blocks

    trainer = BareTrainer.build(folder, parallel, "bf16", rank, address, TIMEOUT_S, store_in_blocks)
    weights = trainer.weights()
    doubles = {name for name, weight in weights.items() if isinstance(weight, BlockParamDouble)}
    scheme = {canonical(n)[0]: "fp8" for n in tensor_shapes(Path(folder)) if n.endswith("_proj.weight")}
    offer = QuantizedTrainer.prepare(trainer, scheme)
    manifest, wrong, from_blocks = offer.describe(), [], set()
    for _ in range(2):
        params = offer.params()
        whole = dict(quantized([(n, t.clone()) for n, t in trainer.export()], scheme))
        exported = {name: value.clone() for name, value in offer.export()}
        wrong += [n for n in whole if n not in exported or bytes_of(exported[n]) != bytes_of(whole[n])]
        for holding in manifest.holdings:
            param, region = params[holding.param].detach(), holding.region
            mine = param.as_strided(region.shape, holding.strides, param.storage_offset() + holding.offset)
            wanted = stacked(whole, holding.tensor)[tuple(map(slice, region.starts, region.stops))]
            if bytes_of(mine) != bytes_of(wanted):
                wrong.append(f"{holding.tensor} {region}")
            if any(holding.param in (name, f"{name}._rowwise_scale_inv") for name in doubles):
                from_blocks.add(holding.tensor)
        trainer.change(lambda values: values * -1.5)
        quantize_anew(weights.values())
    result = {
        "wrong": wrong,
        "from_blocks": sorted(from_blocks),
        "misc": {reason.tensor: reason.reason for reason in manifest.misc},
        "bf16": {reason.tensor: reason.reason for reason in trainer.describe().misc},
        "manifest": encode_rank_manifest(manifest),
    }
    trainer.close()
    return result

"""Trainers that are not Megatron: plain modules and DTensors as sources of real refits between processes."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from refit.plan import Holding, ParamSpec, PlanOptions, RankManifest, Region, TensorSpec
from refit.transfer.endpoint import Endpoint
from refit.transfer.errors import TransportError
from refit.transfer.memory import DescribedParams
from refit.transfer.rendezvous import ControlStore
from refit.transfer.source import ModelSource, send_version
from tests.processes import Processes
from tests.transfer import coordinator

NUM_TRAIN, NUM_VERSIONS, NUM_EXPERTS = 2, 2, 3
WHITELIST = (r".*proj\.weight", r"embed\.weight")
WHOLE = {"embed.weight": (7, 6), "mlp.up_proj.weight": (5, 6), "norm.weight": (6,)}
STACKED = "mlp.experts.*.up_proj.weight"

pytestmark = pytest.mark.processes


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(6, 4, bias=False)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(6, 5, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(NUM_EXPERTS))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.mlp = Mlp()
        self.norm = nn.LayerNorm(6, bias=False)


def contents(version):
    """The whole model of a version by HF name; every element differs from every other and from other versions."""
    model, start = Model(), 1000.0 * version
    found = {}
    for name, param in model.named_parameters():
        found[name] = torch.arange(param.numel(), dtype=torch.float32).reshape(param.shape) + start
        start += param.numel()
    return found


def tensors_of(kind, mesh):
    """This trainer rank's tensors by HF name, before any version."""
    model = Model()
    if kind == "fsdp2":
        fully_shard(model.mlp, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if kind != "tp":
        return dict(model.named_parameters())
    cuts = {"embed.weight": Shard(0), "norm.weight": Replicate()}
    return {
        name: distribute_tensor(param.data, mesh, [cuts.get(name, Shard(1))])
        for name, param in model.named_parameters()
    }


def fill(tensors, version):
    for name, whole in contents(version).items():
        tensor = tensors[name].data
        if hasattr(tensor, "to_local"):
            tensor.to_local().copy_(
                distribute_tensor(whole, tensor.device_mesh, tensor.placements).to_local()
            )
        else:
            tensor.copy_(whole)


def rank_life(rank, port, trainers_port, kind):
    control = ControlStore.join("127.0.0.1", port, "source")
    if rank < NUM_TRAIN:
        store = dist.TCPStore("127.0.0.1", trainers_port, NUM_TRAIN, is_master=rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_TRAIN)
        tensors = tensors_of(kind, init_device_mesh("cpu", (NUM_TRAIN,)))
        source = ModelSource(tensors, rank)
        endpoint = Endpoint.prepare(control, source.describe(), 60.0)
        for version in range(1, NUM_VERSIONS + 1):
            fill(tensors, version)
            send_version(endpoint, source, version, version)
        control.get("received", 60.0)
        dist.destroy_process_group()
    else:
        manifest = receiver()
        endpoint = Endpoint.prepare(control, manifest, 60.0)
        for version in range(1, NUM_VERSIONS + 1):
            receive(endpoint, manifest, version)
        control.put("received", True)
    sizes = endpoint.plan.bulk_bytes, endpoint.plan.misc_bytes
    endpoint.close()
    return sizes


def receiver():
    """One generator rank that holds every tensor whole."""
    shapes = WHOLE | {STACKED: (NUM_EXPERTS, 4, 6)}
    params = {name: torch.empty(shape) for name, shape in shapes.items()}
    return RankManifest(
        "gen",
        0,
        0,
        0,
        tuple(TensorSpec(name, shape, "float32") for name, shape in shapes.items()),
        tuple(ParamSpec(name, shape, "float32") for name, shape in shapes.items()),
        tuple(Holding(name, Region.whole(shapes[name]), name, 0, params[name].stride()) for name in shapes),
        (),
    )


def receive(endpoint, manifest, version):
    params = {spec.name: torch.full(spec.shape, -1.0) for spec in manifest.params}
    endpoint.begin(version, version)
    endpoint.move_bulk(params)
    got = dict(endpoint.receive_misc())
    endpoint.put_report()
    expected = contents(version)
    experts = [expected.pop(f"mlp.experts.{number}.up_proj.weight") for number in range(NUM_EXPERTS)]
    assert torch.equal(params[STACKED], torch.stack(experts))
    assert list(got) == ["norm.weight"]
    for name, tensor in expected.items():
        assert torch.equal(got.get(name, params[name]), tensor), (name, version)


@pytest.mark.parametrize("kind", ["plain", "fsdp2", "tp"])
def test_a_model_of_plain_torch_or_dtensors_arrives_bit_for_bit(kind):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        trainers_port = probe.getsockname()[1]
    control = ControlStore.host(run_id="source")
    with Processes(rank_life, NUM_TRAIN + 1, (control.port, trainers_port, kind)) as processes:
        coordinator.prepare(control, NUM_TRAIN, 1, PlanOptions(whitelist=WHITELIST))
        for version in range(1, NUM_VERSIONS + 1):
            found = coordinator.reports(control, version, NUM_TRAIN + 1)
            coordinator.require_equal_digests(found, NUM_TRAIN)
            sent = [report.bytes_sent for report in found[:NUM_TRAIN]]
            assert min(sent) > 0, "both trainers hold a part, so both send"
        outcomes = processes.outcomes(60.0)
    control.close()
    assert all(outcome.returned for outcome in outcomes), [outcome.error for outcome in outcomes]
    assert {outcome.value for outcome in outcomes} == {(4 * (42 + 30 + NUM_EXPERTS * 24), 4 * 6)}


def test_one_process_is_a_source_without_any_process_group():
    model = Model()
    manifest = ModelSource.of_model(model).describe()
    assert {tensor.name for tensor in manifest.tensors} == {*WHOLE, STACKED}
    experts = [holding for holding in manifest.holdings if holding.tensor == STACKED]
    assert [holding.region.starts[0] for holding in experts] == list(range(NUM_EXPERTS))


def test_a_source_sends_what_its_parameters_hold_now_and_knows_only_its_own_names():
    model = Model()
    source = ModelSource.of_model(model)
    with torch.no_grad():
        model.norm.weight.fill_(3.0)
    assert torch.equal(source.params()["norm.weight"], torch.full((6,), 3.0))
    assert dict(source.export(["norm.weight"])).keys() == {"norm.weight"}
    with pytest.raises(KeyError, match="lm_head"):
        list(source.export(["lm_head.weight"]))


def test_memory_that_is_laid_out_anew_after_it_was_described_is_refused():
    layer = nn.Linear(3, 2, bias=False)
    source = ModelSource.of_model(layer)
    described = DescribedParams(source.describe().params, "trainer 0")
    described.require(source.params())
    layer.weight.data = layer.weight.data.t().contiguous().t()  # shape, dtype and values as before
    with pytest.raises(TransportError, match=r"'weight' of trainer 0 has strides \(1, 2\), .* row-major"):
        described.require(source.params())
    anew = source.describe().params
    assert anew[0].strides == (1, 2)
    DescribedParams(anew, "trainer 0").require(source.params())
    layer.weight.data = layer.weight.data.contiguous()
    with pytest.raises(TransportError, match=r"has strides \(3, 1\), .* \(1, 2\)"):
        DescribedParams(anew, "trainer 0").require(source.params())

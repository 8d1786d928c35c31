"""Reads over a real control store, from ranks whose memory is in this process."""

import dataclasses
from unittest import mock

import pytest
import torch

from benchmarks.read_back import CONFIG, MemoryRanks, make_model
from refit.plan import PlanError, hf_name
from refit.plan.read import HeldCell, ReadPlan
from refit.plan.sides import Side
from refit.service import reader as reader_module
from refit.service.reader import Reader, VersionMoved, span
from refit.transfer.errors import RefitFailed, TransportError
from refit.transfer.precision.codecs import dequantize
from refit.transfer.precision.scheme import quantized
from refit.transfer.rendezvous import ControlStore

DENSE = CONFIG | {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 259}
MOE = DENSE | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def control():
    with_store = ControlStore.host(run_id="test")
    yield with_store
    with_store.close()


@pytest.fixture(
    params=[(DENSE, "tp=2"), (DENSE, "tp=2,pp=2"), (DENSE, "tp=4"), (MOE, "tp=2"), (MOE, "tp=2,ep=1")]
)
def ranks(request):
    config, layout = request.param
    manifest, tensors = make_model(config, layout)
    found = MemoryRanks(manifest, tensors)
    found.tensors = tensors
    yield found
    found.close()


@pytest.fixture
def dense():
    manifest, tensors = make_model(DENSE, "tp=2")
    found = MemoryRanks(manifest, tensors)
    found.tensors = tensors
    yield found
    found.close()


def wrong_reads(reader, tensors):
    """Tensors that do not come back as they are, whole or by their last rows."""
    return [
        name
        for name, goal in tensors.items()
        if not torch.equal(reader.read(name).tensor, goal)
        or (goal.ndim and not torch.equal(reader.read(name, slice(len(goal) - 1, None)).tensor, goal[-1:]))
    ]


def test_every_tensor_comes_back_at_its_full_shape(ranks, control):
    assert wrong_reads(Reader(ranks, control), ranks.tensors) == []


def test_experts_come_back_one_by_one(ranks, control):
    reader = Reader(ranks, control)
    stacked = [name for name in ranks.tensors if "experts.*" in name]
    for name in stacked[:2]:
        for expert in (0, 5, 7):
            answer = reader.read(hf_name(name, expert), slice(1, 3))
            assert torch.equal(answer.tensor, ranks.tensors[name][expert, 1:3])
    assert bool(stacked) == any("experts" in name for name in ranks.tensors)


def test_only_the_ranks_and_rows_concerned_move(dense, control):
    reader = Reader(dense, control)
    size = len(dense.tensors[EMBEDDING])
    cut = next(h for h in dense.manifest.ranks[0].holdings if h.tensor == EMBEDDING).region.stops[0]
    for row, owner in ((0, 0), (cut - 1, 0), (cut, 1), (size - 1, 1)):
        dense.asked.clear()
        answer = reader.read(EMBEDDING, row)
        assert torch.equal(answer.tensor, dense.tensors[EMBEDDING][row : row + 1])
        assert (set(dense.asked), answer.ranks, answer.witnesses) == ({owner}, (owner,), ())
        assert answer.tensor.nbytes < answer.moved_bytes < answer.tensor.nbytes + 1024


def test_a_large_read_goes_in_pieces_and_leaves_nothing_in_the_store(dense, control):
    reader = Reader(dense, control)
    before = control._tcp_store.num_keys()
    assert reader.side
    with mock.patch.object(reader_module, "CHUNK_BYTES", 4096):
        answer = reader.read(EMBEDDING)
    assert torch.equal(answer.tensor, dense.tensors[EMBEDDING])
    assert answer.ranks == (0, 1)
    assert control._tcp_store.num_keys() == before


def test_a_version_is_stamped_and_another_one_is_refused(dense, control):
    reader = Reader(dense, control)
    dense.version = 7
    assert reader.read(EMBEDDING, 0).version == 7
    assert reader.read(EMBEDDING, 0, version=7).version == 7
    with pytest.raises(VersionMoved, match="serves version 7, version 6 was asked for"):
        reader.read(EMBEDDING, 0, version=6)


def test_a_version_that_moves_during_a_read_is_never_mixed(dense, control):
    reader, asks = Reader(dense, control), []
    assert reader.side
    ask = dense.ask

    def moving(info, timeout_s):
        asks.append(info)
        if len(asks) == 2:
            dense.load({name: tensor + 1 for name, tensor in dense.tensors.items()})
            dense.version = 2
        ask(info, timeout_s)

    with mock.patch.object(reader_module, "CHUNK_BYTES", 4096), mock.patch.object(dense, "ask", moving):
        answer = reader.read(EMBEDDING)
    assert answer.version == 2 and torch.equal(answer.tensor, dense.tensors[EMBEDDING] + 1)


def test_ranks_that_should_agree_and_do_not_are_named(dense, control):
    name = "model.layers.0.input_layernorm.weight"
    held = next(h for h in dense.manifest.ranks[1].holdings if h.tensor == name)
    dense.params[1][held.param].view(torch.int16)[3] ^= 1
    with pytest.raises(TransportError, match=r"input_layernorm.* differs between ranks of engine 0, rank 1"):
        Reader(dense, control).read(name)
    assert Reader(dense, control).read("model.norm.weight").witnesses == (1,)


def test_what_a_worker_cannot_give_is_refused_with_its_reason_and_the_next_read_works(dense, control):
    reader = Reader(dense, control)
    dense.unreadable = {
        h.param: "shuffled by its kernel" for h in dense.manifest.ranks[0].holdings if h.tensor == EMBEDDING
    }
    with pytest.raises(RefitFailed, match="shuffled by its kernel"):
        reader.read(EMBEDDING, 0)
    assert torch.equal(reader.read("model.norm.weight").tensor, dense.tensors["model.norm.weight"])
    dense.broken = "the commit failed"
    with pytest.raises(RefitFailed, match="holds no whole version: the commit failed"):
        reader.read("model.norm.weight")


def test_an_engine_that_does_not_answer_costs_the_time_limit(control):
    class Silent:
        name, num_workers = "engine 0", 2

        def ask(self, info, timeout_s):
            pass

    with pytest.raises(TransportError, match="answer/1/0"):
        Reader(Silent(), control, timeout_s=0.2).read(EMBEDDING)


@pytest.mark.parametrize("rows", [slice(0, 4, 2), -1, slice(-3, None)])
def test_rows_from_the_end_and_steps_are_refused(rows):
    with pytest.raises(PlanError, match="START:STOP"):
        span(rows)


@pytest.mark.parametrize("form", ["fp8", "mxfp8"])
def test_quantized_weights_come_back_as_stored_and_decoded(form, control):
    name = "model.layers.0.mlp.gate_proj.weight"
    _, tensors = make_model(DENSE | {"hidden_size": 256, "intermediate_size": 512}, "tp=1")
    parts = dict(quantized([(name, tensors[name].float())], {name: form}))
    engine = MemoryRanks(
        whole_tensors(parts | {"model.norm.weight": tensors["model.norm.weight"]}), tensors | parts
    )
    reader = Reader(engine, control)
    for part, goal in parts.items():
        found = reader.read(part).tensor
        assert torch.equal(found.view(torch.uint8), goal.view(torch.uint8))
    goal = dequantize(form, list(parts.values()), torch.float32)
    assert torch.equal(reader.read(name, dequantize=True).tensor, goal)
    for start, stop in ((0, 1), (100, 300), (127, 129), (511, 512)):
        answer = reader.read(name, slice(start, stop), dequantize=True)
        assert torch.equal(answer.tensor, goal[start:stop])
        assert answer.moved_bytes < parts[name].nbytes
    with pytest.raises(PlanError, match="not stored quantized"):
        reader.read("model.norm.weight", dequantize=True)
    engine.close()


def whole_tensors(tensors):
    """The manifest of one rank that holds every tensor whole."""
    from refit.plan import Holding, Manifest, ParamSpec, RankManifest, Region, TensorSpec
    from refit.transfer.memory import dtype_name

    specs = {name: (tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in tensors.items()}
    holdings = tuple(Holding(n, Region.whole(t.shape), n, 0, t.stride()) for n, t in tensors.items())
    kinds = (tuple(kind(name, *spec) for name, spec in specs.items()) for kind in (TensorSpec, ParamSpec))
    return Manifest("gen", (RankManifest("gen", 0, 0, 0, *kinds, holdings, ()),))


# Defects that published work has had: each must be seen by the comparisons above.


def cut_by_stamps(manifest):
    """Every matrix taken for cut: vLLM stamps `output_dim` on replicated linear weights too (routers, biases).

    Rank `r` of `n` is believed to hold rows [r * local, (r + 1) * local) of whatever carries the stamp.
    """
    shapes = {spec.name: spec.shape for spec in manifest.ranks[0].tensors}
    ranks = []
    for rank in manifest.ranks:
        holdings = []
        for held in rank.holdings:
            region, rows = held.region, shapes[held.tensor][0]
            if len(region.shape) == 2 and region.shape == shapes[held.tensor]:
                half = rows // len(manifest.ranks)
                region = region.with_dim(0, rank.rank * half, (rank.rank + 1) * half)
            holdings.append(dataclasses.replace(held, region=region))
        ranks.append(dataclasses.replace(rank, holdings=tuple(holdings)))
    return dataclasses.replace(manifest, ranks=tuple(ranks))


def test_a_cut_taken_from_stamps_reads_replicated_weights_wrong(control):
    manifest, tensors = make_model(MOE, "tp=2")
    engine = MemoryRanks(manifest, tensors)
    reader = Reader(engine, control)
    reader.side = Side.of(cut_by_stamps(manifest))
    routers = [name for name in tensors if name.endswith("mlp.gate.weight")]
    ranks = [
        dict.fromkeys(h.tensor for h in r.holdings if h.region.shape == tensors[h.tensor].shape)
        for r in manifest.ranks
    ]
    assert routers and all(name in held for name in routers for held in ranks), "routers are replicated"
    mutated = cut_by_stamps(manifest)
    engine.manifest = mutated  # the workers believe it too
    wrong = wrong_reads(reader, tensors)
    assert set(routers) <= set(wrong)
    engine.close()


def test_always_asking_the_first_rank_is_refused_or_wrong(dense, control):
    def first_rank(side, tensor, region):
        return ReadPlan(tensor, region, (HeldCell(region, (0,)),), (0,))

    reader = Reader(dense, control)
    last = len(dense.tensors[EMBEDDING]) - 1
    with mock.patch.object(reader_module, "plan_read", first_rank):
        assert torch.equal(reader.read(EMBEDDING, 0).tensor, dense.tensors[EMBEDDING][:1])
        with pytest.raises(RefitFailed, match="is not held here"):
            reader.read(EMBEDDING, last)


def test_padding_that_is_not_stripped_shows_as_rows_too_many(dense, control):
    stored = [  # what the ranks keep, end to end: the mutation
        dense.params[rank.rank][next(h.param for h in rank.holdings if h.tensor == EMBEDDING)]
        for rank in dense.manifest.ranks
    ]
    unstripped = torch.cat(stored)
    found = Reader(dense, control).read(EMBEDDING).tensor
    assert torch.equal(found, dense.tensors[EMBEDDING])
    assert unstripped.shape[0] > found.shape[0] == 259
    with pytest.raises(PlanError, match=f"pads them to {unstripped.shape[0]}"):
        Reader(dense, control).read(EMBEDDING, 259)

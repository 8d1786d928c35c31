"""Differences between holders of weights, found by digests and named by tensor, index and rank."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import read_back
from benchmarks.read_back import MemoryRanks, make_model, plant, write_checkpoint
from refit.plan import PlanError, Region, canonical, hf_name
from refit.service import diff as diff_module
from refit.service.diff import Box, diff
from refit.service.holders import CheckpointWeights, EngineWeights
from refit.service.oracle import box_digests, box_of
from refit.service.reader import Reader
from refit.transfer.inverse import RESOLUTION
from refit.transfer.reading import INVERTED, PLAIN, THROUGH_KERNEL
from refit.transfer.rendezvous import ControlStore
from tests.service.test_reader import DENSE, MOE


@pytest.fixture(scope="module")
def control():
    with_store = ControlStore.host(run_id="test")
    yield with_store
    with_store.close()


@pytest.fixture(params=[(DENSE, "tp=2,pp=2"), (MOE, "tp=2,ep=1")], ids=["dense", "moe"])
def world(request, tmp_path):
    """(ranks, canonical tensors, the same as a checkpoint)."""
    config, layout = request.param
    manifest, tensors = make_model(config, layout)
    ranks = MemoryRanks(manifest, tensors)
    yield ranks, tensors, CheckpointWeights.open(write_checkpoint(tensors, tmp_path / "model"))
    ranks.close()


def engine(ranks, control):
    return EngineWeights(Reader(ranks, control))


def test_equal_weights_have_no_difference_and_every_byte_was_compared(world, control):
    ranks, tensors, checkpoint = world
    report = diff(checkpoint, engine(ranks, control))
    assert report.equal and not report.skipped
    assert report.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert report.versions == (None, 1)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_one_flipped_bit_is_named_by_tensor_index_and_rank(world, control, rank, monkeypatch):
    monkeypatch.setattr(diff_module, "READ_BYTES", 1 << 10)
    ranks, tensors, checkpoint = world
    rank = min(rank, len(ranks.params) - 1)
    for held in ranks.manifest.ranks[rank].holdings[::5]:
        index = plant(ranks, held.tensor, rank, held.region.num_elements // 2)
        stacked = "experts.*" in held.tensor
        name, place = (hf_name(held.tensor, index[0]), index[1:]) if stacked else (held.tensor, index)
        report = diff(checkpoint, engine(ranks, control))
        (found,) = [one for one in report.differences if one.left == checkpoint.name]
        assert (found.name, found.index, found.num_elements) == (name, place, 1)
        assert found.right == f"engine 0 rank {rank}"
        assert found.left_value == float(tensors[held.tensor][index])
        assert found.delta == abs(found.left_value - found.right_value) > 0
        ranks.load(tensors)
    assert diff(checkpoint, engine(ranks, control)).equal


def test_a_replica_that_is_off_is_named_by_its_rank_though_another_is_right(control, tmp_path):
    manifest, tensors = make_model(DENSE, "tp=2")
    ranks = MemoryRanks(manifest, tensors)
    checkpoint = CheckpointWeights.open(write_checkpoint(tensors, tmp_path))
    index = plant(ranks, "model.norm.weight", 1, 3)
    found = diff(engine(ranks, control), checkpoint).differences
    assert [(one.name, one.index, one.left, one.right) for one in found] == [
        ("model.norm.weight", index, "engine 0 rank 0", "engine 0 rank 1")
    ]
    ranks.close()


def test_two_engines_of_different_layouts_and_two_checkpoints_compare(control, tmp_path):
    first, tensors = make_model(DENSE, "tp=2")
    ranks = MemoryRanks(first, tensors), MemoryRanks(make_model(DENSE, "tp=4,pp=2")[0], tensors)
    assert diff(*(engine(each, control) for each in ranks)).equal
    index = plant(ranks[1], "model.layers.1.mlp.gate_proj.weight", 7, 11)
    (found,) = diff(*(engine(each, control) for each in ranks)).differences
    assert (found.name, found.index) == ("model.layers.1.mlp.gate_proj.weight", index)
    assert found.right == "engine 0 rank 7"
    folder = write_checkpoint(tensors, tmp_path / "a")
    shutil.copytree(folder, tmp_path / "b")
    changed = load_file(tmp_path / "b" / "model.safetensors")
    changed["lm_head.weight"][5, 6] += 1
    save_file(changed, tmp_path / "b" / "model.safetensors")
    (found,) = diff(CheckpointWeights.open(folder), CheckpointWeights.open(tmp_path / "b")).differences
    assert (found.name, found.index, found.num_elements) == ("lm_head.weight", (5, 6), 1)
    for each in ranks:
        each.close()


def test_the_largest_difference_is_the_one_that_is_named_and_a_nan_is_larger_than_any(control, tmp_path):
    manifest, tensors = make_model(DENSE, "tp=2")
    ranks = MemoryRanks(manifest, tensors)
    checkpoint = CheckpointWeights.open(write_checkpoint(tensors, tmp_path))
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["model.embed_tokens.weight"][3, 1] += 1
    changed["model.embed_tokens.weight"][200, 2] += 4
    ranks.load(changed)
    (found,) = diff(checkpoint, engine(ranks, control), "model.embed*").differences[1:]
    assert (found.index, found.num_elements, found.right) == ((200, 2), 1, "engine 0 rank 1")
    changed["model.embed_tokens.weight"][201, 0] = float("nan")
    ranks.load(changed)
    found = diff(checkpoint, engine(ranks, control)).differences[1]
    assert (found.index, found.delta, found.num_elements) == ((201, 0), float("inf"), 2)
    ranks.close()


def test_a_wider_float_is_compared_after_rounding_and_what_cannot_be_compared_is_listed(control, tmp_path):
    manifest, tensors = make_model(DENSE, "tp=2")
    ranks = MemoryRanks(manifest, tensors)
    wider = {name: tensor.float() for name, tensor in tensors.items()}
    wider["lm_head.weight"] = wider["lm_head.weight"][:-1]
    wider["extra.weight"] = torch.zeros(3)
    wider["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    held = next(h for h in manifest.ranks[1].holdings if h.tensor == "model.layers.0.self_attn.o_proj.weight")
    ranks.unreadable[held.param] = "shuffled by its kernel"
    report = diff(CheckpointWeights.open(write_checkpoint(wider, tmp_path)), engine(ranks, control))
    assert report.equal
    reasons = report.skipped
    assert "[258, 64]" in reasons["lm_head.weight"] and "[259, 64]" in reasons["lm_head.weight"]
    assert reasons["extra.weight"] == f"only {tmp_path} has it"
    assert "float8_e4m3fn" in reasons["model.norm.weight"]
    assert "shuffled by its kernel" in reasons[held.tensor]
    with pytest.raises(PlanError, match="no tensor in common"):
        diff(engine(ranks, control), engine(ranks, control), "nothing.*")
    ranks.close()


@pytest.mark.parametrize(
    ("kind", "change", "is_equal"),
    [
        (PLAIN, -0.0, False),
        (THROUGH_KERNEL, -0.0, True),
        (THROUGH_KERNEL, RESOLUTION, False),
        (INVERTED, RESOLUTION, True),
        (INVERTED, 1.5 * RESOLUTION, False),
        (INVERTED, float("nan"), False),
    ],
)
def test_what_was_not_read_plainly_is_equal_as_far_as_it_can_be_told_and_two_engines_are_equal_exactly(
    control, tmp_path, kind, change, is_equal
):
    name, (manifest, tensors) = "model.norm.weight", make_model(DENSE, "tp=2")
    tensors[name] = torch.zeros_like(tensors[name])
    checkpoint = CheckpointWeights.open(write_checkpoint(tensors, tmp_path))
    engines = MemoryRanks(manifest, tensors), MemoryRanks(manifest, tensors)
    for each in engines:
        each.kinds[name] = kind
    for params in engines[1].params:
        params[name][7] = change
    report = diff(checkpoint, engine(engines[1], control))
    assert report.equal == is_equal
    assert {one.index for one in report.differences} == (set() if is_equal else {(7,)})
    assert diff(*(engine(each, control) for each in engines)).equal == (kind == THROUGH_KERNEL and is_equal)
    for each in engines:
        each.close()


def test_the_benchmark_finds_its_bit_and_its_line_holds_what_is_quoted(capsys):
    threads = torch.get_num_threads()
    line = read_back.main(["--tiny", "--repeats", "1"])
    torch.set_num_threads(threads)
    assert json.loads(capsys.readouterr().out) == line
    assert read_back.PLANTED in line["found"] and "rank 1" in line["found"]
    assert line["row_bytes"] < line["row_moved_bytes"] <= 64 << 10
    assert line["cpu_s_per_gib_p50"] > 0


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_what_trainers_export_is_digested_and_cut_like_a_checkpoint_of_it(config, tmp_path):
    _, tensors = make_model(config, "tp=1")
    checkpoint = CheckpointWeights.open(write_checkpoint(tensors, tmp_path))
    exported = sorted(load_file(tmp_path / "model.safetensors").items())
    boxes = []
    for name, spec in checkpoint.specs.items():
        part = Region(tuple(size // 3 for size in spec.shape), spec.shape)
        boxes += [Box(name, dtype, part, 0) for dtype in ("bfloat16", "float32")]
    asked = [(box.tensor, box.dtype, box.region) for box in boxes]
    found = [int(value, 16) for value in box_digests(exported, asked, checkpoint.specs)]
    assert found == checkpoint.digests(boxes)
    for box in boxes:
        mine = [(hf, tensor) for hf, tensor in exported if canonical(hf)[0] == box.tensor]
        assert torch.equal(box_of(iter(mine), box.dtype, box.region), checkpoint.values(box)[0])

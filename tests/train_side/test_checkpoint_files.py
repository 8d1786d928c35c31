"""A checkpoint that a job saves is one to go on from: bounded files, and all that is no weight beside them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from refit.gen_side.loader.hf_index import read_hf_shapes
from refit.train_side.checkpoint import save

WEIGHTS = {
    "model.embed_tokens.weight": torch.arange(64, dtype=torch.bfloat16).view(16, 4),  # 128 bytes
    "model.layers.0.mlp.up_proj.weight": torch.randn(8, 4).t(),  # 128 bytes, not contiguous
    "model.norm.weight": torch.ones(4),  # 16 bytes
    "lm_head.weight": torch.zeros(400, dtype=torch.bfloat16),  # 800 bytes
}


@pytest.fixture
def started_from(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "merges.txt", "tokenizer.model", "chat_template.jinja"):
        (folder / name).write_text(name)
    save_file({"old": torch.ones(1)}, folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("old")
    return folder


@pytest.mark.parametrize(
    ("file_bytes", "num_tensors"), [(10**9, [4]), (256, [2, 1, 1]), (1, [1, 1, 1, 1]), (144, [1, 2, 1])]
)
def test_tensors_go_into_files_of_a_bounded_size_that_every_reader_of_checkpoints_finds(
    started_from, tmp_path, file_bytes, num_tensors
):
    target = tmp_path / "checkpoint"
    save(iter(WEIGHTS.items()), started_from, target, 0, file_bytes)
    files = sorted(target.glob("*.safetensors"))
    assert [len(load_file(file)) for file in files] == num_tensors
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert loaded.keys() == WEIGHTS.keys() == read_hf_shapes(target).keys()
    assert all(torch.equal(loaded[name], WEIGHTS[name]) for name in WEIGHTS)
    index = target / "model.safetensors.index.json"
    if len(num_tensors) == 1:
        assert [file.name for file in files] == ["model.safetensors"] and not index.exists()
    else:
        places = json.loads(index.read_text())["weight_map"]
        assert all(name in load_file(target / place) for name, place in places.items())


def test_the_tokenizer_goes_along_and_no_weight_of_the_start_does(started_from, tmp_path):
    save(iter(WEIGHTS.items()), started_from, tmp_path / "checkpoint", 0)
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == {
        *("config.json", "tokenizer.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
        "model.safetensors",
    }


def test_other_ranks_take_the_export_to_its_end_and_write_nothing(started_from, tmp_path):
    weights = iter(WEIGHTS.items())
    save(weights, started_from, tmp_path / "checkpoint", 1)
    assert next(weights, None) is None and not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("where", ["the folder", "a file of weights"])
def test_a_rank_that_cannot_write_takes_part_in_the_export_to_its_end_all_the_same(
    started_from, tmp_path, where
):
    target = tmp_path / "checkpoint"
    if where == "the folder":
        target.write_text("no folder")
    else:
        (target / "model-00002.safetensors").mkdir(parents=True)
    weights = iter(WEIGHTS.items())
    with pytest.raises((OSError, SafetensorError)):
        save(weights, started_from, target, 0, 1)
    assert next(weights, None) is None, "the other ranks are in the export still"

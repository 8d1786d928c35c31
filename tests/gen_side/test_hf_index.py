"""Names and shapes of a checkpoint, from headers alone."""

import json

import pytest
import torch
from safetensors.torch import save_file

from refit.gen_side.loader.hf_index import read_hf_shapes
from refit.plan.errors import ConfigError


def test_shapes_and_dtypes_come_from_the_header(tmp_path):
    save_file(
        {"b": torch.zeros(2, 3, dtype=torch.bfloat16), "a": torch.zeros(())}, tmp_path / "model.safetensors"
    )
    assert read_hf_shapes(tmp_path) == {"a": ((), "float32"), "b": ((2, 3), "bfloat16")}


def test_the_index_names_the_files_that_count(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"a": torch.zeros(9)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "one.safetensors"}})
    )
    assert read_hf_shapes(tmp_path) == {"a": ((1,), "float32")}


def test_a_folder_without_weights_says_so(tmp_path):
    with pytest.raises(ConfigError, match="safetensors"):
        read_hf_shapes(tmp_path)


def test_a_broken_header_names_the_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0xxxxx")
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        read_hf_shapes(tmp_path)

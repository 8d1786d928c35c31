"""Quantized checkpoints on disk."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from refit.transfer.precision.checkpoint import quantize_checkpoint
from refit.transfer.precision.codecs import quantize
from refit.transfer.precision.formats import PrecisionError

LINEAR = "model.layers.0.mlp.experts.3.up_proj.weight"
KEPT = ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.gate.weight")
PLAIN = ("model.norm.weight", "model.layers.0.self_attn.q_proj.bias")


def checkpoint(folder):
    """Two files and an index."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(160, 96, generator=generator).bfloat16() for name in (LINEAR, *KEPT)}
    others = {name: torch.randn(96, generator=generator).bfloat16() for name in PLAIN}
    save_file(tensors, folder / "model-1.safetensors")
    save_file(others, folder / "model-2.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (folder / "model.safetensors.index.json").write_text("{}")
    return folder, tensors | others


@pytest.mark.parametrize(("form", "key"), [("fp8", "modules_to_not_convert"), ("mxfp8", "ignored_layers")])
def test_linear_layers_are_quantized_and_what_is_kept_is_named_in_the_config(tmp_path, form, key):
    source, tensors = checkpoint(tmp_path / "source")
    target = quantize_checkpoint(source, tmp_path / "target", form)
    found = load_file(target / "model-1.safetensors") | load_file(target / "model-2.safetensors")
    data, scale = quantize(form, tensors[LINEAR])
    suffix = {"fp8": "_scale_inv", "mxfp8": "_scale"}[form]
    assert torch.equal(found.pop(LINEAR).view(torch.uint8), data.view(torch.uint8))
    assert torch.equal(found.pop(LINEAR + suffix), scale)
    assert found.keys() == {*KEPT, *PLAIN}
    assert all(torch.equal(found[name], tensors[name]) for name in found)
    config = json.loads((target / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert config["quantization_config"][key] == sorted(name.removesuffix(".weight") for name in KEPT)
    places = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    assert places[LINEAR + suffix] == "model-1.safetensors" and places[PLAIN[0]] == "model-2.safetensors"


def test_a_format_without_checkpoints_and_a_folder_without_tensors_are_refused(tmp_path):
    source, _ = checkpoint(tmp_path / "source")
    with pytest.raises(PrecisionError, match="no checkpoints are written in 'nvfp4'; use fp8 or mxfp8"):
        quantize_checkpoint(source, tmp_path / "target", "nvfp4")
    with pytest.raises(PrecisionError, match=r"has no \.safetensors file"):
        quantize_checkpoint(tmp_path, tmp_path / "target", "fp8")

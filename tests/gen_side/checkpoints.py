"""Checkpoints with the same tensors and other values, written without building a model."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from refit.gen_side.loader.hf_index import read_hf_shapes


def tensors_of(folder):
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found.update(load_file(file))
    return dict(sorted(found.items()))


def rewritten(source, target, make):
    """A copy of checkpoint `source` in `target` whose tensor `name` is make(name, shape, dtype)."""
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for file in Path(source).glob("*.json"):
        if "index" not in file.name:
            shutil.copy(file, target / file.name)
    tensors = {
        name: make(name, shape, getattr(torch, dtype)).contiguous()
        for name, (shape, dtype) in read_hf_shapes(source).items()
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def index_coded(source, target):
    """Every element's value is its own address: its position in the file's tensors, in name order. fp32 only."""
    position = [0]

    def make(name, shape, dtype):
        assert dtype is torch.float32, (name, dtype)
        count = torch.Size(shape).numel()
        start = position[0]
        position[0] += count
        assert position[0] < 1 << 24, "float32 cannot tell more addresses apart"
        return torch.arange(start, start + count, dtype=torch.float32).reshape(shape)

    return rewritten(source, target, make)


def shifted(source, target, seed, scale=0.02):
    """The same checkpoint a training step later: every element changed a little."""
    old = tensors_of(source)
    generator = torch.Generator().manual_seed(seed)

    def make(name, shape, dtype):
        noise = torch.randn(shape, generator=generator) * scale
        return (old[name].float() + noise).to(dtype)

    return rewritten(source, target, make)


def set_config(folder, **fields):
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config.update(fields)
    path.write_text(json.dumps(config))


def header_only(folder, shapes, dtype="BF16", item_bytes=2):
    """A safetensors file of `shapes` with a header and a hole for the data: for tests that read no weight."""
    entries, end = {}, 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + torch.Size(shape).numel() * item_bytes
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with (Path(folder) / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return folder


def deepseek_shapes(layers, experts, hidden, inter, vocab):
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    for layer in range(layers):
        p = f"model.layers.{layer}."
        a = p + "self_attn."
        shapes |= {
            a + "q_a_proj.weight": (64, hidden), a + "q_a_layernorm.weight": (64,), a + "q_b_proj.weight": (256, 64),
            a + "kv_a_proj_with_mqa.weight": (64, hidden), a + "kv_a_layernorm.weight": (32,),
            a + "kv_b_proj.weight": (256, 32), a + "o_proj.weight": (hidden, 128),
            p + "input_layernorm.weight": (hidden,), p + "post_attention_layernorm.weight": (hidden,),
        }  # fmt: skip
        if layer < 3:
            mlps = [p + "mlp."]
        else:
            mlps = [f"{p}mlp.experts.{e}." for e in range(experts)] + [p + "mlp.shared_experts."]
            shapes[p + "mlp.gate.weight"] = (experts, hidden)
            shapes[p + "mlp.gate.e_score_correction_bias"] = (experts,)
        for mlp in mlps:
            shapes[mlp + "gate_proj.weight"] = shapes[mlp + "up_proj.weight"] = (inter, hidden)
            shapes[mlp + "down_proj.weight"] = (hidden, inter)
    return shapes

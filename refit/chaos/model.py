"""A small model whose weights are known at every version without anybody training it: the oracle of a campaign.

Two trainer stages hold half of the layers each; every replica holds all of it. Norms go by broadcast, the rest in bulk.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping

import torch

from refit.plan import Holding, ParamSpec, RankManifest, Region, TensorSpec

HIDDEN, INNER, VOCABULARY, NUM_LAYERS = 64, 192, 512, 4
DTYPE = "bfloat16"
NORMS = r".*norm\.weight"
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}


def shapes() -> dict[str, tuple[int, ...]]:
    """{HF name: shape} of the whole model."""
    layers = {
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(NUM_LAYERS)
        for name, shape in PROJECTIONS.items()
    }
    ends = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return {**ends, "model.norm.weight": (HIDDEN,), **layers}


def stage_of(name: str, num_stages: int) -> int:
    """The trainer that holds a tensor: layers in equal runs, the embedding first, head and last norm at the end."""
    if name == "model.embed_tokens.weight":
        return 0
    parts = name.split(".")
    return int(parts[2]) * num_stages // NUM_LAYERS if parts[1] == "layers" else num_stages - 1


def train_manifest(rank: int, num_ranks: int) -> RankManifest:
    """What a trainer holds: its stage's tensors, whole."""
    mine = {name: shape for name, shape in shapes().items() if stage_of(name, num_ranks) == rank}
    return _manifest("train", rank, rank, 0, mine)


def gen_manifest(gen_rank: int, replica: int) -> RankManifest:
    """What a replica holds: everything."""
    return _manifest("gen", gen_rank, 0, replica, shapes())


def weight(name: str, version: int) -> torch.Tensor:
    """One tensor at one version."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}@{version}".encode()))
    return torch.randn(shapes()[name], generator=generator).to(torch.bfloat16)


def digest_of(weights: Mapping[str, torch.Tensor]) -> str:
    """One hash of all bytes, by name."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode())
        found.update(weights[name].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digest_at(version: int) -> str:
    """What `digest_of` a replica that serves `version` must be."""
    return digest_of({name: weight(name, version) for name in shapes()})


def _manifest(
    side: str, rank: int, stage: int, replica: int, held: Mapping[str, tuple[int, ...]]
) -> RankManifest:
    specs = tuple(TensorSpec(name, shape, DTYPE) for name, shape in held.items())
    params = tuple(ParamSpec(name, shape, DTYPE) for name, shape in held.items())
    holdings = tuple(
        Holding(name, Region.whole(shape), name, 0, tuple(torch.empty(shape, device="meta").stride()))
        for name, shape in held.items()
    )
    return RankManifest(side, rank, stage, replica, specs, params, holdings, ())

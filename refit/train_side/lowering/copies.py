"""HF tensors that Megatron does not make because they are copies of others."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

# DeepSeek-V3's checkpoints repeat the embedding and the output layer in every multi-token prediction layer;
# Megatron shares them. (pattern of the copy, name of the original)
_COPIES = (
    (re.compile(r"model\.layers\.\d+\.embed_tokens\.weight"), "model.embed_tokens.weight"),
    (re.compile(r"model\.layers\.\d+\.shared_head\.head\.weight"), "lm_head.weight"),
)


def find_copies(shapes: Mapping[str, tuple[int, ...]], made: Collection[str]) -> dict[str, str]:
    """The originals of checkpoint tensors (`shapes`) that no parameter makes (`made`), by the copy's name."""
    return {
        name: original
        for name in shapes
        for pattern, original in _COPIES
        if name not in made
        and original in made
        and pattern.fullmatch(name)
        and shapes[name] == shapes[original]
    }

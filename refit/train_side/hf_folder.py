"""What an HF checkpoint folder says about its tensors, from the safetensors headers alone."""

from __future__ import annotations

from pathlib import Path


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in `folder`, by HF name. Reads headers only, no tensor."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no *.safetensors file: it is no HF checkpoint")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  safe_open is no mapping
                shapes[name] = tuple(opened.get_slice(name).get_shape())
    return shapes

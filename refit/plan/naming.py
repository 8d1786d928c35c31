"""Canonical tensor names: HF names, with the experts of a layer stacked into one tensor per projection."""

import re
from collections.abc import Sequence

from refit.plan.errors import PlanError

_EXPERT = re.compile(r"^(?P<head>(?:.*\.)?experts)\.(?P<index>\d+)\.(?P<tail>.+)$")
_FACTOR = re.compile(r"^base_model\.model\..+\.lora_(?P<factor>[AB])\.weight$")
_STACKED = re.compile(r"^(?P<head>(?:.*\.)?experts)\.\*\.(?P<tail>.+)$")


def canonical(hf_name: str) -> tuple[str, int | None]:
    """`a.experts.7.up_proj.weight` -> (`a.experts.*.up_proj.weight`, 7); any other name -> (itself, None)."""
    found = _EXPERT.match(hf_name)
    if found is None:
        return hf_name, None
    return f"{found['head']}.*.{found['tail']}", int(found["index"])


def is_stacked(tensor_name: str) -> bool:
    """True if the canonical tensor stands for one HF tensor per expert; its dim 0 then counts experts."""
    return _STACKED.match(tensor_name) is not None


def hf_name(tensor_name: str, expert: int | None) -> str:
    """The inverse of `canonical`. Raises PlanError if an expert is given for a plain name or is missing."""
    found = _STACKED.match(tensor_name)
    if (found is None) != (expert is None):
        raise PlanError(
            f"tensor {tensor_name!r} with expert {expert}: only names with 'experts.*' take an expert"
        )
    return tensor_name if found is None else f"{found['head']}.{expert}.{found['tail']}"


def hf_names(tensor_name: str, shape: Sequence[int]) -> tuple[str, ...]:
    """All HF names that a canonical tensor stands for, in expert order."""
    if not is_stacked(tensor_name):
        return (tensor_name,)
    if not shape:
        raise PlanError(f"stacked tensor {tensor_name!r} has no dims; dim 0 must count its experts")
    return tuple(hf_name(tensor_name, expert) for expert in range(shape[0]))


def peft_names(hf_name: str) -> tuple[str, str]:
    """The LoRA factors A and B of a weight as PEFT names them: `base_model.model.<module>.lora_A.weight`."""
    module = hf_name.removesuffix(".weight")
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def peft_factor(name: str) -> str | None:
    """ "A" or "B" for a factor in PEFT's names; A has the rank as its dim 0, B as its dim 1."""
    found = _FACTOR.match(name)
    return None if found is None else found["factor"]

"""Values that name their place: versions are computed element by element, and a misplaced element is named."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from refit.plan import ConfigError
from refit.validation import weights
from refit.validation.weights import first_difference, make_checkpoint, next_version

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.weight": torch.arange(12.0, 20.0)}


def test_equal_memory_has_no_difference_and_a_sign_of_zero_is_one():
    zero = {"p": torch.zeros(2)}
    assert first_difference(zero, {"p": torch.zeros(2)}, {}) == ""
    assert "p[0] holds -0.0, expected 0.0 (2 of 2" in first_difference({"p": -zero["p"]}, zero, {})


def test_a_misplaced_element_names_where_it_comes_from_and_what_belongs_there():
    wanted = {"fused": torch.arange(12.0).reshape(3, 4)}
    found = {"fused": wanted["fused"].clone()}
    found["fused"][1, 2] = 15.0
    assert first_difference(found, wanted, TENSORS) == (
        "fused[1, 2] holds b.weight[3] (15.0), expected a.weight[1, 2] (6.0) (1 of 12 elements differ)"
    )


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "p is only on one side"),
        ({"p": torch.zeros(3)}, r"p: (3,)"),
        ({"p": torch.zeros(2).int()}, "int32"),
    ],
)
def test_another_shape_dtype_or_set_of_names_is_a_difference(found, message):
    assert message in first_difference(found, {"p": torch.zeros(2)}, {})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_next_version_of_a_part_is_the_part_of_the_next_version(precision):
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    first = torch.arange(1, 4097, dtype=torch.float32).to(dtype)
    second = next_version(first, precision)
    assert second.dtype is dtype and bool((second.abs() <= 0.5).all())
    assert torch.equal(next_version(first[100:200], precision), second[100:200])
    distinct = len(set(second.tolist())) / len(set(first.tolist()))
    assert distinct > (0.999 if precision == "fp32" else 0.75)


def test_addresses_that_fp32_cannot_tell_apart_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "EXACT_FLOAT32", 6)
    for folder, num_elements in (("fits", 4), ("too large", 5)):
        (tmp_path / folder).mkdir()
        sizes = {"a.weight": 2, "b.weight": num_elements}
        save_file(
            {name: torch.zeros(size) for name, size in sizes.items()}, tmp_path / folder / "model.safetensors"
        )
    make_checkpoint(str(tmp_path / "fits"), {}, "fp32", tmp_path / "made")
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert made["a.weight"].tolist() + made["b.weight"].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(
        ConfigError, match=r"too large has 7 elements up to b\.weight, but fp32 counts exactly to 6"
    ):
        make_checkpoint(str(tmp_path / "too large"), {}, "fp32", tmp_path / "none")
    make_checkpoint(str(tmp_path / "too large"), {}, "bf16", tmp_path / "bf16")

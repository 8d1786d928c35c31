"""benchmarks/gpu_pack.py at its smallest: boxes of real plans, equal bytes under the interpreter, no times."""

import json

import pytest
import torch

from benchmarks import gpu_pack
from tests.transfer.interpreted import interpreted_kernels


def test_kernels_equal_torch_views_on_the_shapes_of_published_models(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with interpreted_kernels():
        assert gpu_pack.main(["--tiny"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    rows = {row["name"]: row for row in json.loads(line)["cases"]}
    assert set(rows) == {"qkv_groups", "column_cuts", "expert_halves", "cast_to_bf16", "quantize_fp8"}
    for row in rows.values():
        assert row["equal"] is True
        assert 0 < row["bytes"] <= gpu_pack.TINY_BYTES
        assert not any(key.endswith("_share") for key in row), "no time is claimed without a GPU"


def test_without_a_device_the_full_size_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_pack.main([])
    assert "no CUDA device is here" in capsys.readouterr().err


def test_a_bucket_holds_boxes_of_one_real_plan_up_to_its_limit():
    case = next(case for case in gpu_pack.CASES if case.name == "column_cuts")
    bucket = gpu_pack.make_bucket(case, torch.device("cpu"), 1 << 16)
    assert bucket.num_bytes <= 1 << 16
    assert any(box.strides[0] > box.shape[-1] for box in bucket.boxes), (
        "a column cut has gaps between its rows"
    )
    assert bucket.touched_bytes == 2 * sum(2 * box.shape[0] * box.shape[1] for box in bucket.boxes)


@pytest.mark.parametrize(
    ("shape", "num_elements", "kept"),
    [
        ((4, 3), 12, (4, 3)),
        ((4, 3), 11, (3, 3)),
        ((4, 3), 2, (1, 2)),
        ((4, 3, 5), 14, (1, 2, 5)),
        ((4, 3), 0, (1, 0)),
    ],
)
def test_a_box_is_cut_to_what_fits(shape, num_elements, kept):
    assert gpu_pack.cut_to(shape, num_elements) == kept

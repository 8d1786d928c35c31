"""The workarounds for machines without CUDA: scoped, undone, and under known versions only."""

import importlib.metadata

import pytest
import torch

from refit.train_side import cpu_compat
from tests.train_side import ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="they change nothing where CUDA is")


def test_another_megatron_is_refused_with_both_versions(monkeypatch):
    cpu_compat.require_versions()
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.20.1")
    with pytest.raises(RuntimeError, match=r"megatron-core 0\.20\.1 is installed.*0\.19\.x: pin it"):
        cpu_compat.require_versions()


@pytest.mark.megatron
@pytest.mark.processes
@pytest.mark.timeout(400)
def test_cuda_requests_reach_the_cpu_within_the_scope_and_fail_again_after_it(trainers):
    (found,) = trainers.run(ranks.cuda_requests, 1)
    assert found["inside"] == {
        "device": "cpu",
        "made": "cpu",
        "moved": "cpu",
        "type": "torch.cuda.BFloat16Tensor",
        "stepwise": ["torch.cuda.FloatTensor"] * 2,
    }
    assert found["between_steps"] == ["torch.FloatTensor"] * 2
    assert found["after"] == "torch.BFloat16Tensor"
    assert found["no_transformer_engine"]

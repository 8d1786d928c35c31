"""Tests that need CUDA; `pytest -m gpu tests/gpu` runs them where a device is at hand."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    missing = pytest.mark.skip(reason="no CUDA device on this machine")
    for item in items:
        if "tests/gpu" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(missing)

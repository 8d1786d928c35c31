"""After a commit each parameter is where it was, in the shape it had: captured graphs read those addresses."""

import pytest
import torch

from refit.gen_side.staging import CommitFailed, _addresses, _check_live

pytestmark = pytest.mark.vllm


@pytest.fixture
def scene():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    modules = dict(model.named_modules())
    return model, modules, _addresses(modules)


def test_new_values_in_the_old_memory_are_a_commit(scene):
    model, modules, before = scene
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(3, 4))
    _check_live(modules, before)


def test_a_parameter_that_moved_is_refused_with_its_module(scene):
    model, modules, before = scene
    model[1].weight = torch.nn.Parameter(model[1].weight.detach().clone())
    with pytest.raises(CommitFailed, match="parameters of 1 modules moved or changed shape, 1 first"):
        _check_live(modules, before)


def test_a_parameter_of_another_shape_in_the_same_memory_is_refused(scene):
    model, modules, before = scene
    model[0].weight.data = model[0].weight.data.view(4, 3)
    with pytest.raises(CommitFailed, match="moved or changed shape, 0 first"):
        _check_live(modules, before)


def test_a_parameter_without_memory_is_refused_by_name(scene):
    model, modules, before = scene
    model[1].bias = torch.nn.Parameter(torch.empty(2, device="meta"))
    with pytest.raises(CommitFailed, match="module 1 has no memory for bias"):
        _check_live(modules, before)

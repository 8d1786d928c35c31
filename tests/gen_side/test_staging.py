"""What a staging holds before and while misc is loaded: nothing undefined, nothing of a buffer that is used again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from refit.gen_side.layout import layer_reload
from refit.gen_side.loader.recorder import Copied
from refit.gen_side.staging import Staging, _allocate
from tests.gen_side.test_compile_trace import DOWN, UP, WHOLE, compiled, slot

pytestmark = pytest.mark.vllm


@pytest.fixture
def undefined_memory_is_nan() -> Iterator[None]:
    """torch's own means to find reads of memory that nobody wrote."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def allocated(*writes, slots=()):
    model = torch.nn.Module()
    layer_reload(model).restore_device = torch.device("cpu")
    tensors, _ = _allocate(model, slots or (slot("fused"),), compiled(*writes, slots=slots))
    return tensors["fused"]


@pytest.mark.usefixtures("undefined_memory_is_nan")
def test_elements_that_no_loader_writes_are_staged_as_zeros():
    assert allocated(UP, DOWN).isnan().all(), "who writes all of it need not be waited for"
    assert torch.equal(allocated(UP), torch.zeros(8, 2, dtype=torch.bfloat16))


def test_what_attention_keeps_until_the_commit_outlives_the_buffer_that_it_came_in():
    slots = (slot("fused"), slot("scale", 4, deferred=True))
    trace = compiled(UP, Copied("down.weight", WHOLE, "scale", WHOLE), slots=slots)
    staging = Staging(torch.nn.Module(), trace, {}, {})
    buffer = torch.ones(4, 2)
    (up, down) = staging._keep_deferred((name, buffer) for name in ("up.weight", "down.weight"))
    buffer.fill_(7.0)  # the next chunk of the broadcast
    assert torch.equal(down[1], torch.ones(4, 2))
    assert up[1] is buffer, "what is loaded at once is not copied"

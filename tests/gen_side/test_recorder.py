"""What a loader does to a parameter, seen without doing it."""

import pytest
import torch

from refit.gen_side.loader.recorder import Computed, Copied, Filled, Recorder
from refit.gen_side.loader.views import View


@pytest.fixture
def scene():
    param = torch.full((8, 4), 7.0)
    source = torch.empty(6, 4, device="meta")
    return param, source, Recorder({"p": param}, {"t": source})


def test_a_copied_view_is_recorded_and_the_live_parameter_keeps_its_values(scene):
    param, source, recorder = scene
    with recorder:
        recorder.current = "t"
        param[2:5].copy_(source.narrow(0, 1, 3))
        param[6:].fill_(0)
    assert recorder.writes == [
        Copied("t", View(4, (3, 4), (4, 1)), "p", View(8, (3, 4), (4, 1))),
        Filled("t", "p", View(24, (2, 4), (4, 1)), 0),
    ]
    assert (param == 7).all()


def test_a_transposed_view_keeps_its_strides(scene):
    param, source, recorder = scene
    with recorder:
        param[:4, :4].copy_(source[:4].t())
    assert recorder.writes[0].src == View(0, (4, 4), (1, 4))


def test_a_computed_value_carries_the_tensors_that_went_into_it(scene):
    param, source, recorder = scene
    with recorder:
        param[:6].copy_(-torch.exp(source.float()))
    (write,) = recorder.writes
    assert isinstance(write, Computed) and write.tensors == {"t"}


def test_a_transformation_of_the_parameter_itself_is_charged_to_what_was_loaded_into_it(scene):
    param, source, recorder = scene
    with recorder:
        param[:6].copy_(source)
        param.mul_(2)
    assert isinstance(recorder.writes[0], Copied)
    assert isinstance(recorder.writes[1], Computed) and "t" in recorder.writes[1].tensors
    assert (param == 7).all()


def test_a_value_read_on_the_host_is_noted(scene):
    param, source, recorder = scene
    with recorder:
        recorder.current = "t"
        param[0].fill_(source[0, 0].item())
    assert recorder.read_values == {"t"}


def test_a_tensor_that_the_loader_changed_first_is_no_copy(scene):
    param, source, recorder = scene
    with recorder:
        source.zero_()
        param[:6].copy_(source)
    (write,) = recorder.writes
    assert isinstance(write, Computed) and write.tensors == {"t"}


def test_bytes_read_as_another_type_are_no_copy():
    param = torch.empty(4, dtype=torch.uint8, device="meta")
    source = torch.empty(4, dtype=torch.int8, device="meta")
    recorder = Recorder({"p": param}, {"t": source})
    with recorder:
        param.copy_(source.view(torch.uint8))
    assert isinstance(recorder.writes[0], Computed)


def test_of_two_names_of_one_memory_the_first_is_written():
    memory = torch.empty(4, device="meta")
    recorder = Recorder({"first": memory, "second": memory}, {"t": (source := torch.empty(4, device="meta"))})
    with recorder:
        memory.copy_(source)
    assert recorder.writes[0].param == "first"


def test_a_function_of_a_whole_parameter_carries_its_steps_and_that_of_a_part_does_not(scene):
    param, source, recorder = scene
    with recorder:
        param[:6].copy_(source)
        param.copy_(-torch.exp(param.float()))
        param[:2].copy_(-torch.exp(param[:2]))
        param.copy_(torch.exp(param).add_(1))
        param.copy_(torch.exp(param.t()).t())
    assert [write.steps for write in recorder.writes[1:]] == [("exp", "neg"), (), (), ()]

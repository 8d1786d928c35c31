"""What is made of the writes of a loader: a tensor is held only where nothing else was written, before or after."""

import pytest
import torch

from refit.gen_side.layout import Slot
from refit.gen_side.loader.recorder import Computed, Copied, Filled
from refit.gen_side.loader.trace import _Compiler
from refit.gen_side.loader.views import View

pytestmark = pytest.mark.vllm

SHAPES = {"up.weight": ((4, 2), "bfloat16"), "down.weight": ((4, 2), "bfloat16")}
WHOLE = View(0, (4, 2), (2, 1))
UP, DOWN = (
    Copied("up.weight", WHOLE, "fused", WHOLE),
    Copied("down.weight", WHOLE, "fused", View(8, (4, 2), (2, 1))),
)


def slot(param, rows=8, dtype=torch.bfloat16, deferred=False):
    return Slot(param, "", param, torch.empty(rows, 2, dtype=dtype, device="meta"), None, deferred)


def compiled(*writes, slots=(), reported=(), read_values=()):
    found = slots or (slot("fused"),)
    return _Compiler(found, SHAPES, writes, set(read_values), {}, frozenset(reported), {}).compile()


def misc_of(trace):
    return {reason.tensor: reason.reason for reason in trace.misc}


def test_copies_into_rows_of_their_own_are_held_and_cover_the_parameter():
    trace = compiled(UP, DOWN)
    assert misc_of(trace) == {} and not trace.partial and not trace.unsure
    assert {(h.tensor, h.offset) for h in trace.holdings} == {("up.weight", 0), ("down.weight", 8)}


def test_a_constant_below_a_tensors_own_later_copy_is_no_clash_and_one_above_it_is():
    under = Filled("up.weight", "fused", WHOLE, 0.0)
    assert misc_of(compiled(under, UP, DOWN)) == {}
    above = misc_of(compiled(UP, under, DOWN))
    assert set(above) == {"up.weight", "down.weight"}
    assert "a constant set with up.weight overlaps what up.weight loads" in above["up.weight"]
    other = misc_of(compiled(Filled("down.weight", "fused", WHOLE, 0.0), UP, DOWN))
    assert "a constant set with down.weight overlaps what up.weight loads" in other["up.weight"]


def test_two_tensors_in_the_same_elements_are_both_misc():
    found = misc_of(compiled(UP, Copied("down.weight", WHOLE, "fused", View(4, (4, 2), (2, 1)))))
    assert set(found) == {"up.weight", "down.weight"}
    assert "are loaded into the same elements" in found["up.weight"]


def test_a_computed_write_makes_all_tensors_of_its_parameter_misc():
    found = misc_of(compiled(UP, DOWN, Computed(frozenset({"up.weight"}), "fused", "it was scaled")))
    assert found == {"up.weight": "fused: it was scaled", "down.weight": "fused: it was scaled"}


def test_a_parameter_that_is_reported_as_loaded_without_a_write_leaves_the_trace_unsure():
    slots = (slot("fused"), slot("hidden"))
    trace = compiled(UP, slots=slots, reported=("fused", "hidden"))
    assert trace.unsure and trace.partial == {"fused"}
    assert misc_of(trace) == {"down.weight": "the loader reports hidden as loaded, but no copy was seen"}
    assert not compiled(UP, DOWN, slots=slots, reported=("fused",)).unsure


def test_a_tensor_that_is_stored_in_two_dtypes_is_misc():
    slots = (slot("fused"), slot("copy", 4, torch.float32))
    found = misc_of(compiled(UP, DOWN, Copied("up.weight", WHOLE, "copy", WHOLE), slots=slots))
    assert found == {"up.weight": "it is stored both as bfloat16 and as float32"}


def test_what_attention_takes_is_misc_and_deferred():
    slots = (slot("fused"), slot("scale", 4, deferred=True))
    trace = compiled(UP, Copied("down.weight", WHOLE, "scale", WHOLE), slots=slots)
    assert misc_of(trace) == {"down.weight": "scale belongs to attention, which vLLM finishes last"}
    assert trace.deferred == {"down.weight"} and trace.written == {"fused"}


def test_a_tensor_whose_values_the_loader_reads_is_misc():
    assert misc_of(compiled(UP, DOWN, read_values=("up.weight",))) == {
        "up.weight": "the loader reads its values on the host"
    }

"""The cyclic collector is put off while a plan is built, and never left in another state."""

import gc
import multiprocessing

import pytest

from refit.plan.collector import collector_paused


@pytest.fixture(autouse=True)
def collector_on():
    gc.enable()
    yield
    gc.enable()


def test_the_collector_is_off_inside_and_on_behind_also_after_an_error():
    with pytest.raises(KeyError), collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled(), "the inner block turned it on for the outer one"
        raise KeyError("x")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    with collector_paused():
        pass
    assert not gc.isenabled()


def values_made_inside(said):
    class Circle:
        alive = 0

        def __init__(self):
            self.itself = self
            Circle.alive += 1

        def __del__(self):
            Circle.alive -= 1

    with collector_paused():
        Circle()
        kept = [[number] for number in range(10_000)]
    said.put((gc.get_count()[0] < len(kept), Circle.alive, gc.collect() > 0, Circle.alive))


def test_values_made_inside_count_as_old_and_rubbish_made_inside_is_still_collected():
    """In a process of its own: whoever else has a thread in this one may be collecting, or have frozen its values."""
    spawn = multiprocessing.get_context("spawn")
    said = spawn.Queue()
    process = spawn.Process(target=values_made_inside, args=(said,), daemon=True)
    process.start()
    counted_as_old, alive_behind, found_rubbish, alive_at_the_end = said.get(timeout=60.0)
    process.join(10.0)
    assert counted_as_old, "the next scan of young values would walk them"
    assert alive_behind == 1
    assert found_rubbish
    assert alive_at_the_end == 0


def test_what_the_application_has_frozen_stays_frozen():
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with collector_paused():
            pass
        left = gc.get_freeze_count()  # a few frozen values may end meanwhile, by their reference count
        assert frozen - 1000 < left <= frozen
    finally:
        gc.unfreeze()

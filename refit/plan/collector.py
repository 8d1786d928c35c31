"""Building large values without the cyclic garbage collector running in between."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

MOST_FROZEN = 1000  # Python itself freezes some hundred values when it starts


@contextmanager
def collector_paused() -> Iterator[None]:
    """Put off cyclic collection inside the block; on as before behind it. Reference counting goes on.

    A plan is a hundred thousand values that refer to each other without a circle: there is nothing to collect, yet
    every scan walks all of them (two thirds of the time of a rank plan, measured). Behind the block they count as old,
    so that the next scan of young values does not walk them either. Nests, and threads may overlap.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if (
                gc.get_freeze_count() <= MOST_FROZEN
            ):  # else the application froze its own, and they stay frozen
                gc.freeze()  # all values to the permanent generation, without a scan,
                gc.unfreeze()  # and from there to the oldest
            gc.enable()

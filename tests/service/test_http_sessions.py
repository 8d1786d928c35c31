"""A failure ends the session in which it happened, for all ranks, and no other."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from refit.plan import PlanOptions
from refit.service.http_refit import HttpRefit, join_source
from refit.transfer.errors import RefitFailed, TransportError
from refit.transfer.source import ModelSource
from tests.service.receivers import SHAPES, Receiver, Rounds


class Stuck(Receiver):
    """Its first prepare hangs until `free`, and fails then, as an HTTP call does that runs into its time limit."""

    def __init__(self):
        super().__init__()
        self.free, self.ended = threading.Event(), threading.Event()
        self._is_first = True

    def prepare(self, info):
        if not self._is_first:
            return super().prepare(info)
        self._is_first = False
        self.free.wait(60.0)
        threading.Timer(0.5, self.ended.set).start()
        raise TransportError("no answer within 120 s")


def test_a_call_of_an_old_session_that_fails_late_does_not_end_the_next_one():
    stuck = Stuck()
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    options = PlanOptions(whitelist=(r".*proj\.weight",))
    refitter = HttpRefit.open([stuck], 1, timeout_s=3.0, options=options)
    joined = []

    def join(again):
        try:
            joined.append(join_source(ModelSource(tensors, 0), refitter.store, refitter.run_id, 3.0))
        except (RefitFailed, TransportError):
            assert not again

    for again in (False, True):
        beside = threading.Thread(target=join, args=(again,))
        beside.start()
        if again:
            refitter.prepare()
        else:
            with pytest.raises((RefitFailed, TransportError)):
                refitter.prepare()
        beside.join(30.0)
    stuck.free.set()
    assert stuck.ended.wait(30.0)
    assert refitter._session.control.failure() is None
    sending = threading.Thread(target=joined[0].send, args=(1,))
    sending.start()
    assert refitter.refit(1).committed
    sending.join(30.0)
    joined[0].close()
    stuck.close()
    refitter.close()


@pytest.mark.parametrize("step", ["pause", "finish"])
def test_a_trainer_hears_at_its_next_send_that_a_server_failed_after_the_last_one(step, monkeypatch):
    receiver = Receiver()
    done = getattr(receiver, step)

    def failing(*args):
        if step == "finish":
            done(*args)
        raise TransportError("the server went away")

    monkeypatch.setattr(receiver, step, failing)
    with Rounds(receiver) as rounds:
        with pytest.raises(TransportError, match="the server went away"):
            rounds.refit(1)
        started_s = time.monotonic()
        with pytest.raises(RefitFailed, match="the server went away"):
            rounds.source.send(2)
        assert time.monotonic() - started_s < 10.0
        monkeypatch.undo()
        rounds.rejoin()
        assert rounds.refit(3).committed

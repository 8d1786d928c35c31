"""Messages between ranks of one machine."""

import threading
import time

import pytest

from refit.transfer.errors import TransportError
from refit.transfer.rendezvous import ControlStore
from refit.transfer.transports.local_mail import LocalMail


@pytest.fixture
def boxes():
    control = ControlStore.host()
    deadline = time.monotonic() + 5
    here = {}

    def connect(rank):
        here[rank] = LocalMail.open(control, "mail", (4, 6), rank, deadline)

    threads = [threading.Thread(target=connect, args=(rank,)) for rank in (4, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    yield here
    for box in here.values():
        box.close()


def test_more_messages_than_the_kernel_keeps_all_arrive_in_order(boxes):
    sent = [b"%d" % number for number in range(500)]
    for message in sent:
        boxes[4].send(6, message)
    got = []
    deadline = time.monotonic() + 10
    while len(got) < len(sent) and time.monotonic() < deadline:
        got += boxes[6].messages()
        assert boxes[4].messages() == []
    assert got == [(4, message) for message in sent]


def test_a_peer_that_has_left_is_named(boxes):
    boxes[6].close()
    with pytest.raises(TransportError, match=r"message to rank 6: .* it has left"):
        boxes[4].send(6, b"hello")


def test_a_rank_on_another_machine_is_refused_by_both_names():
    control = ControlStore.host()
    control.put("mail/far/1", ["elsewhere", "/box"])
    with pytest.raises(TransportError, match="rank 1 on elsewhere; they can share no memory"):
        LocalMail.open(control, "far", (0, 1), 0, time.monotonic() + 5)


def test_closing_leaves_no_file(boxes):
    folder = boxes[4]._folder
    assert (folder / "box").exists()
    assert folder.stat().st_mode & 0o077 == 0
    boxes[4].close()
    assert not folder.exists()

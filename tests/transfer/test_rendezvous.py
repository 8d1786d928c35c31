"""The control store: JSON, deadlines, and one failure that everybody hears of."""

import os
import signal
import threading
import time

import pytest

from refit.transfer.errors import RefitFailed, TransportError
from refit.transfer.groups import open_group
from refit.transfer.rendezvous import ANSWER_S, PIECE_BYTES, ControlStore, answer_s
from refit.transfer.watch import Watch, silent_ranks
from tests.processes import Processes, run_processes


@pytest.fixture
def host():
    store = ControlStore.host()
    yield store
    store.close()


def test_a_put_value_comes_back_as_it_was(host):
    other = ControlStore.join("127.0.0.1", host.port, host.run_id)
    value = {"a": [1, 2.5, "x", None, True], "b": {"c": []}}
    host.put("key", value)
    assert other.get("key", 1.0) == value
    assert other.peek("absent") is None


def test_values_larger_than_one_piece_survive(host):
    value = os.urandom(PIECE_BYTES).hex()
    host.put("large", value)
    assert host.get("large", 1.0) == value


def test_forgetting_deletes_what_begins_with_a_prefix_and_nothing_of_another_run_id(host):
    other, longer = host.under(f"{host.run_id}-1"), host.under(f"{host.run_id}-10")
    for store in (host, other, longer):
        store.put("refit/1/report/0", os.urandom(PIECE_BYTES).hex())
        store.put("refit/10/report/0", "x")
        store.put("failed-not", "x")
    assert other.forget("refit/1/") == 2, "a large value is two keys"
    assert other.peek("refit/1/report/0") is None and other.peek("refit/10/report/0") == "x"
    assert other.forget() == 2
    assert other.peek("failed-not") is None
    for store in (host, longer):
        assert len(store.get("refit/1/report/0", 1.0)) == 2 * PIECE_BYTES
        assert store.peek("refit/10/report/0") == store.peek("failed-not") == "x"
    assert host._tcp_store.num_keys() == 8


def test_a_get_waits_for_a_later_put(host):
    other = ControlStore.join("127.0.0.1", host.port, host.run_id)
    threading.Timer(0.3, lambda: other.put("late", 1)).start()
    assert host.get("late", 5.0) == 1


def test_a_get_that_waits_in_vain_names_the_key_and_the_seconds(host):
    with pytest.raises(TransportError, match=r"'ready/3'.*within 0\.[2-9] s"):
        host.get("ready/3", 0.2)


def test_a_failure_ends_every_wait_and_the_first_one_wins(host):
    other = ControlStore.join("127.0.0.1", host.port, host.run_id)
    threading.Timer(0.2, lambda: other.fail("bulk", "gen 1", "its disk is gone")).start()
    began = time.monotonic()
    with pytest.raises(RefitFailed, match="gen 1: its disk is gone") as caught:
        host.get("never", 30.0)
    assert time.monotonic() - began < 5
    assert host.fail("misc", "gen 2", "a symptom") == caught.value.failure


def test_another_run_id_starts_without_that_failure(host):
    host.fail("bulk", "gen 1", "broken")
    fresh = host.under("second")
    assert fresh.failure() is None
    fresh.put("key", 1)
    assert host.peek("key") is None


def test_a_taken_port_is_refused_by_name(host):
    with pytest.raises(TransportError, match=rf"{host.port}.*choose another port"):
        ControlStore.host(port=host.port)


def test_a_store_that_nobody_hosts_is_reported_within_the_deadline():
    began = time.monotonic()
    with pytest.raises(TransportError, match=r"no control store answers at 127\.0\.0\.1:1"):
        ControlStore.join("127.0.0.1", 1, "run", 1.0)
    assert time.monotonic() - began < 8


def hosting_rank(rank: int, writer) -> None:
    store = ControlStore.host()
    writer.send(store.port)
    time.sleep(60)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGKILL, "is gone"), (signal.SIGSTOP, "is the process that hosts it stopped")],
)
def test_a_dead_or_stopped_host_is_an_error_and_not_a_hang(number, words):
    from tests.processes import CONTEXT

    reader, writer = CONTEXT.Pipe(duplex=False)
    with Processes(hosting_rank, 1, (writer,)) as processes:
        store = ControlStore.join("127.0.0.1", reader.recv(), "run")
        processes.signal(0, number)
        began = time.monotonic()
        with pytest.raises(TransportError, match=words):
            store.get("key", 2.0)
        assert time.monotonic() - began < 8


@pytest.mark.processes
@pytest.mark.slow
def test_a_host_that_is_late_with_an_answer_costs_nothing_while_the_time_out_allows_it():
    from tests.processes import CONTEXT

    reader, writer = CONTEXT.Pipe(duplex=False)
    with Processes(hosting_rank, 1, (writer,)) as processes:
        store = ControlStore.join("127.0.0.1", reader.recv(), "run", 120.0).under("another")
        processes.signal(0, signal.SIGSTOP)
        go_on = threading.Timer(ANSWER_S + 1.0, processes.signal, (0, signal.SIGCONT))
        go_on.start()
        store.put("key", 7)
        assert store.peek("key") == 7
        go_on.join()


@pytest.mark.parametrize(("timeout_s", "one_answer_s"), [(1.0, 5.0), (30.0, 5.0), (120.0, 20.0)])
def test_an_answer_may_take_the_longer_the_longer_the_whole_may(timeout_s, one_answer_s):
    assert answer_s(timeout_s) == one_answer_s


@pytest.mark.processes
def test_opening_a_group_ends_also_when_the_host_of_the_store_stands_still():
    from tests.processes import CONTEXT

    reader, writer = CONTEXT.Pipe(duplex=False)
    with Processes(hosting_rank, 1, (writer,)) as processes:
        store = ControlStore.join("127.0.0.1", reader.recv(), "run")
        stop = threading.Timer(0.5, processes.signal, (0, signal.SIGSTOP))
        stop.start()
        began = time.monotonic()
        with pytest.raises(TransportError, match="stopped"):
            open_group(store, "pair", (0, 1), 0, "gloo", began + 2.0)
        assert time.monotonic() - began < 30
        stop.join()


def test_a_watch_hears_of_a_failure_and_silence_is_seen(host):
    heard = threading.Event()
    watch = Watch.start(host, 0, heard.set)
    quiet = Watch.start(host, 1, lambda: None)
    time.sleep(0.3)
    assert silent_ranks(host, [0, 1, 2]) == (2,)
    quiet.close()
    host.fail("bulk", "gen 0", "x")
    assert heard.wait(2.0)
    assert silent_ranks(host, [0, 1]) == ()
    watch.close()


def test_a_rank_that_cannot_abort_its_groups_is_not_taken_for_dead(host):
    def stuck():
        raise RuntimeError("this group does not end")

    watch = Watch.start(host, 0, stuck)
    host.fail("bulk", "gen 0", "x")
    time.sleep(1.0)
    assert silent_ranks(host, [0]) == ()
    watch.close()


def greeting(rank: int) -> str:
    if rank == 1:
        raise ValueError("process 1 does not greet")
    return f"hello from {rank}"


def sleeping(rank: int) -> None:
    time.sleep(60)


@pytest.mark.processes
def test_the_process_runner_shows_tracebacks_and_leaves_nobody():
    assert run_processes(greeting, 1) == ("hello from 0",)
    with pytest.raises(AssertionError, match="process 1 does not greet"):
        run_processes(greeting, 2)
    with Processes(sleeping, 1) as processes, pytest.raises(TimeoutError, match=r"\[0\] of 1 still run"):
        os.kill(processes.pid(0), signal.SIGSTOP)
        processes.outcomes(0.5)
    with pytest.raises(ProcessLookupError):
        os.kill(processes.pid(0), 0)

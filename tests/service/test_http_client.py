"""The client of servers: what it says when a call fails, and rounds with receivers that are not vLLM."""

from __future__ import annotations

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from refit.plan.errors import ConfigError
from refit.service.http_engine import HttpEngine
from refit.service.http_refit import HttpRefit, join_source, next_version
from refit.transfer import endpoint
from refit.transfer.errors import RefitFailed, TransportError
from refit.transfer.groups import Groups
from refit.transfer.rendezvous import ControlStore
from refit.transfer.source import ModelSource
from tests.service.receivers import SHAPES, Receiver, Rounds


def test_two_servers_hold_each_version_that_was_committed():
    with Rounds(Receiver(), Receiver()) as rounds:
        for version in (1, 2):
            record = rounds.refit(version)
            assert record.committed and record.version == version
            assert record.digests_compared == 4 and record.wire_bytes == 2 * 96
            for receiver in rounds.receivers:
                assert receiver.version == version
                assert all(torch.equal(receiver.params[name], rounds.tensors[name]) for name in SHAPES)
    assert [receiver.stamps for receiver in rounds.receivers] == [[1, 2], [1, 2]]
    assert rounds.receivers[0].calls == ["wait", "finish", "forget", "resume"] * 2


def test_a_digest_that_differs_on_one_server_discards_the_version_on_both():
    with Rounds(Receiver(), Receiver(spoil=True)) as rounds:
        record = rounds.refit(1)
        assert not record.committed and "norm.weight on gen rank 1" in record.reason
        assert [receiver.version for receiver in rounds.receivers] == [None, None]
        assert [receiver.stamps for receiver in rounds.receivers] == [[None], [None]], "no new stamp"
        assert rounds.receivers[0].calls == ["finish"], "a discard lets the server sample on"


def test_a_server_that_fails_ends_the_round_for_all_and_is_named():
    with Rounds(Receiver(), Receiver(fails="out of memory")) as rounds:
        started_s = time.monotonic()
        with pytest.raises(RefitFailed, match="server 1: out of memory"):
            rounds.refit(1)
        assert time.monotonic() - started_s < 15.0
        assert [receiver.version for receiver in rounds.receivers] == [None, None]
        assert [receiver.stamps for receiver in rounds.receivers] == [[None], [None]]


def test_after_a_failure_the_next_session_goes_on_with_the_same_run_and_servers():
    with Rounds(Receiver(), Receiver()) as rounds:
        assert rounds.refit(1).committed
        rounds.receivers[1]._fails = "out of memory"
        with pytest.raises(RefitFailed, match="server 1: out of memory"):
            rounds.refit(2)
        rounds.receivers[1]._fails = ""
        with pytest.raises(RefitFailed, match="out of memory"):
            rounds.refit(2)  # the failure ended this session for all
        assert [receiver.version for receiver in rounds.receivers] == [1, 1]
        rounds.rejoin()
        for version in (2, 3):
            assert rounds.refit(version).committed
            for receiver in rounds.receivers:
                assert receiver.version == version
                assert all(torch.equal(receiver.params[name], rounds.tensors[name]) for name in SHAPES)


def test_a_version_that_a_server_has_already_is_refused_by_both_sides_at_once():
    with Rounds(Receiver(), Receiver()) as rounds:
        assert rounds.refit(5).committed
        for version in (5, 4):
            started_s = time.monotonic()
            with pytest.raises(
                RefitFailed, match=f"versions only grow: server 0 serves 5, so it cannot go to {version}"
            ):
                rounds.refit(version)
            assert time.monotonic() - started_s < 15.0
            assert [receiver.version for receiver in rounds.receivers] == [5, 5]
            rounds.rejoin()
        assert rounds.refit(6).committed


def test_the_keys_in_the_store_do_not_grow_with_the_refits():
    with Rounds(Receiver()) as rounds:
        store = rounds.refitter._control._tcp_store
        assert rounds.refit(1).committed
        await_that(
            lambda: sum("/pulse/" in key for key in store.list_keys()) == 2
        )  # of one trainer, one receiver
        first = store.num_keys()
        for version in range(2, 5):
            assert rounds.refit(version).committed
            await_that(lambda: store.num_keys() == first)
        rounds.rejoin()
        assert rounds.refit(9).committed
        await_that(lambda: store.num_keys() == first)


def await_that(condition):
    """Pulses come and go on threads of their own."""
    deadline_s = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.parametrize("step", ["params", "export"])
def test_a_source_that_cannot_give_its_weights_ends_the_round_for_all_and_is_named(step, monkeypatch):
    def broken(*_, **__):
        raise ValueError("weights went away")

    with Rounds(Receiver()) as rounds:
        monkeypatch.setattr(ModelSource, step, broken)
        started_s = time.monotonic()
        with pytest.raises(RefitFailed, match=rf"phase '{step}'.*train 0.*weights went away"):
            rounds.refit(1)
        assert time.monotonic() - started_s < 15.0
        assert rounds.receivers[0].version is None


def test_a_rank_that_fails_after_its_groups_are_open_ends_prepare_for_all_and_closes_them(monkeypatch):
    closed = []
    close = Groups.close
    monkeypatch.setattr(Groups, "close", lambda groups: (closed.append(groups), close(groups)))

    def broken(*_, **__):
        raise MemoryError("no room for the tables")

    monkeypatch.setattr(endpoint, "compile_stage", broken)
    started_s = time.monotonic()
    with pytest.raises(RefitFailed, match="no room for the tables"):
        Rounds(Receiver())
    assert time.monotonic() - started_s < 15.0
    assert closed


def test_a_server_that_did_not_commit_stays_paused_and_is_named_while_the_other_samples_on():
    with Rounds(Receiver(), Receiver(commits=False)) as rounds:
        with pytest.raises(RefitFailed, match=r"gen ranks \[1\] did not; restart their servers"):
            rounds.refit(1)
        assert [receiver.version for receiver in rounds.receivers] == [1, None]
        assert rounds.receivers[0].calls == ["wait", "finish", "forget", "resume"]
        assert rounds.receivers[1].calls == ["wait", "finish"]


def test_a_server_that_does_not_pause_discards_the_version_on_both(monkeypatch):
    stuck = Receiver()

    def never(mode):
        raise TransportError("requests have not ended")

    monkeypatch.setattr(stuck, "pause", never)
    with Rounds(Receiver(), stuck) as rounds:
        with pytest.raises(TransportError, match="requests have not ended"):
            rounds.refit(1)
        assert [receiver.version for receiver in rounds.receivers] == [None, None]
        assert rounds.receivers[0].calls == ["wait", "finish", "resume"]


def test_a_server_that_keeps_the_old_prefixes_stays_paused_and_is_named(monkeypatch):
    keeps = Receiver()

    def kept():
        raise TransportError("server 1 keeps its prefix cache")

    monkeypatch.setattr(keeps, "forget_prefixes", kept)
    with Rounds(Receiver(), keeps) as rounds:
        with pytest.raises(TransportError, match="server 1 keeps its prefix cache"):
            rounds.refit(1)
        assert rounds.receivers[0].calls == ["wait", "finish", "forget", "resume"]
        assert keeps.version == 1 and keeps.calls == ["wait", "finish"]


def test_a_prepare_that_failed_has_waited_for_what_it_asked_of_the_servers(monkeypatch):
    slow, broken, ended = Receiver(), Receiver(), threading.Event()
    prepare = slow.prepare

    def late(info):
        try:
            prepare(info)
        finally:
            time.sleep(1.0)
            ended.set()

    def failing(info):
        raise TransportError("no such model")

    monkeypatch.setattr(slow, "prepare", late)
    monkeypatch.setattr(broken, "prepare", failing)
    refitter = HttpRefit.open([slow, broken], 1, timeout_s=20.0)
    with pytest.raises(RefitFailed, match="server 1: no such model"):
        refitter.prepare()
    assert ended.is_set()
    refitter.close()


def test_trainers_that_send_another_version_than_was_asked_for_end_the_round():
    with Rounds(Receiver()) as rounds:
        send = rounds.source.send
        rounds.source.send = lambda version: send(version + 1)
        with pytest.raises(
            TransportError, match="moved version 2 in attempt 1, the coordinator asked for version 1"
        ):
            rounds.refit(1)
        assert rounds.receivers[0].version is None


class Answers(BaseHTTPRequestHandler):
    """404 for unknown routes, 500 with words for one, JSON for one."""

    def do_GET(self):
        known = {"/weight_info": (200, b'{"weight_version": "7"}'), "/health": (200, b"")}
        self.answer(*known.get(self.path, (404, b"no such route")))

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        known = {
            "/start_weight_update": (500, b"engine dead"),
            "/reset_prefix_cache": (200, b'{"success": false}'),
        }
        self.answer(*known.get(self.path, (404, b"no such route")))

    def answer(self, code, body):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def engine():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield HttpEngine(f"http://127.0.0.1:{server.server_address[1]}/", timeout_s=5.0)
    server.shutdown()
    server.server_close()


def test_an_answer_that_is_an_error_is_quoted_with_its_route(engine):
    engine.wait_ready(5.0)
    assert engine.weight_version() == "7"
    with pytest.raises(
        TransportError, match=r"POST http://.*/start_weight_update answered 500: engine dead$"
    ):
        engine.stage(1, 1, False)
    with pytest.raises(TransportError, match=r"404.*VLLM_SERVER_DEV_MODE=1"):
        engine.prepare({})
    with pytest.raises(TransportError, match="keeps its prefix cache"):
        engine.forget_prefixes()


def test_a_server_that_is_not_there_is_an_error_in_time():
    engine = HttpEngine("http://127.0.0.1:9", timeout_s=1.0)
    with pytest.raises(TransportError, match=r"127.0.0.1:9 is not ready after 1 s"):
        engine.wait_ready(1.0)


def test_an_address_without_a_scheme_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"'gen-0:8000' is no address of a server; write http://HOST:PORT"):
        HttpEngine("gen-0:8000")


def test_a_refused_connection_is_not_called_a_missing_answer():
    with pytest.raises(TransportError, match=r"/get_world_size.* failed: .*refused.*vLLM server") as failed:
        HttpEngine("http://127.0.0.1:9", timeout_s=60.0).num_workers()
    assert "60 s" not in str(failed.value)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "answered no JSON: 'hello'"),
        (b"220 mail.example ready\r\n", "failed: BadStatusLine"),
        (None, "got no answer within 1 s"),
    ],
)
def test_whoever_is_no_vllm_server_is_told_by_what_it_answers(answer, says):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer_once, args=(listener, answer), daemon=True)
        thread.start()
        with pytest.raises(TransportError) as failed:
            HttpEngine(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.6).num_workers()
        assert says in str(failed.value)
        thread.join(10.0)


def answer_once(listener, answer):
    connection, _ = listener.accept()
    with connection:
        connection.recv(4096)
        if answer is None:
            connection.recv(1)  # until the caller gives up
        else:
            connection.sendall(answer)


def test_the_next_version_is_above_what_every_server_serves():
    fresh, old, newer = Receiver(), Receiver(), Receiver()
    old.version, newer.version = 4, 7
    assert next_version([fresh]) == 1
    assert next_version([old, newer, fresh]) == 8


def test_joining_that_fails_gives_the_connection_to_the_store_back():
    host = ControlStore.host(run_id="nobody")
    name = f"the control store at {host.address}:{host.port}"

    def connections():
        return sum(thread.name == name for thread in threading.enumerate())

    before = connections()
    source = ModelSource({"norm.weight": torch.zeros(4)}, 0)
    with pytest.raises(TransportError, match="no session"):
        join_source(source, f"{host.address}:{host.port}", "nobody", 0.5)
    deadline_s = time.monotonic() + 20.0
    while connections() > before and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert connections() == before
    host.close()

"""The control store: JSON messages between all ranks and the coordinator, over a TCPStore under a run id.

Every key lives under `refit/<run_id>/`. The key `failed` is written once: the first failure wins and is what
everybody reports. A new attempt after a failure takes a new run id (`under`).
"""

import json
import socket
import time
import zlib
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from refit.transfer.bounded import BoundedCalls
from refit.transfer.errors import Failure, RefitFailed, TransportError

FAILED = "failed"
PIECE_BYTES = 4 << 20  # TCPStore's libuv server drops a connection that sends a value above 8 MiB
POLL_S = (0.005, 0.1)  # first and longest pause between two looks at a key
ANSWER_S = 5.0  # longest wait for one answer of the store itself, unless a long time-out allows more
ANSWER_SHARE = 6  # of a time-out: all ranks ask at once for what may be megabytes, and one server answers


class ControlStore:
    """A client of the store; made by `host` (coordinator), `join` (everybody else) or `under` (another run id)."""

    def __init__(
        self, store: TCPStore, calls: BoundedCalls, address: str, run_id: str, answer_s: float
    ) -> None:
        self._tcp_store = store
        self._calls = calls
        self.address = address
        self.port: int = store.port
        self.run_id = run_id
        self._answer_s = answer_s
        self._store = PrefixStore(f"refit/{run_id}", store)

    @classmethod
    def host(
        cls, address: str = "127.0.0.1", port: int = 0, run_id: str = "run", timeout_s: float = 30.0
    ) -> "ControlStore":
        """Serve the store at `address` only (not on all interfaces). Port 0 takes a free one; see `.port`.

        `timeout_s` bounds the opening, and each answer as `answer_s` says.
        """
        try:
            listener = socket.create_server((address, port))
        except OSError as error:
            raise TransportError(
                f"the control store cannot listen on {address}:{port}: {error}; choose another port, or 0 for any"
            ) from error
        port = listener.getsockname()[1]
        return cls._open(address, port, run_id, timeout_s, listener.detach())

    @classmethod
    def join(cls, address: str, port: int, run_id: str, timeout_s: float = 30.0) -> "ControlStore":
        """Connect to a store that another process hosts. Raises TransportError when nobody answers in `timeout_s`.

        It also bounds each answer to come, as `answer_s` says.
        """
        return cls._open(address, port, run_id, timeout_s, None)

    @classmethod
    def _open(
        cls, address: str, port: int, run_id: str, timeout_s: float, listen_fd: int | None
    ) -> "ControlStore":
        calls = BoundedCalls(f"the control store at {address}:{port}")

        def connect() -> TCPStore:
            limit = timedelta(seconds=timeout_s)
            is_host = listen_fd is not None
            return TCPStore(
                address, port, None, is_host, limit, wait_for_workers=False, master_listen_fd=listen_fd
            )

        try:
            store = calls.run(connect, timeout_s + ANSWER_S)
        except RuntimeError as error:
            raise TransportError(
                f"no control store answers at {address}:{port} within {timeout_s:.1f} s: {_first_line(error)}"
            ) from error
        return cls(store, calls, address, run_id, answer_s(timeout_s))

    def under(self, run_id: str) -> "ControlStore":
        """The same connection under another run id: fresh keys, and no failure yet."""
        return ControlStore(self._tcp_store, self._calls, self.address, run_id, self._answer_s)

    def put(self, key: str, message: object) -> None:
        """Publish a JSON value, which must not be null. A second put of a key replaces the value."""
        assert message is not None, f"{key!r}: null is what `peek` returns for a key that nobody has put"
        blob = zlib.compress(json.dumps(message, separators=(",", ":"), allow_nan=False).encode(), 1)
        pieces = [blob[at : at + PIECE_BYTES] for at in range(0, len(blob), PIECE_BYTES)]
        for number, piece in enumerate(pieces[1:], start=1):
            self._set(f"{key}#{number}", piece)
        self._set(key, b"%d:" % len(pieces) + pieces[0])

    def peek(self, key: str) -> object | None:
        """The value of a key, or None if nobody has put it. Does not wait."""
        if not self._call(lambda: self._store.check([key])):
            return None
        count, _, first = self._get(key).partition(b":")
        blob = first + b"".join(self._get(f"{key}#{number}") for number in range(1, int(count)))
        value: object = json.loads(zlib.decompress(blob))
        return value

    def put_bytes(self, key: str, payload: bytes) -> None:
        """Publish raw bytes, for one reader: `take_bytes` frees them."""
        for number, at in enumerate(range(0, len(payload), PIECE_BYTES)):
            self._set(f"{key}#{number}", payload[at : at + PIECE_BYTES])

    def take_bytes(self, key: str, num_bytes: int) -> bytearray:
        """The bytes of a key that is known to be there, which the store then forgets."""
        found = bytearray()
        for number in range(-(-num_bytes // PIECE_BYTES)):
            found += self._get(f"{key}#{number}")
            self.drop(f"{key}#{number}")
        if len(found) != num_bytes:
            raise TransportError(
                f"{key!r} holds {len(found)} bytes in the control store, {num_bytes} were promised"
            )
        return found

    def drop(self, key: str) -> None:
        """Delete one key, of a longer value its first piece."""
        self._call(lambda: self._store.delete_key(key))

    def count(self, key: str, by: int) -> int:
        """Add to a counter that all clients share, and return its new value; 0 before anybody has added."""
        return int(self._call(lambda: self._store.add(key, by)))

    def get(self, key: str, timeout_s: float) -> object:
        """Wait for a key. Raises RefitFailed as soon as anybody failed, TransportError after `timeout_s`."""
        start = time.monotonic()
        pause = POLL_S[0]
        while True:
            self.raise_if_failed()
            if (value := self.peek(key)) is not None:
                return value
            waited = time.monotonic() - start
            if waited >= timeout_s:
                raise TransportError(
                    f"nobody put {key!r} into the control store at {self.address}:{self.port} (run {self.run_id!r}) "
                    f"within {waited:.1f} s; the rank that owes it is dead, stuck or slower than the time-out"
                )
            time.sleep(min(pause, timeout_s - waited))
            pause = min(2 * pause, POLL_S[1])

    def get_final(self, key: str, timeout_s: float) -> object:
        """Like `get`, but a value that is already there counts even if somebody has failed since."""
        value = self.peek(key)
        return self.get(key, timeout_s) if value is None else value

    def forget(self, prefix: str = "") -> int:
        """Delete every key of this run id that begins with `prefix`, which nobody will read any more; how many."""
        start = f"refit/{self.run_id}/{prefix}"  # by full names: to torch 2.13 run "a-10" lies under the prefix "a-1"
        keys = [key for key in self._call(self._tcp_store.list_keys) if key.startswith(start)]  # type: ignore[attr-defined]
        for key in keys:
            self._call(lambda key=key: self._tcp_store.delete_key(key))  # type: ignore[misc]
        return len(keys)

    def fail(self, phase: str, who: str, message: str) -> Failure:
        """Report a failure to everybody. Returns the failure that stands: the first one, which may be another's."""
        text = json.dumps([phase, who, message])
        return _failure(self._call(lambda: self._store.compare_set(FAILED, "", text)))

    def failure(self) -> Failure | None:
        """The first failure of this run id, or None."""
        if not self._call(lambda: self._store.check([FAILED])):
            return None
        return _failure(self._call(lambda: self._store.get(FAILED)))

    def raise_if_failed(self) -> None:
        """Raise RefitFailed with the root cause if anybody has failed."""
        if (failure := self.failure()) is not None:
            raise RefitFailed(failure)

    def group_store(self, name: str) -> Store:
        """A store for the rendezvous of a process group, on a connection of its own, since its reads block."""
        own_connection = self._call(self._tcp_store.clone)  # type: ignore[attr-defined]  # missing in the stub
        return PrefixStore(f"refit/{self.run_id}/group/{name}", own_connection)

    def close(self) -> None:
        """Give the connection up; on the host the server ends with the last reference to it."""
        self._calls.close()

    def _set(self, key: str, value: bytes) -> None:
        self._call(lambda: self._store.set(key, value))  # type: ignore[arg-type]  # the stub says str, bytes go as well

    def _get(self, key: str) -> bytes:
        return self._call(lambda: self._store.get(key))

    def _call[T](self, call: Callable[[], T]) -> T:
        try:
            return self._calls.run(call, self._answer_s)
        except TransportError:
            raise
        except RuntimeError as error:
            raise TransportError(
                f"the control store at {self.address}:{self.port} is gone ({_first_line(error)}); its host died"
            ) from error


def answer_s(timeout_s: float) -> float:
    """How long one answer of the store may take, for who has `timeout_s` for the whole of something."""
    return max(ANSWER_S, timeout_s / ANSWER_SHARE)


def _failure(text: bytes) -> Failure:
    phase, who, message = json.loads(text)
    return Failure(phase, who, message)


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__

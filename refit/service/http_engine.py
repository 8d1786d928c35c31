"""A stock `vllm serve` as a generator, by its own HTTP routes; needs no Ray, no vLLM and no Megatron on this side.

The server is started by whoever runs it, with the refit package installed next to vLLM:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "refit"}'

vLLM offers the weight-transfer routes in development mode only: they are for a private network, like the control store.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Literal

from refit.plan.errors import ConfigError
from refit.transfer.errors import TransportError

READY_POLL_S = 0.5

type PauseMode = Literal["abort", "wait", "keep"]


class HttpEngine:
    """One server. Every call has a time limit, and a failure names the address, the route and the answer."""

    def __init__(self, url: str, timeout_s: float = 120.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is no address of a server; write http://HOST:PORT")
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s

    def wait_ready(self, timeout_s: float) -> None:
        """Until the server answers. Raises TransportError after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                self._call("GET", "/health", None)
            except TransportError as error:
                if time.monotonic() >= deadline_s:
                    raise TransportError(
                        f"{self.url} is not ready after {timeout_s:.0f} s: {error}"
                    ) from error
                time.sleep(READY_POLL_S)
            else:
                return

    def num_workers(self) -> int:
        """How many generator ranks the server has: TP x PP. Data parallel servers are one HttpEngine each."""
        return int(self._call("GET", "/get_world_size?include_dp=false", None)["world_size"])

    def weight_version(self) -> str:
        """The version that the server stamps on its outputs; "default" before anybody has set one."""
        return str(self._call("GET", "/weight_info", None)["weight_version"])

    def pause(self, mode: PauseMode) -> None:
        """Stop sampling: what runs is aborted, awaited, or frozen until `resume`."""
        self._call("POST", f"/pause?mode={mode}", None)

    def resume(self) -> None:
        self._call("POST", "/resume", None)

    def forget_prefixes(self) -> None:
        """Drop keys and values of finished requests: the old weights computed them. Raises TransportError if kept."""
        if not self._call("POST", "/reset_prefix_cache", None)["success"]:
            raise TransportError(
                f"{self.url} keeps its prefix cache, which the old weights filled, since requests hold on to it: it "
                f"stays paused; end them, then POST /reset_prefix_cache and /resume, or restart it"
            )

    def prepare(self, init_info: Mapping[str, Any]) -> None:
        """Let every worker describe itself and join. The outcome is in the control store."""
        self._call("POST", "/init_weight_transfer_engine", {"init_info": dict(init_info)})

    def stage(self, version: int, attempt: int, background: bool) -> None:
        """Receive a version beside the weights that serve. The outcome is in the control store.

        vLLM samples no token during the call; with `background`, for plans without misc, it only starts the receive.
        """
        update = {"version": version, "attempt": attempt, "background": background}
        self._call("POST", "/start_weight_update", None)
        self._call("POST", "/update_weights", {"update_info": update})

    def finish(self, version: int | None) -> None:
        """Let the workers carry out the decision in the control store; `version` None: do not stamp a new one."""
        body = None if version is None else {"weight_version": str(version)}
        self._call("POST", "/finish_weight_update", body)

    def _call(self, method: str, route: str, body: Mapping[str, Any] | None) -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(  # noqa: S310  the address is the caller's own
            self.url + route, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:  # noqa: S310
                text = answer.read()
        except urllib.error.HTTPError as error:
            words = error.read().decode(errors="replace")[:300]
            hint = (
                "; start the server with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config"
                if error.code == 404
                else ""
            )
            raise TransportError(
                f"{method} {self.url}{route} answered {error.code}: {words}{hint}"
            ) from error
        except TimeoutError as error:
            raise TransportError(
                f"{method} {self.url}{route} got no answer within {self._timeout_s:.0f} s"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            raise TransportError(
                f"{method} {self.url}{route} failed: {cause!r}; is a vLLM server there?"
            ) from error
        return _document(text, f"{method} {self.url}{route}") if text.strip() else {}


def _document(text: bytes, call: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        words = text[:80].decode(errors="replace")
        raise TransportError(f"{call} answered no JSON: {words!r}; is a vLLM server there?") from error

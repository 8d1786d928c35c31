"""The requests of one engine: stepped by the thread that waits for the answers, while another changes the weights.

Weights change only between two steps, so every token is sampled by one whole version, and is stamped with it. How the
requests under way meet a change is the pause policy: `wait` lets them end first and holds new ones back, `abort` drops
them and asks again under the new weights, `keep` freezes them and goes on. With `keep` the tokens of one answer may
come from several versions. `kv_cache`: `clear` computes all keys and values anew under the new weights, `keep` uses
what the old ones computed.

vLLM 0.31, engine core in this process: its scheduler's own pause and resume.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from refit.transfer.errors import TransportError

type Prompt = Sequence[int] | torch.Tensor
"""Token ids, or embeddings [tokens, hidden]."""

WAIT, ABORT, KEEP, CLEAR = "wait", "abort", "keep", "clear"
YIELD_S = 0.001


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer. `logprobs` are of the sampled tokens, raw: before any temperature. The end token is included.

    `spans` says which version sampled how many tokens, in order: ((3, 5), (4, 2)) is five by 3, then two by 4.
    """

    prompt_index: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def weight_version(self) -> int:
        """The newest version in it."""
        return self.spans[-1][0]


@dataclass(slots=True)
class _Answer:
    """One answer under way."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)

    def add(self, tokens: Sequence[int], logprobs: Sequence[float], version: int) -> None:
        if not tokens:
            return
        if self.spans and self.spans[-1][0] == version:
            self.spans[-1] = (version, self.spans[-1][1] + len(tokens))
        else:
            self.spans.append((version, len(tokens)))
        self.tokens += tokens
        self.logprobs += logprobs


class Requests:
    """All requests of one engine. One thread at a time may be in `answer`; any other may take a turn between steps."""

    def __init__(self, llm: Any, version: Callable[[], int]) -> None:
        self._llm = llm
        self._version = version
        self._caller = threading.Lock()
        self._turn = threading.RLock()
        self._num_asking = 0
        self._admitting = threading.Event()
        self._admitting.set()
        self._open: dict[str, tuple[int, Any, Any]] = {}
        self._answers: dict[tuple[int, int], _Answer] = {}
        self._num_requests = 0
        self.halt_s = 0.0
        self.adapter: Any = None
        """vLLM's LoRARequest for the requests to come; None: the base model answers."""

    @property
    def busy(self) -> bool:
        """Whether any request is under way."""
        return bool(self._open)

    def answer(self, inputs: Sequence[Any], sampling: Sequence[Any], timeout_s: float) -> list[Sample]:
        """The answers to all inputs, in order; each `sampling[i].n` times. Raises TransportError after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        with self._caller:
            self._answers = {}
            self._admit(inputs, sampling, timeout_s)
            try:
                self._run(deadline_s, timeout_s)
            except BaseException:
                with self.between_steps():
                    self._drop()  # else the next call would get these tokens too
                raise
            found = self._answers
        return [
            Sample(number, tuple(one.tokens), tuple(one.logprobs), tuple(one.spans))
            for (number, _), one in sorted(found.items())
        ]

    def _admit(self, inputs: Sequence[Any], sampling: Sequence[Any], timeout_s: float) -> None:
        """Add all requests at once, when no pause is on."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            if not self._admitting.wait(max(0.0, deadline_s - time.monotonic())):
                raise TransportError(f"generate: the engine was paused for {timeout_s:.0f} s")
            with self.between_steps():
                if self._admitting.is_set():  # else a pause began meanwhile
                    for number, (one, params) in enumerate(zip(inputs, sampling, strict=True)):
                        self._add(number, one, params)
                    return

    def _run(self, deadline_s: float, timeout_s: float) -> None:
        while True:
            if self._num_asking:
                time.sleep(YIELD_S)  # locks are not fair: without this nobody else would get a turn
            with self._turn:
                if not self._open:  # read in a turn: amid another's, requests to be asked again are missing
                    return
                if time.monotonic() > deadline_s:
                    late = f"generate: {len(self._open)} requests are open after {timeout_s:.0f} s"
                    raise TransportError(late)
                self._step()

    @contextlib.contextmanager
    def between_steps(self, timeout_s: float = threading.TIMEOUT_MAX) -> Iterator[None]:
        """Inside, no step runs; requests under way wait. Raises TransportError when there is no turn in time."""
        self._num_asking += 1
        try:
            taken = self._turn.acquire(timeout=timeout_s)
        finally:
            self._num_asking -= 1
        if not taken:
            raise TransportError(
                f"there was no turn between two steps of the engine within {timeout_s:.0f} s"
            )
        try:
            yield
        finally:
            self._turn.release()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no request is under way and none is taken: the caller may step the engine himself."""
        with self._caller, self.between_steps():
            yield

    @contextlib.contextmanager
    def paused(self, policy: str, kv_cache: str, timeout_s: float) -> Iterator[None]:
        """Inside, the weights may change. Raises TransportError when `wait` has not ended all requests in time.

        Afterwards `halt_s` says how long no step could run: from the end of the last one until the next may begin.
        """
        self._admitting.clear()
        try:
            if policy == WAIT:
                self._drain(timeout_s)
            with self.between_steps():
                began_s = time.monotonic()
                core = self._llm.llm_engine.engine_core.engine_core
                dropped = self._drop() if policy == ABORT else []
                try:
                    self._take_back(core)
                    _hold(core, policy, clear_cache=kv_cache == CLEAR)
                    yield
                finally:
                    core.resume_scheduler()
                    for number, one, params in dropped:
                        self._add(number, one, params)
                    self.halt_s = time.monotonic() - began_s
        finally:
            self._admitting.set()

    def _drain(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            with self.between_steps():
                if not self._open:  # seen in a turn while nobody is admitted, so it stays so
                    return
            if time.monotonic() > deadline_s:
                raise TransportError(
                    f"pause: {len(self._open)} requests have not ended within {timeout_s:.0f} s; "
                    "refit.pause can be abort or keep"
                )
            time.sleep(YIELD_S)

    def _take_back(self, core: Any) -> None:
        """Wait for the batches that the workers still have; their tokens are the old version's.

        A pipeline, and asynchronous scheduling, keep batches under way between two steps. Inside `between_steps`.
        """
        from vllm.v1.core.sched.interface import PauseState

        if not core.batch_queue:  # None where each step ends with its own batch
            return
        core.scheduler.set_pause_state(PauseState.PAUSED_ALL)  # schedule nothing more
        while core.batch_queue:
            self._step()

    def _drop(self) -> list[tuple[int, Any, Any]]:
        """Abort what is under way, and forget its tokens; returns what is to be asked again."""
        dropped = list(self._open.values())
        self._llm.llm_engine.abort_request(list(self._open))
        self._open.clear()
        again = {number for number, _, _ in dropped}
        self._answers = {key: one for key, one in self._answers.items() if key[0] not in again}
        return dropped

    def _add(self, number: int, one: Any, params: Any) -> None:
        self._num_requests += 1
        name = f"refit-{self._num_requests}"
        self._llm.llm_engine.add_request(name, one, params.clone(), lora_request=self.adapter)
        self._open[name] = (number, one, params)

    def _step(self) -> None:
        version = self._version()
        for output in self._llm.llm_engine.step():
            if output.request_id not in self._open:
                continue  # the last word of a request that was aborted
            number = self._open[output.request_id][0]
            for part in output.outputs:
                answer = self._answers.setdefault((number, part.index), _Answer())
                answer.add(part.token_ids, _logprobs(part), version)
            if output.finished:
                del self._open[output.request_id]


def _hold(core: Any, policy: str, clear_cache: bool) -> None:
    """What `core.pause_scheduler` does, less three calls of the workers that a model of text alone can do without.

    Two of them empty caches of images, which such a model does not have. The third waits for the device, which
    `refit_finish` does in the same call as the commit.
    """
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.request import RequestStatus

    if core.vllm_config.model_config.is_multimodal_model:
        core.pause_scheduler(KEEP if policy == KEEP else ABORT, clear_cache=clear_cache)
        return
    if policy != KEEP:
        core.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    core.scheduler.set_pause_state(PauseState.PAUSED_ALL if policy == KEEP else PauseState.PAUSED_NEW)
    if clear_cache and not core.reset_prefix_cache(reset_running_requests=True, reset_connector=True):
        raise TransportError("pause: vLLM could not empty its cache of keys and values")


def as_input(prompt: Prompt) -> dict[str, Any]:
    """A prompt as vLLM takes it."""
    if isinstance(prompt, torch.Tensor):
        return {"prompt_embeds": prompt}
    return {"prompt_token_ids": list(prompt)}


def prompt_logprobs(llm: Any, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probability of every token of each prompt after its first, given those before it; all in one batch."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([as_input(prompt) for prompt in prompts], sampling, use_tqdm=False)
    return [
        [
            float(entry[token].logprob)
            for token, entry in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
            if entry is not None  # the first token has nothing before it
        ]
        for output in outputs
    ]


def forced_logprobs(llm: Any, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    """The same numbers as `prompt_logprobs`, one request per token: its prefix, and no other answer allowed.

    For engines whose ranks run by themselves (external launcher): with pipeline stages vLLM 0.31 hands the scores of a
    prompt to no rank but the last, while each rank must come to the same answers.
    """
    from vllm import SamplingParams

    places = [(prompt, at) for prompt in prompts for at in range(1, len(prompt))]
    sampling = [
        SamplingParams(
            max_tokens=1, temperature=0.0, logprobs=0, allowed_token_ids=[prompt[at]], detokenize=False
        )
        for prompt, at in places
    ]
    outputs = iter(llm.generate([as_input(prompt[:at]) for prompt, at in places], sampling, use_tqdm=False))
    return [[_logprobs(next(outputs).outputs[0])[0] for _ in prompt[1:]] for prompt in prompts]


def _logprobs(part: Any) -> list[float]:
    return [
        float(entry[token].logprob) for token, entry in zip(part.token_ids, part.logprobs or (), strict=True)
    ]

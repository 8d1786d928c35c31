"""One vLLM engine, that is one replica: prompts in, tokens with their logprobs out, refitted in place.

A Generator lives in one process (for instance a Ray actor). With one rank the engine runs in that process; with
more, vLLM starts one process per rank. vLLM is imported by `build`, never by importing this module.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refit.gen_side import bounds
from refit.gen_side.arguments import build_llm, stop_tokens_of
from refit.gen_side.live.configuration import EngineDescription, WorkerFacts
from refit.gen_side.live.desk import Desk
from refit.gen_side.requests import Prompt, Requests, Sample, as_input, prompt_logprobs
from refit.plan.errors import ConfigError
from refit.transfer.errors import Failure, RefitFailed, TransportError
from refit.transfer.protocol import decision_key
from refit.transfer.rendezvous import ControlStore

DESK_S = 10.0  # longest wait until reads are taken; a refit does not need them
POLL_S = 0.005
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class GenParallel:
    """vLLM's layout: ranks = tensor * pipeline; `expert` spreads the experts over the tensor ranks."""

    tensor: int = 1
    pipeline: int = 1
    expert: bool = False

    def __post_init__(self) -> None:
        if min(self.tensor, self.pipeline) < 1:
            raise ConfigError(f"tensor {self.tensor} and pipeline {self.pipeline} must be at least 1")

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.pipeline


@dataclass(frozen=True, slots=True)
class GenOptions:
    """What an engine is built with. `call_timeout_s` bounds generation; refits carry their own time-out.

    `pause` and `kv_cache` say what a commit does to requests under way; see `refit.gen_side.requests`.
    `sequence_parallel` asks for vLLM's pass, from `sequence_min_tokens` tokens on (None: as vLLM sees fit); whether it
    runs is in `Generator.describe`. `prompt_embeds`: prompts may be embeddings.

    With `lora`, the fields of `refit.gen_side.lora.LoraSpec`, refits bring adapters and the base stays as loaded.
    """

    dtype: str = "bfloat16"
    seed: int = 0
    max_model_len: int = 256
    max_num_seqs: int = 64
    kv_cache_bytes: int = 64 << 20
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = True
    prefix_caching: bool = False
    pause: str = "wait"
    kv_cache: str = "clear"
    sequence_parallel: bool = False
    sequence_min_tokens: int | None = None
    prompt_embeds: bool = False
    call_timeout_s: float = 600.0
    lora: Mapping[str, Any] | None = None


class Generator:
    """Build, use, close; every call has a deadline, and after a missed one the engine's workers are gone."""

    def __init__(
        self, llm: Any, options: GenOptions, stop_tokens: tuple[int, ...], children: set[Any]
    ) -> None:
        self._llm = llm
        self._requests = Requests(llm, self.weight_version)
        self._options = options
        self.finish_reports: tuple[dict[str, object], ...] = ()
        """What the last commit cost each worker: messages of FinishReport."""
        self._updating = False
        self._stop_tokens = stop_tokens
        self._children, self._segments = children, bounds.segments_of(children)
        self._queues = bounds.message_queues(llm)
        self._control: ControlStore | None = None
        self._desk: Desk | None = None
        self._timeout_s = options.call_timeout_s
        self._staged: tuple[int, int] | None = None
        self._failure = ""
        self._committed: int | None = None

    @classmethod
    def build(
        cls, model_dir: str | Path, parallel: GenParallel, options: GenOptions, timeout_s: float
    ) -> Generator:
        """Start an engine on the HF checkpoint in `model_dir`. It serves version 0.

        Raises ConfigError when the folder is no checkpoint, TransportError when it is not ready in time.
        """
        stop_tokens = stop_tokens_of(Path(model_dir))
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        before = bounds.children()
        try:
            with bounds.deadline("building the engine", timeout_s, lambda: bounds.children() - before):
                llm = build_llm(str(model_dir), parallel, options)
                generator = cls(llm, options, stop_tokens, bounds.children() - before)
                if parallel.pipeline > 1:
                    llm.collective_rpc("refit_prepare_pipeline", timeout=timeout_s)
                llm.update_weight_version("0")
        except BaseException:
            bounds.end_processes(bounds.children() - before)
            raise
        return generator

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_samples: int,
        max_tokens: int,
        temperature: float,
        seed: int | None,
    ) -> list[Sample]:
        """`num_samples` answers to each prompt, in prompt order. Equal seeds give equal answers.

        A prompt is token ids or, with the option `prompt_embeds`, their embeddings [tokens, hidden]. May run in a
        thread of its own beside a refit; without a seed then, if a commit may take the cache from an answer: vLLM
        winds the generator of a request back, which torch's CPU generators cannot do.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._require_whole()
        sampling = [
            SamplingParams(
                n=num_samples,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=None if temperature == 0 or seed is None else seed + 1_000_003 * index,
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
                stop_token_ids=list(self._stop_tokens),
            )
            for index in range(len(prompts))
        ]
        inputs = [as_input(prompt) for prompt in prompts]
        with self._bounded("generate", self._options.call_timeout_s):
            answers = self._requests.answer(inputs, sampling, self._options.call_timeout_s)
        self._require_whole()  # else a commit failed amid them, and some tokens are no version's
        return answers

    def score(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of every token of each prompt after its first, given those before it; all in one batch."""
        self._require_whole()
        with self._bounded("score", self._options.call_timeout_s), self._requests.alone():
            return prompt_logprobs(self._llm, prompts)

    def describe(self) -> EngineDescription:
        """The layout and the switches of this engine, from the live configuration of its workers."""
        with self._bounded("describe", self._timeout_s), self._requests.between_steps():
            found = self._llm.collective_rpc("refit_describe", timeout=self._timeout_s)
        return EngineDescription.of([WorkerFacts(*facts) for facts in found])

    def prepare_refit(self, init_info: dict[str, Any]) -> None:
        """Let every worker describe itself and join the plan. `init_info` as in calls.RefitInitInfo."""
        self._timeout_s = float(init_info["timeout_s"])
        host, _, port = str(init_info["store"]).rpartition(":")
        if self._control is not None:
            self._control.close()
        self._control = ControlStore.join(host, int(port), init_info["run_id"], self._timeout_s)
        from refit.gen_side.calls import RefitInitInfo

        RefitInitInfo(**init_info)
        with self._bounded("prepare", self._timeout_s), self._requests.between_steps():
            self._llm.init_weight_transfer_engine({"init_info": dict(init_info)})
            if self._updating:
                self._end_update()  # a round that failed before its end; prepare has dropped what was staged
            self._settle("prepare")
        self._attend(str(init_info["store"]), int(init_info["replica"]))

    def stage(self, version: int, attempt: int) -> None:
        """Receive `version` beside the weights that serve. Raises the first failure of the round.

        Requests under way go on: the bulk arrives in a thread of each worker.
        """
        self._require_whole()
        self._staged = None
        with self._bounded("stage", self._timeout_s):
            self._receive({"version": version, "attempt": attempt, "background": self._requests.busy})
            with self._requests.between_steps():
                try:
                    self._settle("stage")
                except RefitFailed:
                    self._end_update()
                    raise
        self._staged = (version, attempt)

    def finish(self, version: int, attempt: int) -> bool:
        """Wait for the coordinator's decision and carry it out on every worker. True if `version` serves now.

        After a discard the old version serves, under its own number. Raises TransportError when the workers
        disagree on what they serve; such an engine serves no more.
        """
        self._require_whole()
        if self._staged != (version, attempt):
            return False  # its staging failed and was discarded: the old version serves
        self._staged = None
        with self._bounded("finish", 2 * self._timeout_s):
            commit = self._decision(attempt)
            with self._paused() if commit else self._requests.between_steps():
                self._carry_out(attempt, version if commit else None)
        return commit

    def audit(self, audit_id: str) -> None:
        """Every worker puts audit/<audit_id>/<gen_rank>: digests per tensor and a hash per live parameter."""
        with self._bounded("audit", self._timeout_s), self._requests.between_steps():
            self._llm.init_weight_transfer_engine({"init_info": {"action": "audit", "audit": audit_id}})
            self._settle("audit")

    def read(self, info: Mapping[str, Any]) -> None:
        """Let the workers answer one ask of a reader: {"store", "run_id", "read", "timeout_s"}, see `reading`.

        Takes a turn between two steps; the weights that serve are read, also while a version is being staged. Raises
        TransportError when there is no turn within `timeout_s`; the engine's own time-out bounds the answer.
        """
        turn = self._requests.between_steps(float(info["timeout_s"]))
        with turn, self._bounded("read", self._timeout_s):
            self._llm.init_weight_transfer_engine({"init_info": {"action": "read", **info}})

    def flip_element(self, param: str, index: int, worker: int | None = None) -> int:
        """Fault injection for validation runs: flip a bit of one live element of `worker`, or of every worker.

        Returns how many workers had it.
        """
        with self._bounded("flip_element", self._timeout_s), self._requests.between_steps():
            found = self._llm.collective_rpc(
                "refit_flip_element", timeout=self._timeout_s, args=(param, index, worker)
            )
        return sum(found)

    @property
    def pause_s(self) -> float:
        """How long the last commit let no token be sampled."""
        return self._requests.halt_s

    def call_seconds(self, count: int) -> list[float]:
        """How long `count` calls of all workers take that ask nothing of them: a commit is one call."""
        found = []
        with self._bounded("call_seconds", self._timeout_s), self._requests.between_steps():
            for _ in range(count):
                began_s = time.perf_counter()
                self._llm.collective_rpc("refit_status", timeout=self._timeout_s)
                found.append(time.perf_counter() - began_s)
        return found

    def weight_version(self) -> int:
        """The version that the engine stamps; 0 is what was loaded from disk."""
        return int(self._llm.get_weight_version())

    def condition(self) -> str:
        """Why this engine must not serve any more, or "". Raises when a worker of it is gone or stuck."""
        if self._failure:
            return self._failure
        with self._bounded("condition", self._timeout_s), self._requests.between_steps():
            states = self._llm.collective_rpc("refit_status", timeout=self._timeout_s)
        broken = [f"worker {rank}: {s['reason']}" for rank, s in enumerate(states) if s["state"] == "broken"]
        return "; ".join(broken)

    def close(self) -> None:
        """Stop the engine and every process it started; none of their shared memory stays. Safe to call twice."""
        llm, self._llm = self._llm, None
        if self._desk is not None:
            self._desk.close()
        if self._control is not None:
            self._control.close()
            self._control = None
        if llm is not None:
            bounds.shut_down(llm, self._queues)
        bounds.end_processes(self._children, noted=self._segments)

    def _attend(self, store: str, replica: int) -> None:
        """Take reads from the job's control store, under the number that this engine has in its newest plan."""
        desk = self._desk
        if desk is not None and desk.is_alive() and (desk.store, desk.replica) == (store, replica):
            return
        if desk is not None:
            desk.close()
        self._desk = Desk(store, replica, self.read)
        self._desk.attending.wait(DESK_S)

    def _receive(self, update_info: dict[str, Any]) -> None:
        llm, requests = self._llm, self._requests
        with requests.between_steps():
            llm.start_weight_update()
            self._updating = True
            llm.update_weights({"update_info": update_info})
        if update_info["background"]:
            self._await_background()
            with requests.between_steps():
                llm.collective_rpc("refit_load_rest", timeout=self._timeout_s)
            self._await_background()

    def _await_background(self) -> None:
        """Until no worker does anything for the refit in the background, with steps in between."""
        while True:
            with self._requests.between_steps():
                if not any(self._llm.collective_rpc("refit_receiving", timeout=self._timeout_s)):
                    return
            time.sleep(POLL_S)

    def _end_update(self) -> None:
        """End vLLM's session of an update that failed; no worker commits."""
        self._updating = False
        self._llm.finish_weight_update()
        if self._options.lora is not None:
            self._llm.collective_rpc("refit_load_adapter", timeout=self._timeout_s)

    def _carry_out(self, attempt: int, version: int | None) -> None:
        """Commit `version`, or discard what is staged (None), on all workers by one call: requests wait for it."""
        self._updating = False
        commit = version is not None
        args = attempt, commit, self._options.lora is not None
        try:
            states = self._llm.collective_rpc("refit_finish", timeout=self._timeout_s, args=args)
        except Exception as error:  # no saying which workers serve what
            self._failure = f"its workers did not answer the finish of a refit: {error}"
            raise
        self._require_one_version(states, version if commit else self._committed)
        if version is not None:
            self.finish_reports = tuple(state["finished"] for state in states)
            self._llm.update_weight_version(str(version))
            self._committed = version
            if self._options.lora is not None:
                from refit.gen_side.lora import request_of

                self._requests.adapter = request_of(version)

    def _paused(self) -> contextlib.AbstractContextManager[None]:
        return self._requests.paused(self._options.pause, self._options.kv_cache, self._timeout_s)

    def _decision(self, attempt: int) -> bool:
        """The coordinator's decision, which a later failure does not undo; none in time, or a failure: discard."""
        if self._control is None:
            raise TransportError("this engine is not prepared for refits: call prepare_refit first")
        try:
            decision = self._control.get_final(decision_key(attempt), self._timeout_s)
        except RuntimeError:
            return False
        return bool(decision["commit"])

    def _settle(self, phase: str) -> None:
        """Ask every worker how a step ended. Raises RefitFailed with the cause when one worker failed in it."""
        self._require_no_failure(phase, self._llm.collective_rpc("refit_status", timeout=self._timeout_s))

    def _require_no_failure(self, phase: str, states: Sequence[Mapping[str, Any]]) -> None:
        reasons = [f"worker {rank}: {s['reason']}" for rank, s in enumerate(states) if s["reason"]]
        if reasons:
            if self._control is not None:
                self._control.raise_if_failed()
            raise RefitFailed(Failure(phase, "generator", "; ".join(reasons)))

    def _require_one_version(self, states: Sequence[Mapping[str, Any]], version: int | None) -> None:
        """All workers serve `version`, None before the first commit; else this engine is broken."""
        try:
            self._require_no_failure("finish", states)
        except RefitFailed as error:
            self._failure = str(error)
            raise
        found = {state["version"] for state in states}
        if found != {version}:
            self._failure = f"its workers serve versions {sorted(map(str, found))}, {version} was decided"
            raise TransportError(f"{self._failure}; restart this engine")

    def _require_whole(self) -> None:
        if self._failure:
            raise TransportError(f"this engine must not serve: {self._failure}; restart it")

    @contextlib.contextmanager
    def _bounded(self, what: str, timeout_s: float) -> Iterator[None]:
        """Waits inside end by themselves in time; should a worker be stopped or stuck, it is ended a bit later."""
        with bounds.deadline(what, timeout_s + bounds.CLOSE_S, lambda: self._children):
            yield

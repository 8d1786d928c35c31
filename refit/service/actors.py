"""The two Ray actors, thin around `PolicyTrainer` and `Generator`.

Constructors are cheap; `build` does the work. Each method returns plain values (numbers, strings, tuples, dicts),
never tensors: importing Megatron changes how torch unpickles. A failure is raised as `RefitFailed`, which
says who failed, in which call, and why; while a control store is open the others hear of it there as well.

The classes are ordinary ones; `refit.service.cluster` turns them into Ray actors.
"""

from __future__ import annotations

import collections
import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from refit.plan import Region, TensorSpec, hf_names
from refit.service.config import ADAPTER
from refit.service.oracle import Shares, box_digests, box_of, digests_of, shares_of
from refit.train_side.batch import TrainBatch
from refit.train_side.options import TrainOptions, TrainParallel
from refit.transfer.errors import Failure, RefitFailed

RolloutRow = tuple[int, tuple[int, ...], tuple[float, ...], tuple[tuple[int, int], ...]]
"""One sample: prompt index, token ids, their logprobs in the generator, and (version, tokens it sampled) in order."""


def free_port() -> int:
    """A port of this node's loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_output_to(log_path: str) -> None:
    """Send this process's standard output and error, and its children's, to the end of a file."""
    path = Path(log_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


class Actor:
    """What all actors share: a name for messages, a log file, and failures that say who and where."""

    def __init__(self, who: str, log_path: str) -> None:
        write_output_to(log_path)
        self._who = who
        self._log_path = log_path
        self._control: Any = None

    def node(self) -> str:
        """The host name of its node; answers as soon as the process is up."""
        return socket.gethostname()

    def process_id(self) -> int:
        return os.getpid()

    @contextlib.contextmanager
    def _doing(self, phase: str, told: bool = False) -> Iterator[None]:
        """Turn any failure inside into RefitFailed(phase, who, cause).

        `told`: it is a step of a refit, so the control store hears of it, which ends that refit for all ranks. Anything
        else, such as an answer, a checkpoint, or a diff that somebody asked for, is the caller's business alone.

        A RefitFailed passes unchanged: it already carries the root cause, which may be another's.
        """
        try:
            yield
        except RefitFailed:
            raise
        except Exception as error:
            with contextlib.suppress(OSError):  # the disk of the log may be full
                traceback.print_exc()
                sys.stderr.flush()
            failure = Failure(
                phase, self._who, f"{type(error).__name__}: {error} (in full: {self._log_path})"
            )
            if told and self._control is not None:
                with contextlib.suppress(Exception):  # the store may be what failed; the cause still counts
                    failure = self._control.fail(phase, self._who, failure.message)
            raise RefitFailed(failure) from None


class TrainActor(Actor):
    """One Megatron rank. All trainer ranks are called with the same arguments, at the same time."""

    def __init__(self, train_rank: int, log_path: str) -> None:
        super().__init__(f"train rank {train_rank}", log_path)
        self._train_rank = train_rank
        self._policy: Any = None
        self._offer: Any = None
        self._endpoint: Any = None
        self._base: Any = None
        self._shares: Shares = {}

    def meeting_point(self) -> str:
        """An "address:port" on this node where the trainers' own process group may meet; asked of rank 0."""
        import ray

        return f"{ray.util.get_node_ip_address()}:{free_port()}"

    def build(
        self,
        model_dir: str,
        parallel: TrainParallel,
        options: TrainOptions,
        init_address: str,
        timeout_s: float,
        engine_dir: str,
    ) -> dict[str, float]:
        """Build this rank's share of the policy. Returns {"seconds": ...}.

        `engine_dir` is the checkpoint as the engines store it: where it is quantized, refits will be too.
        """
        started_s = time.monotonic()
        with self._doing("build"):
            from refit.train_side.policy import PolicyTrainer

            self._policy = PolicyTrainer.build(
                model_dir, parallel, options, self._train_rank, parallel.world_size, init_address, timeout_s
            )
            if options.lora is not None and options.lora.refit == ADAPTER:
                self._offer = self._policy.adapters()
            else:
                self._offer = _offer_to(engine_dir, self._policy)
        return {"seconds": time.monotonic() - started_s}

    def prepare_refit(self, store_address: str, run_id: str, timeout_s: float) -> dict[str, Any]:
        """Describe, agree on the plan, open the groups. Returns {"rank", "digest", "num_misc", "seconds"}.

        A second call leaves the groups of the first, for example to change from one way of moving weights to another.
        """
        started_s = time.monotonic()
        self._leave()
        with self._doing("prepare", told=True):
            from refit.transfer.delta.base import Base
            from refit.transfer.endpoint import Endpoint
            from refit.transfer.protocol import INPUTS, Inputs
            from refit.transfer.rendezvous import ControlStore

            address, _, port = store_address.rpartition(":")
            self._control = ControlStore.join(address, int(port), run_id, timeout_s)
            self._base = self._base or Base()
            self._endpoint = Endpoint.prepare(
                self._control, self._offer.describe(), timeout_s, base=self._base
            )
            self._shares = shares_of(Inputs.of_message(self._control.get(INPUTS, timeout_s)).gen)
            return {
                "rank": self._endpoint.rank,
                "digest": self._endpoint.plan.digest,
                "num_misc": len(self._endpoint.misc_names),
                "seconds": time.monotonic() - started_s,
            }

    def refit(self, version: int, attempt: int) -> None:
        """Send this rank's share of `version`: bulk by stages, then misc; then put the report of the round."""
        with self._doing("refit", told=True):
            from refit.transfer.source import send_version

            send_version(self._endpoint, self._offer, version, attempt)

    def slices(self, suspects: Mapping[str, Sequence[str]], timeout_s: float) -> list[list[object]]:
        """What this rank holds of tensors that a refit was discarded for, in small parts: messages of `Slice`.

        Collective where the weights are quantized.
        """
        with self._doing("locate"):
            found: list[list[object]] = self._endpoint.slices(self._offer.params(), suspects, timeout_s)
            return found

    def verify_digests(self) -> dict[str, dict[str, str]]:
        """{tensor: {joint rank: hex digest}} of what every generator should hold now; {} but from train rank 0.

        Computed from Bridge's own full export, so that an audit checks the whole path and not the plan against itself.
        """
        with self._doing("verify"), self._exported(None) as exported:
            if self._train_rank != 0:
                return {}
            return digests_of(exported, self._shares, self._endpoint.plan.num_train)

    def weight_digests(
        self, boxes: Sequence[tuple[str, str, Region]], specs: Mapping[str, TensorSpec]
    ) -> list[str]:
        """Hex digests of boxes of the full tensors as they are now; [] but from train rank 0. Collective."""
        with (
            self._doing("diff"),
            self._exported([specs[name] for name, _, _ in boxes]) as exported,
        ):
            return box_digests(exported, boxes, specs) if self._train_rank == 0 else []

    def put_weights(self, spec: TensorSpec, dtype: str, region: Region, run_id: str) -> int:
        """Put a box of a full tensor into the control store, under `bytes`; how many, from rank 0. Collective."""
        with self._doing("diff"), self._exported([spec]) as exported:
            from refit.transfer.memory import as_bytes

            if self._train_rank != 0:
                return 0
            payload = as_bytes(box_of(exported, dtype, region).cpu()).numpy().tobytes()
            assert self._control is not None, "a diff comes after prepare"
            self._control.under(run_id).put_bytes("bytes", payload)
            return len(payload)

    @contextlib.contextmanager
    def _exported(self, specs: Sequence[TensorSpec] | None) -> Iterator[Iterator[tuple[str, Any]]]:
        """The full HF tensors of `specs`, None for all. Taken to its end by every rank, also by one that fails: the
        export gathers over all trainers.
        """
        names = None
        if specs is not None:
            names = [hf for spec in dict.fromkeys(specs) for hf in hf_names(spec.name, spec.shape)]
        exported: Iterator[tuple[str, Any]] = self._offer.export(names)
        try:
            yield exported
        finally:
            collections.deque(exported, maxlen=0)

    def logprobs(self, batch: TrainBatch) -> list[list[float]] | None:
        """Per response token, by the current policy at temperature 1; from train rank 0, None from the others."""
        with self._doing("logprobs"):
            return self._from_first_rank(self._policy.logprobs(batch))

    def reference_logprobs(self, batch: TrainBatch) -> list[list[float]] | None:
        """The same by the frozen initial policy."""
        with self._doing("reference_logprobs"):
            return self._from_first_rank(self._policy.reference_logprobs(batch))

    def train_step(self, batch: TrainBatch) -> dict[str, float]:
        """One optimizer step. Returns loss, kl_to_reference, grad_norm, clip_fraction, lr."""
        with self._doing("train_step"):
            return {name: float(value) for name, value in self._policy.train_step(batch).items()}

    def save(self, folder: str) -> str:
        """Write the policy as an HF checkpoint; collective over the trainers."""
        with self._doing("save"):
            self._policy.save(folder)
        return folder

    def close(self) -> None:
        """Close groups and store; safe after a failure."""
        self._leave()
        if self._policy is not None:
            with contextlib.suppress(Exception):  # a closing that fails must not hide why the job ended
                self._policy.close()
        self._policy = self._offer = None

    def _leave(self) -> None:
        for part in (self._endpoint, self._control):
            if part is not None:
                with contextlib.suppress(Exception):  # a closing that fails must not hide why the job ended
                    part.close()
        self._endpoint = self._control = None

    def _from_first_rank(self, values: list[list[float]]) -> list[list[float]] | None:
        return values if self._train_rank == 0 else None


def _offer_to(engine_dir: str, policy: Any) -> Any:
    """The policy as engines of that checkpoint see it. Collective over the trainers if it is quantized."""
    from refit.gen_side.loader.hf_index import read_hf_shapes
    from refit.train_side.quantized import QuantizedTrainer
    from refit.transfer.precision.scheme import scheme_of

    scheme = scheme_of(read_hf_shapes(engine_dir))
    return QuantizedTrainer.prepare(policy, scheme) if scheme else policy


class GenActor(Actor):
    """One vLLM engine, that is one replica, with all its workers."""

    def __init__(self, replica: int, log_path: str) -> None:
        super().__init__(f"generator {replica}", log_path)
        self._replica = replica
        self._generator: Any = None
        self._background: ThreadPoolExecutor | None = None
        self._submitted: dict[int, Future[tuple[RolloutRow, ...]]] = {}

    def build(
        self, model_dir: str, parallel: Mapping[str, Any], options: Mapping[str, Any], timeout_s: float
    ) -> dict[str, float]:
        """Start the engine. `parallel` and `options` are the fields of GenParallel and GenOptions."""
        started_s = time.monotonic()
        with self._doing("build"):
            from refit.gen_side.generator import Generator, GenOptions, GenParallel

            self._generator = Generator.build(
                model_dir, GenParallel(**parallel), GenOptions(**options), timeout_s
            )
        return {"seconds": time.monotonic() - started_s}

    def describe(self) -> dict[str, Any]:
        """The fields of EngineDescription: the layout and the switches that are live in this engine."""
        with self._doing("describe"):
            return dict(self._generator.describe().message())

    def prepare_refit(self, init_info: Mapping[str, Any]) -> dict[str, float]:
        """Let every worker describe itself and join the groups. Returns {"seconds": ...}."""
        started_s = time.monotonic()
        with self._doing("prepare", told=True):
            self._generator.prepare_refit(dict(init_info))
        return {"seconds": time.monotonic() - started_s}

    def stage(self, version: int, attempt: int) -> None:
        """Receive `version` beside the weights that serve."""
        with self._doing("stage", told=True):
            self._generator.stage(version, attempt)

    def finish(self, version: int, attempt: int) -> tuple[Any, ...]:
        """Commit or discard as the coordinator decided; the fields of `rounds.Finish`, a report per worker last.

        After a discard 0 seconds and no reports.
        """
        with self._doing("finish", told=True):
            committed = self._generator.finish(version, attempt)
            cost = (self._generator.pause_s, *self._generator.finish_reports) if committed else (0.0,)
            return (int(self._generator.weight_version()), *cost)

    def condition(self) -> str:
        """Why this engine can serve no more, or "" if it can; asks every worker."""
        with self._doing("condition"):
            return str(self._generator.condition())

    def audit(self, audit_id: str) -> None:
        """Let every worker put digests of what it holds under audit/<audit_id>/<gen_rank>."""
        with self._doing("audit"):
            self._generator.audit(audit_id)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        max_tokens: int,
        temperature: float,
        seed: int | None,
    ) -> tuple[RolloutRow, ...]:
        """`num_samples` answers to each prompt, in prompt order."""
        with self._doing("generate"):
            samples = self._generator.generate(
                [list(prompt) for prompt in prompts], num_samples, max_tokens, temperature, seed
            )
            return tuple(
                (s.prompt_index, tuple(s.tokens), tuple(s.logprobs), tuple(s.spans)) for s in samples
            )

    def submit(self, step: int, *arguments: Any) -> None:
        """Begin a `generate` in the background, so that a refit may run beside it. `take` has its answers."""
        if self._background is None:
            self._background = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self._submitted[step] = self._background.submit(self.generate, *arguments)

    def take(self, step: int) -> tuple[RolloutRow, ...]:
        """Wait for what was submitted for `step`: its answers, or what it raised. Older ones are forgotten."""
        answers = self._submitted[step]
        self._submitted = {later: found for later, found in self._submitted.items() if later > step}
        return answers.result()

    def call_seconds(self, count: int) -> list[float]:
        """How long `count` calls of all workers take that ask nothing of them."""
        with self._doing("call_seconds"):
            return list(self._generator.call_seconds(count))

    def weight_version(self) -> int:
        with self._doing("weight_version"):
            return int(self._generator.weight_version())

    def close(self) -> None:
        """Stop the engine and its workers; safe after a failure."""
        if self._generator is not None:
            with contextlib.suppress(Exception):  # a closing that fails must not hide why the job ended
                self._generator.close()
        self._generator = None

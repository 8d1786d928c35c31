"""One rank's part of prepare and refit; the same class on trainers and generators.

    endpoint = Endpoint.prepare(control, manifest, timeout_s, device)
    endpoint.begin(version, attempt)
    endpoint.move_bulk(params)
    endpoint.send_misc(tensors)                    on trainer 0; nothing to do on other trainers
    for name, tensor in endpoint.receive_misc():   on generators
    endpoint.put_report()
    endpoint.decision() -> commit or not           on generators
    endpoint.committed()                           on generators, once the version serves
    endpoint.put_slices(params)                    on generators, before they drop what they discard

A failure of any step is reported to everybody before it is raised, as RefitFailed with the root cause. The endpoint is
then of no more use: prepare again under a new run id.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from refit.plan import (
    BULK,
    MISC,
    Plan,
    RankManifest,
    TensorSpec,
    build_plan,
    coalesce_holdings,
    encode_rank_manifest,
    hf_names,
)
from refit.plan.dtypes import can_cast
from refit.plan.naming import is_stacked
from refit.transfer import bulk, golden
from refit.transfer.attempt import Attempt
from refit.transfer.broadcast import receive_packed, send_packed, to_wire
from refit.transfer.bulk import StageJob
from refit.transfer.compiled import CompiledStage, compile_stage
from refit.transfer.delta.base import Base, token_of
from refit.transfer.delta.mover import DeltaMove
from refit.transfer.digest import whole_digest
from refit.transfer.errors import Failure, RefitFailed, TransportError
from refit.transfer.groups import Groups, open_groups
from refit.transfer.lanes import run_lanes
from refit.transfer.memory import DescribedParams, torch_dtype
from refit.transfer.protocol import (
    GO,
    GOLDEN,
    INPUTS,
    OK,
    Inputs,
    RefitReport,
    decision_key,
    describe_key,
    digest_key,
    ready_key,
    report_key,
)
from refit.transfer.rendezvous import ControlStore
from refit.transfer.report import BulkReport, Span
from refit.transfer.slices import Suspects, put_slices, slices_of
from refit.transfer.watch import Watch, silent_ranks
from refit.transfer.workspace import Workspace

MISC_STAGE = -1  # the stage that spans of the misc path carry
MISC_CHUNK_BYTES = 64 << 20  # most of one chunk; a smaller bucket_bytes lowers it


class Endpoint:
    """Made by `prepare`. Not for use from several threads at once."""

    def __init__(
        self,
        control: ControlStore,
        manifest: RankManifest,
        inputs: Inputs,
        plan: Plan,
        groups: Groups,
        watch: Watch,
        device: torch.device,
        base: Base,
    ) -> None:
        self._control = control
        self._manifest = manifest
        self._inputs = inputs
        self._groups = groups
        self._watch = watch
        self._device = device
        self._base = base
        self.plan = plan
        self.rank = joint_rank(manifest, plan)
        self.who = who(manifest)
        self._described = DescribedParams(manifest.params, self.who)
        self._stages = self._compiled()
        if inputs.delta:
            base.fit(manifest, plan)
        self._workspaces = [Workspace() for _ in range(inputs.num_streams)]
        self._misc_specs = misc_specs(plan)
        self._chunk_bytes = min(MISC_CHUNK_BYTES, inputs.options.bucket_bytes)
        self._attempt = Attempt(0, 0, 0.0, 0.0, 0.0)
        self._phase = "prepare"

    def _compiled(self) -> list[CompiledStage]:
        """This rank's stages. Deltas are of parcels, so nothing is gathered past those."""
        dtypes = {spec.name: spec.dtype for spec in self._manifest.params}
        stages = self.plan.rank_plan(self.rank).stages
        ways = [self._groups.stages[stage.stage].transport for stage in stages]
        return [
            compile_stage(
                self.plan,
                stage,
                self.rank,
                dtypes,
                self._device,
                gathers=way.gathers and not self._inputs.delta,
            )
            for stage, way in zip(stages, ways, strict=True)
        ]

    @classmethod
    def prepare(
        cls,
        control: ControlStore,
        manifest: RankManifest,
        timeout_s: float,
        device: torch.device | None = None,
        base: Base | None = None,
    ) -> "Endpoint":
        """Publish the manifest, agree on the plan, open the groups. `timeout_s` bounds the whole of it.

        `base` is what this rank kept of refits under a plan before; only of use where the coordinator asks for deltas.
        """
        device = torch.device("cpu") if device is None else device
        deadline = time.monotonic() + timeout_s
        with ExitStack() as undo:
            try:
                endpoint = cls._prepared(control, manifest, deadline, device, base or Base(), undo)
                control.put(ready_key(endpoint.rank), OK)
            except RefitFailed:
                raise
            except Exception as error:
                raise RefitFailed(report_failure(control, "prepare", who(manifest), error, (), 0)) from error
            undo.pop_all()  # the endpoint closes them now
            return endpoint

    @classmethod
    def _prepared(
        cls,
        control: ControlStore,
        manifest: RankManifest,
        deadline: float,
        device: torch.device,
        base: Base,
        undo: ExitStack,
    ) -> "Endpoint":
        """All of `prepare` but saying that this rank is ready. `undo` closes what was opened if a later step fails."""
        control.put(describe_key(manifest.side, manifest.rank), encode_rank_manifest(manifest))
        inputs = Inputs.of_message(control.get(INPUTS, deadline - time.monotonic()))
        plan = _agreed_plan(control, manifest, inputs, deadline)
        rank = joint_rank(manifest, plan)
        left_s = deadline - time.monotonic()
        groups = open_groups(control, rank, plan, inputs.backend, left_s, inputs.transport)
        undo.callback(groups.close)
        watch = Watch.start(control, rank, groups.abort)
        undo.callback(watch.close)
        return cls(control, manifest, inputs, plan, groups, watch, device, base)

    @property
    def misc_names(self) -> tuple[str, ...]:
        """HF names that go by broadcast, in plan order."""
        return self.plan.misc_names

    def begin(self, version: int, attempt: int) -> None:
        """Start an attempt to bring `version` over. Its deadline, `timeout_s` from now, bounds every wait of it."""
        self._attempt = Attempt(
            version, attempt, time.monotonic() + self._inputs.timeout_s, time.time(), time.perf_counter()
        )
        self._control.raise_if_failed()  # after that, so that `decision` never answers for the attempt before

    def move_bulk(self, params: Mapping[str, Tensor]) -> BulkReport:
        """Move the bulk tensors between `params`, the live memory by ParamSpec name, of all ranks."""
        with self.phase("bulk"):
            self._described.require(params)
            jobs = [
                StageJob(
                    self.plan,
                    stage,
                    self.rank,
                    params,
                    self._groups.stages[stage.stage],
                    self._deadline,
                    self._device,
                    workspace=self._workspaces[number % len(self._workspaces)],
                )
                for number, stage in enumerate(self._stages)
            ]
            report = run_lanes(jobs, self._mover(params), self._inputs.num_streams, self._end_round)
            self._require_all_received(report)
            if self._inputs.delta:
                token = token_of(self._control.run_id, self._attempt.version, self._attempt.attempt)
                self._base.end(params, token)
        self._attempt.bulk = report
        return report

    def send_misc(self, tensors: Iterable[tuple[str, Tensor]]) -> int:
        """Send (HF name, full tensor) for every name of `misc_names`, in any order. On trainer 0. Returns bytes."""
        assert self._groups.misc is not None and self.rank == 0, f"{self.who} is not the sender of misc"
        began = time.perf_counter()
        with self.phase("misc"):
            counted = self._counted(tensors)
            sent = send_packed(
                counted, self._groups.misc, self._misc_specs, self._chunk_bytes, self._deadline, self._device
            )
        self._attempt.misc = Span("misc", MISC_STAGE, 0, began, time.perf_counter())
        return sent

    def receive_misc(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (HF name, full tensor) in the sender's order, in the dtype of the plan. On generators."""
        assert self._groups.misc is not None and self.rank != 0, f"{self.who} does not receive misc"
        began = time.perf_counter()
        with self.phase("misc"):
            received = receive_packed(
                self._groups.misc, self._misc_specs, self._chunk_bytes, self._deadline, self._device
            )
            yield from self._counted(received)
        self._attempt.misc = Span("misc", MISC_STAGE, 0, began, time.perf_counter())

    def put_report(self) -> RefitReport:
        """Publish what this rank did in this attempt."""
        report = self._attempt.report()
        with self.phase("report"):
            self._control.put(report_key(self._attempt.attempt, self.rank), report.message())
        return report

    def decision(self) -> tuple[bool, str]:
        """Wait for the coordinator: (True, reason) to commit this attempt, (False, reason) to discard it.

        A decision stands once it is made: a failure after it changes nothing.
        """
        with self.phase("decision"):
            message = self._control.get_final(
                decision_key(self._attempt.attempt), self._deadline - time.monotonic()
            )
            if not isinstance(message, dict) or set(message) != {"commit", "reason"}:
                raise TransportError(f"the decision must have the keys commit and reason, got {message!r}")
            return message["commit"] is True, str(message["reason"])

    def committed(self) -> None:
        """This generator serves the version of this attempt: the next one may be told by what changed since."""
        self._base.committed()

    def put_slices(self, params: Mapping[str, Tensor]) -> None:
        """Say in small parts what `params` hold of tensors that were found to differ. Waits and raises nothing."""
        attempt = self._attempt
        put_slices(
            self._control, attempt.attempt, self.plan, self.rank, self._stages, params, attempt.deadline
        )

    def slices(
        self, params: Mapping[str, Tensor], suspects: Suspects, timeout_s: float
    ) -> list[list[object]]:
        """The same of a trainer, as messages of `Slice`."""
        deadline = time.monotonic() + timeout_s
        found = slices_of(self.plan, self.rank, self._stages, params, suspects, deadline)
        return [each.message() for each in found]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run a step of a refit. Any exception in it ends the refit for everybody and comes out as RefitFailed."""
        outer, self._phase = self._phase, name
        self._watch.doing(name)
        try:
            yield
            self._phase = outer
        except RefitFailed:
            raise
        except Exception as error:
            raise RefitFailed(self._end_round(error)) from error

    def close(self) -> None:
        """Stop the pulse and give the groups back. Ends in bounded time also after a failure."""
        self._watch.close()
        self._groups.close()

    @property
    def _deadline(self) -> float:
        assert self._attempt.deadline, "call begin(version, attempt) before a step of a refit"
        return self._attempt.deadline

    def _mover(self, params: Mapping[str, Tensor]) -> Callable[[StageJob], BulkReport]:
        if self._inputs.bulk == GOLDEN:
            return golden.move_stage
        if not self._inputs.delta:
            return bulk.move_stage
        return DeltaMove(self._base, self._base.begin(params)).move_stage

    def _end_round(self, error: Exception) -> Failure:
        """Report first, then close the connections: so peers that see them close find the cause already there."""
        others = [rank for rank in range(self.plan.num_train + self.plan.num_gen) if rank != self.rank]
        failure = report_failure(self._control, self._phase, self.who, error, others, self.plan.num_train)
        self._groups.abort()
        return failure

    def _counted(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass tensors through in their wire dtype, with their digests and bytes noted."""
        for name, tensor in tensors:
            spec = self._misc_specs.get(name)
            wired = tensor if spec is None else to_wire(tensor, spec)  # the broadcast refuses an unknown name
            self._attempt.misc_digests[name] = whole_digest(wired)
            self._attempt.misc_bytes += wired.numel() * wired.element_size()
            yield name, wired

    def _require_all_received(self, report: BulkReport) -> None:
        if self._manifest.side != "gen":
            return
        wanted = sum(
            holding.region.num_elements * torch_dtype(self.plan.tensors[holding.tensor].dtype).itemsize
            for holding in coalesce_holdings(self._manifest.holdings)
            if self.plan.tensors[holding.tensor].kind == BULK
        )
        assert report.bytes_received == wanted, (
            f"{self.who} received {report.bytes_received} of {wanted} bytes"
        )


def joint_rank(manifest: RankManifest, plan: Plan) -> int:
    """Trainers first, then generators."""
    return manifest.rank if manifest.side == "train" else plan.num_train + manifest.rank


def who(manifest: RankManifest) -> str:
    """How a rank is named in messages: "train 0", "gen 3"."""
    return f"{manifest.side} {manifest.rank}"


def name_of(rank: int, num_train: int) -> str:
    """The same name from a joint rank."""
    return f"train {rank}" if rank < num_train else f"gen {rank - num_train}"


def misc_specs(plan: Plan) -> dict[str, TensorSpec]:
    """Shape and wire dtype of every misc tensor, by HF name: the engine's dtype where a plain cast leads there."""
    specs: dict[str, TensorSpec] = {}
    for tensor in plan.tensors.values():
        if tensor.kind == MISC:
            stored, wanted = plan.train.specs[tensor.name], plan.gen.specs.get(tensor.name)
            dtype = (
                wanted.dtype if wanted is not None and can_cast(stored.dtype, wanted.dtype) else stored.dtype
            )
            shape = tensor.shape[1:] if is_stacked(tensor.name) else tensor.shape
            for name in hf_names(tensor.name, tensor.shape):
                specs[name] = TensorSpec(name, shape, dtype)
    return specs


def report_failure(
    control: ControlStore, phase: str, who: str, error: Exception, others: Sequence[int], num_train: int
) -> Failure:
    """Tell everybody, unless somebody did before. A transport error is first traced to ranks that show no pulse."""
    try:
        standing = control.failure()
        if standing is not None:
            return standing
        message = f"{type(error).__name__}: {error}"
        if isinstance(error, TransportError):
            silent = silent_ranks(control, others)
            if silent:
                names = ", ".join(f"{name_of(rank, num_train)} (rank {rank})" for rank in silent)
                message = f"no sign of life from {names}: dead or stopped. {message}"
        return control.fail(phase, who, message)
    except TransportError as lost:
        return Failure(phase, who, f"{error} (and nobody could be told: {lost})")


def _agreed_plan(control: ControlStore, manifest: RankManifest, inputs: Inputs, deadline: float) -> Plan:
    """Build the plan here too; go on only if this rank and the coordinator come to the same one."""
    plan = build_plan(inputs.train, inputs.gen, inputs.options)
    control.put(digest_key(joint_rank(manifest, plan)), plan.digest)
    if plan.digest != inputs.digest:
        raise TransportError(
            f"{who(manifest)} computes plan digest {plan.digest}, the coordinator {inputs.digest}; "
            f"all ranks must run the same version of refit"
        )
    mine = (inputs.train if manifest.side == "train" else inputs.gen).ranks[manifest.rank]
    if mine != manifest:
        raise TransportError(
            f"the coordinator's manifest of {who(manifest)} is not the one that it published"
        )
    answer = control.get(GO, deadline - time.monotonic())
    if answer != OK:
        raise TransportError(f"{GO} must be {OK}, got {answer!r}")
    return plan

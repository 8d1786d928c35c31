"""The worker's part of a refit, plugged into vLLM as the weight transfer backend `refit`.

One object lives in every vLLM worker. `prepare` traces the loader and joins the plan; then, per refit,
`start_weight_update` stages, `update_weights` receives, and `finish_weight_update` reads the coordinator's
decision: commit or discard. `audit` puts digests of live memory into the control store.

These calls do not raise in the worker: vLLM's executor stops reading replies at the first worker that failed and
takes the others' leftover replies for those of the next call. The outcome is in `status()`, which the caller asks
of every worker, and in the control store, which tells all other ranks at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed import get_pp_group, get_world_group
from vllm.distributed.weight_transfer.base import WeightTransferEngine

from refit.gen_side.calls import Background, RefitInitInfo, RefitUpdateInfo
from refit.gen_side.live.audit import AuditReport, Committed, Loaded, audit, observe_commit, observe_staging
from refit.gen_side.live.configuration import stale_draft
from refit.gen_side.live.memory import LiveMemory
from refit.gen_side.loader.hf_index import read_hf_shapes
from refit.gen_side.loader.trace import LoaderTrace, trace_loader
from refit.gen_side.staging import CommitReport, Staging
from refit.plan import ParamSpec, RankManifest
from refit.transfer.delta.base import Base
from refit.transfer.endpoint import Endpoint
from refit.transfer.errors import RefitFailed, take_all
from refit.transfer.protocol import FinishReport, audit_keys, finished_key
from refit.transfer.reading import Holder, Reads
from refit.transfer.rendezvous import ControlStore

_log = logging.getLogger(__name__)
ANSWER_FIRST_S = 0.005  # so long a worker's answer, for which requests wait, has the interpreter to itself


@dataclass(frozen=True, slots=True)
class Session:
    """What `prepare` set up."""

    control: ControlStore
    endpoint: Endpoint
    gen_rank: int

    @property
    def who(self) -> str:
        return f"gen {self.gen_rank}"


@dataclass(frozen=True, slots=True)
class Ready:
    """A version that is staged, digested and reported: all that its commit need not wait with is done."""

    update: RefitUpdateInfo
    loaded: Loaded
    staged_bytes: int


class RefitWeightTransferEngine(WeightTransferEngine[RefitInitInfo, RefitUpdateInfo]):
    """States: serving, staging, broken. A broken worker (a commit failed half way) must not serve."""

    init_info_cls = RefitInitInfo
    update_info_cls = RefitUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._session: Session | None = None
        self._base = Base()
        self._trace: LoaderTrace | None = None
        self._staging: Staging | None = None
        self._ready: Ready | None = None
        self._committed: Committed | None = None
        self._sealing: Background[Committed] | None = None
        self._decided: tuple[int, bool] | None = None
        self._finished: dict[str, object] | None = None
        self._version: int | None = None
        self._broken = ""
        self._arrival: Background[RefitUpdateInfo] | None = None
        self._packing: Background[Ready] | None = None
        self._reads = Reads()
        self._timeout_s = 0.0
        self._phase, self._reason = "", ""

    def init_transfer_engine(self, init_info: RefitInitInfo) -> None:
        """Run one action; see RefitInitInfo."""
        match init_info.action:
            case "prepare":
                self._run("prepare", lambda: self._prepare(init_info))
            case "audit":
                self._run("audit", lambda: self._audit(init_info.audit))
            case "read":
                self._read(init_info)

    def start_weight_update(self) -> None:
        """Begin a staging beside the live model."""
        self._run("begin", self._begin)

    def receive_weights(self, update_info: RefitUpdateInfo) -> None:
        """Bulk into the staging, then misc through vLLM's loader; then what is packed ahead, and this rank's report."""
        if self._staging is None:
            return
        if update_info.background and self._require_session().endpoint.misc_names:
            self._arrival = Background("the receive of bulk", lambda: self._move_bulk(update_info))
        elif update_info.background:
            self._packing = Background(
                "the receive of a version", lambda: self._get_ready(self._move_bulk(update_info))
            )
        else:
            self._run("stage", lambda: self._receive(update_info))

    def receiving(self) -> bool:
        """Whether anything goes on in the background: bulk until `load_rest`, after it the packing and the report."""
        packing = self._packing
        if packing is not None and not packing.is_alive():
            self._packing = None
            self._run("stage", lambda: self._take(packing.result(self._timeout_s)))
        return self._packing is not None or (self._arrival is not None and self._arrival.is_alive())

    def load_rest(self) -> None:
        """Go on with a `receive_weights` in the background: misc, and then again in the background. Raises nothing."""
        arrival, self._arrival = self._arrival, None
        if arrival is not None and self._staging is not None:
            self._run("stage", lambda: self._load_rest(arrival.result(self._timeout_s)))

    def decide(self, attempt: int, commit: bool) -> None:
        """What the coordinator decided on `attempt`, so that the finish, for which requests wait, need not ask."""
        self._decided = attempt, commit

    def finish_weight_update(self) -> None:
        """Commit or discard, as the coordinator decided. Without a received version: discard.

        What nothing has to wait for is done in the background after a commit: see `settle`.
        """
        if self._packing is not None:
            self._packing.join(self._timeout_s)  # a server that does not ask has not waited for it
            self.receiving()
        if self._ready is None:
            self._drop_staging()
        else:
            self._run("finish", self._finish)

    def settle(self) -> None:
        """Wait for what a commit does in the background: digests of what is live now, for audits.

        Raises what kept them from being taken, every time until the next commit: those at hand are an older version's.
        """
        if self._sealing is not None:
            self._committed = self._sealing.result(self._timeout_s)
            self._sealing = None

    def shutdown(self) -> None:
        """Close groups and store; safe at any time."""
        self._drop_staging()
        self._reads.close()
        session, self._session = self._session, None
        if self._sealing is not None:
            self._sealing.join(self._timeout_s)
        if session is not None:
            take_all((session.endpoint.close, session.control.close))

    def status(self) -> dict[str, Any]:
        """{"state", "version", "phase", "reason", "finished"} of this worker.

        `version` is the last one committed here, None before the first, and `finished` the FinishReport of that.
        `phase` is the last call, `reason` why it failed, or "".
        """
        state = "broken" if self._broken else "staging" if self._staging is not None else "serving"
        outcome = {"phase": self._phase, "reason": self._reason, "finished": self._finished}
        return {"state": state, "version": self._version, **outcome}

    def param_spec(self, param: str) -> ParamSpec:
        """The loader's shape and dtype of a parameter, as traced."""
        return next(spec for spec in self._require_trace().params if spec.name == param)

    def _run(self, phase: str, action: Callable[[], None]) -> None:
        """Do one step; keep its outcome for `status` and tell a failure to everybody."""
        self._phase, self._reason = phase, ""
        try:
            if self._broken:
                raise RuntimeError(f"{self._broken}")
            action()
        except Exception as error:
            _log.exception("refit: %s failed", phase)
            self._reason = str(self._told(phase, error))
            self._drop_staging()

    def _begin(self) -> None:
        self._require_session()
        if self._sealing is not None:
            self._sealing.require_ended(self._timeout_s)  # it reads what the next commit will write
        self._drop_staging()
        self._reads.forget()
        self._staging = self._new_staging()

    def _receive(self, update: RefitUpdateInfo) -> None:
        self._move_bulk(update)
        self._load_misc()
        self._take(self._get_ready(update))

    def _move_bulk(self, update: RefitUpdateInfo) -> RefitUpdateInfo:
        endpoint, staging = self._require_session().endpoint, self._require_staging()
        endpoint.begin(update.version, update.attempt)
        with torch.no_grad():
            endpoint.move_bulk(staging.params())
        return update

    def _load_rest(self, update: RefitUpdateInfo) -> None:
        self._load_misc()
        self._packing = Background("the packing of a version", lambda: self._get_ready(update))

    def _load_misc(self) -> None:
        endpoint, staging = self._require_session().endpoint, self._require_staging()
        if endpoint.misc_names:
            with endpoint.phase("load misc"):
                staging.load_misc(endpoint.receive_misc())

    def _get_ready(self, update: RefitUpdateInfo) -> Ready:
        """Digest and pack what is staged, and put the report; the live model is not touched."""
        endpoint, staging = self._require_session().endpoint, self._require_staging()
        with endpoint.phase("pack"):
            ready = Ready(update, self._observe(staging), staging.num_bytes)
            staging.pack_ahead()
        endpoint.put_report()
        return ready

    def _take(self, ready: Ready) -> None:
        self._ready = ready

    def _finish(self) -> None:
        session, staging, ready = self._require_session(), self._require_staging(), self._ready
        update = ready.update
        told, self._decided = self._decided, None
        was_told = told is not None and told[0] == update.attempt
        commit, reason = (told[1], "as told") if was_told else self._decision(session)
        if not commit:
            _log.warning("%s discards version %d: %s", session.who, update.version, reason)
            session.endpoint.put_slices(staging.params())
            self._drop_staging()
            return
        started_s = time.time()
        report = self._commit(staging)
        self._version = update.version
        session.endpoint.committed()
        self._staging = self._ready = None
        self._finished = FinishReport(update.version, started_s, report.seconds, ready.staged_bytes).message()
        if not was_told:  # who asks nothing but the store, and so has no other answer
            session.control.put(finished_key(update.attempt, session.gen_rank), self._finished)
        self._sealing = Background(
            "the digest of a commit", lambda: self._seal(staging, ready), after_s=ANSWER_FIRST_S
        )
        _log.info("%s serves version %d: %s", session.who, self._version, report)

    def _prepare(self, info: RefitInitInfo) -> None:
        self.shutdown()
        self._timeout_s = info.timeout_s
        host, _, port = info.store.rpartition(":")
        control = ControlStore.join(host, int(port), info.run_id, info.timeout_s)
        gen_rank = info.first_gen_rank + get_world_group().rank_in_group
        try:
            manifest = self._manifest(gen_rank, get_pp_group().rank_in_group, info.replica)
            endpoint = Endpoint.prepare(control, manifest, info.timeout_s, self.device, self._base)
        except Exception as error:
            told = _tell(control, "prepare", f"gen {gen_rank}", error)
            control.close()
            raise told from error
        self._session = Session(control, endpoint, gen_rank)
        if notice := stale_draft(self.vllm_config):
            _log.warning("%s: %s", self._session.who, notice)

    # What is refitted is said in the six methods that follow; `refit.gen_side.lora` refits adapters with others.

    def _manifest(self, gen_rank: int, stage: int, replica: int) -> RankManifest:
        return self._traced().manifest(gen_rank=gen_rank, stage=stage, replica=replica)

    def _new_staging(self) -> Staging:
        return Staging.begin(self.model, self._require_trace())

    def _observe(self, staging: Staging) -> Loaded:
        return observe_staging(self.model, staging)

    def _commit(self, staging: Staging) -> CommitReport:
        """Put the staged version in the place of the one that serves. A failure breaks this worker."""
        try:
            report = staging.commit(self.model_config)
        except Exception as error:
            self._broken = str(error)
            raise
        return report

    def _seal(self, staging: Staging, ready: Ready) -> Committed:
        """What is live right after a commit; the memory of its staging is given back."""
        staging.release()
        return observe_commit(self.model, ready.loaded)

    def _audited(self) -> AuditReport:
        return audit(self.model, self._require_trace(), self._committed)

    def _traced(self) -> LoaderTrace:
        if self._trace is None:
            self._trace = trace_loader(self.model, read_hf_shapes(self.model_config.model))
        return self._trace

    def _read(self, info: RefitInitInfo) -> None:
        """Read-only, and apart from refits: a read that fails is told to its reader and changes no state here."""
        rank, stage = get_world_group().rank_in_group, get_pp_group().rank_in_group
        holder = Holder(
            rank,
            self._version or 0,
            lambda: self._traced().manifest(gen_rank=rank, stage=stage, replica=0),
            lambda: LiveMemory(self.model, self._traced(), self._committed),
            self._broken,
        )
        try:
            self.settle()
            self._reads.answer(vars(info), holder)
        except Exception:
            _log.exception("refit: a read got no answer")  # its reader is gone, or runs into its time limit

    def _audit(self, audit_id: str) -> None:
        session = self._require_session()
        self.settle()
        session.control.put(f"{audit_keys(audit_id)}{session.gen_rank}", self._audited().message())

    def _decision(self, session: Session) -> tuple[bool, str]:
        """(commit, reason). Without a decision in time, or after any failure, the old version stays."""
        try:
            return session.endpoint.decision()
        except RefitFailed as error:
            return False, str(error)

    def _require_session(self) -> Session:
        if self._session is None:
            raise RuntimeError("this worker is not prepared: call init_weight_transfer_engine(prepare) first")
        return self._session

    def _require_trace(self) -> LoaderTrace:
        assert self._trace is not None, "prepare traces the loader first"
        return self._trace

    def _require_staging(self) -> Staging:
        if self._staging is None:
            raise RuntimeError("no refit is open: call start_weight_update first")
        return self._staging

    def _drop_staging(self) -> None:
        steps, self._arrival, self._packing = (self._arrival, self._packing), None, None
        for step in steps:
            if step is not None:
                step.join(self._timeout_s)  # what it writes to must not be given back before
        if self._staging is not None and self._staging.state == "open":
            self._staging.discard()
        self._staging = self._ready = None

    def _told(self, phase: str, error: Exception) -> Exception:
        if self._session is None:
            return error
        return _tell(self._session.control, phase, self._session.who, error)


def _tell(control: ControlStore, phase: str, who: str, error: Exception) -> Exception:
    """Tell everybody, once, and return what stands: the first failure, which may be another rank's."""
    if isinstance(error, RefitFailed):
        return error
    try:
        return RefitFailed(control.fail(phase, who, f"{type(error).__name__}: {error}"))
    except RuntimeError:
        return error  # the store itself is gone: the local cause is all there is

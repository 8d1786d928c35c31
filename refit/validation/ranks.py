"""What one rank does in a case. Both sides run the same two rounds, in step through the control store.

A trainer loads version 1 and sends it, then changes its weights in place and sends version 2. A generator rank starts
from random weights and, per version: stages it by the project's bulk and misc path, again by the golden path, again
by vLLM's own loader from the checkpoint that the trainers exported; compares the three; commits the first; and compares
its live memory with that of a model that vLLM loaded afresh from that checkpoint.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from refit.gen_side.generator import GenParallel
from refit.plan import BULK, RankManifest
from refit.plan.naming import canonical
from refit.transfer.endpoint import Endpoint
from refit.transfer.precision.checkpoint import quantize_checkpoint
from refit.transfer.protocol import GOLDEN, P2P
from refit.transfer.reading import Holder, Reads
from refit.transfer.rendezvous import ControlStore
from refit.validation.matrix import Case
from refit.validation.pool import Tell
from refit.validation.reading import serve
from refit.validation.te_double import quantize_anew, store_in_blocks
from refit.validation.weights import first_difference, next_version, read_tensors, stacked

VERSIONS = (1, 2)
PROMPTS = ((1, 2, 3, 4, 5, 6, 7), (200, 100, 50, 25, 12), (7,) * 12, tuple(range(30, 62)))


@dataclass(frozen=True, slots=True)
class Setting:
    """All that the ranks of a case are told. `meeting` is where the ranks of one framework group meet."""

    case: Case
    folder: str
    """The checkpoint of version 1; version v as the trainers exported it is in `<folder>-v`. Beside each of the two,
    in a case of quantized engines, is what quantizing it as a whole gives: `engine_folder` of it."""
    store: str
    run_id: str
    meeting: str
    timeout_s: float

    def exported(self, version: int) -> str:
        return f"{self.folder}-{version}"

    def engine_folder(self, folder: str) -> str:
        """The same weights as engines store them."""
        return f"{folder}-{self.case.quantized}" if self.case.quantized else folder

    def join(self) -> ControlStore:
        host, _, port = self.store.rpartition(":")
        return ControlStore.join(host, int(port), self.run_id, self.timeout_s)


def run_id_of(setting: Setting, path: str) -> str:
    """Each way of moving bulk has keys of its own in the store."""
    return f"{setting.run_id}-{path}"


def exported_key(version: int) -> str:
    return f"validate/exported/{version}"


@dataclass(frozen=True, slots=True)
class Paths:
    """One endpoint per way of moving bulk tensors, over the same manifest."""

    control: ControlStore
    by_name: Mapping[str, Endpoint]

    @classmethod
    def prepare(cls, setting: Setting, manifest: RankManifest) -> Paths:
        control = setting.join()
        return cls(
            control,
            {
                path: Endpoint.prepare(control.under(run_id_of(setting, path)), manifest, setting.timeout_s)
                for path in (P2P, GOLDEN)
            },
        )

    def close(self) -> None:
        for endpoint in self.by_name.values():
            endpoint.close()
        self.control.close()


def run_train_rank(tell: Tell, setting: Setting, rank: int) -> dict[str, Any]:
    """Returns, on rank 0, `wrong`: what the trainers' own export gets wrong, by version and check."""
    from refit.train_side.bare import BareTrainer

    case = setting.case
    tell("building the model")
    double = (store_in_blocks,) if case.fp8_trainers else ()
    trainer = BareTrainer.build(
        setting.folder, case.train, case.precision, rank, setting.meeting, setting.timeout_s, *double
    )
    tell("prepare")
    offer = _offer(setting, trainer)
    paths = Paths.prepare(setting, offer.describe())
    wrong: dict[str, str] = {}
    for version in VERSIONS:
        if version == 2:
            tell("changing the weights")
            trainer.change(lambda values: next_version(values, case.precision))
            quantize_anew(trainer.weights().values())
        for path, endpoint in paths.by_name.items():
            tell(f"sending version {version}, {path}")
            _send(endpoint, offer, version)
        tell(f"exporting version {version}")
        trainer.save(setting.exported(version))
        if rank == 0:
            as_engines_store_it(setting.case, setting.exported(version))
            paths.control.put(exported_key(version), {"folder": setting.exported(version)})
            bulk = paths.by_name[P2P].plan.tensors
            difference = _export_difference(setting, version, {n for n, t in bulk.items() if t.kind == BULK})
            if difference:
                wrong[f"export {version}"] = difference
    tell("closing")
    paths.close()
    trainer.close()
    return {"wrong": wrong}


def _offer(setting: Setting, trainer: Any) -> Any:
    """The trainer as the engines of the case see it. Collective over the trainers."""
    from refit.gen_side.loader.hf_index import read_hf_shapes
    from refit.train_side.quantized import QuantizedTrainer
    from refit.transfer.precision.scheme import scheme_of

    scheme = scheme_of(read_hf_shapes(setting.engine_folder(setting.folder)))
    return QuantizedTrainer.prepare(trainer, scheme) if scheme else trainer


def as_engines_store_it(case: Case, folder: str) -> None:
    """Write `Setting.engine_folder` of a checkpoint, from its whole tensors."""
    if case.quantized:
        quantize_checkpoint(folder, f"{folder}-{case.quantized}", case.quantized)


def _send(endpoint: Endpoint, trainer: Any, version: int) -> None:
    endpoint.begin(version, version)
    endpoint.move_bulk(trainer.params())
    if endpoint.misc_names:
        exported = trainer.export(endpoint.misc_names)
        if trainer.rank == 0:
            endpoint.send_misc(exported)
        else:
            collections.deque(exported, maxlen=0)  # the export gathers over all trainers
    endpoint.put_report()


def _export_difference(setting: Setting, version: int, bulk: set[str]) -> str:
    """Bridge's export against the checkpoint, computed forward to `version` where that is exact: in bulk tensors."""
    original = read_tensors(setting.folder)
    found = {
        name: tensor.to(original[name].dtype)
        if name in original
        else tensor  # routers stay in fp32 beside bf16
        for name, tensor in read_tensors(setting.exported(version)).items()
    }
    if version == 1:
        return first_difference(found, original, original)
    names = [name for name in original if canonical(name)[0] in bulk]
    wanted = {name: next_version(original[name], setting.case.precision) for name in names}
    return first_difference({name: found[name] for name in names}, wanted, wanted)


def run_gen_rank(tell: Tell, setting: Setting, gen_rank: int) -> dict[str, Any]:
    """Returns `wrong` by version and check, and `logprobs` on the first rank of an engine that runs, else None."""
    from refit.gen_side.loader.hf_index import read_hf_shapes
    from refit.gen_side.loader.trace import trace_loader

    case = setting.case
    replica, rank = divmod(gen_rank, case.gen.num_ranks)
    tell("building the model")
    running, worker = _worker(setting, rank)
    with worker.active():
        tell("tracing the loader")
        trace = trace_loader(worker.model, read_hf_shapes(setting.engine_folder(setting.folder)))
        manifest = trace.manifest(gen_rank=gen_rank, stage=rank // case.gen.tensor, replica=replica)
        tell("prepare")
        paths = Paths.prepare(setting, manifest)
        wrong: dict[str, str] = {}
        for version in VERSIONS:
            found, committed = _round(tell, setting, version, paths, worker, trace, rank)
            wrong |= {f"{check} {version}": text for check, text in found.items() if text}
        if case.read and replica == 0:
            tell("answering reads")
            _answer_reads(setting, worker, trace, committed, rank)
        tell("logprobs")
        logprobs = None if running is None else running.logprobs(PROMPTS)
    tell("closing")
    paths.close()
    return {"wrong": wrong, "logprobs": logprobs if rank == 0 else None}


def _worker(setting: Setting, rank: int) -> tuple[Any, Any]:
    """(engine or None, the rank's model) with other weights than any version's, its ranks joined.

    They are vLLM's own random ones, but a checkpoint's where engines are quantized: vLLM 0.31 gives the scales of such
    an engine's attention random values too, which no loading of weights ever sets again.
    """
    from refit.gen_side.bare import RunningRank, join_ranks, load

    case = setting.case
    dtype = "float32" if case.precision == "fp32" else "bfloat16"
    folder, form = setting.folder, "dummy"
    if case.quantized:
        folder, form = setting.engine_folder(initial_folder(setting.folder)), "auto"
    if case.logprobs:
        running = RunningRank.launch(folder, case.gen, dtype, rank, setting.meeting, form)
        return running, running.worker
    join_ranks(folder, case.gen, dtype, rank, setting.meeting)
    return None, load(folder, case.gen, dtype, rank, form)


def initial_folder(folder: str) -> str:
    """The checkpoint that quantized engines start from."""
    return f"{folder}-0"


def _round(
    tell: Tell, setting: Setting, version: int, paths: Paths, worker: Any, trace: Any, rank: int
) -> tuple[dict[str, str], Any]:
    """One version on one rank: what each check found wrong, "" where nothing was; and what was committed, or None."""
    from refit.gen_side.live.audit import audit, observe_commit, observe_staging

    staged = {}
    for path, endpoint in paths.by_name.items():
        tell(f"staging version {version}, {path}")
        staged[path] = _receive(endpoint, worker, trace, version)
    tell(f"waiting for the export of version {version}")
    paths.control.get(exported_key(version), setting.timeout_s)
    tensors = read_tensors(setting.engine_folder(setting.exported(version)))
    tell(f"comparing version {version}")
    mine = _memory(staged[P2P])
    found = {GOLDEN: first_difference(mine, _memory(staged[GOLDEN]), tensors)}
    staged[GOLDEN].discard()
    found["loader"] = _loader_difference(worker, trace, mine, tensors)
    found["holdings"] = _holding_difference(trace, mine, tensors)
    tell(f"committing version {version}")
    commit, reason = paths.by_name[P2P].decision()
    if not commit:
        staged[P2P].discard()
        return found | {"digests": reason}, None
    loaded = observe_staging(worker.model, staged[P2P])
    staged[P2P].pack_ahead()
    staged[P2P].commit(worker.model_config)
    committed = observe_commit(worker.model, loaded)
    tell(f"loading version {version} afresh")
    live = audit(worker.model, trace, committed)
    found["changed"] = ", ".join(live.changed)
    found["live"] = _live_difference(setting, version, trace, live.params_sha256, rank)
    return found, committed


def _answer_reads(setting: Setting, worker: Any, trace: Any, committed: Any, rank: int) -> None:
    from refit.gen_side.live.memory import LiveMemory

    control, reads = setting.join(), Reads()
    stage = rank // setting.case.gen.tensor
    holder = Holder(
        rank,
        VERSIONS[-1],
        lambda: trace.manifest(gen_rank=rank, stage=stage, replica=0),
        lambda: LiveMemory(worker.model, trace, committed),
    )
    serve(control, 0, rank, setting.timeout_s, lambda info: reads.answer(info, holder))
    reads.close()
    control.close()


def _receive(endpoint: Endpoint, worker: Any, trace: Any, version: int) -> Any:
    from refit.gen_side.staging import Staging

    staging = Staging.begin(worker.model, trace)
    endpoint.begin(version, version)
    endpoint.move_bulk(staging.params())
    if endpoint.misc_names:
        staging.load_misc(endpoint.receive_misc())
    endpoint.put_report()
    return staging


def _loader_difference(
    worker: Any, trace: Any, mine: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> str:
    """Against a staging that vLLM's own `load_weights` filled from the exported tensors."""
    from refit.gen_side.staging import Staging

    by_loader = Staging.begin(worker.model, trace)
    by_loader.load_misc(tensors.items())
    difference = first_difference(mine, _memory(by_loader), tensors)
    by_loader.discard()
    return difference


def _holding_difference(
    trace: Any, mine: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> str:
    """Each holding's box of the exported tensors against the strided memory where it should be."""
    from refit.transfer.memory import strided_box

    whole = stacked(tensors)
    for holding in trace.holdings:
        region = holding.region
        box = whole[holding.tensor][tuple(map(slice, region.starts, region.stops))]
        memory = strided_box(mine[holding.param], region.shape, holding.strides, holding.offset)
        name = f"{holding.param} at {holding.tensor}{list(region.starts)}"
        difference = first_difference({name: memory}, {name: box.to(memory.dtype)}, tensors)
        if difference:
            return difference
    return ""


def _live_difference(setting: Setting, version: int, trace: Any, mine: Mapping[str, str], rank: int) -> str:
    """Live memory after the commit against a fresh model that vLLM loads from the exported checkpoint."""
    from refit.gen_side.bare import load
    from refit.gen_side.live.audit import audit

    case = setting.case
    dtype = "float32" if case.precision == "fp32" else "bfloat16"
    fresh = load(setting.engine_folder(setting.exported(version)), case.gen, dtype, rank)
    with fresh.active():
        wanted = audit(fresh.model, trace, None).params_sha256
    wrong = [name for name in sorted(wanted) if mine.get(name) != wanted[name]]
    return f"{len(wrong)} live parameters differ from a fresh load, {wrong[0]} first" if wrong else ""


def _memory(staging: Any) -> dict[str, torch.Tensor]:
    from refit.gen_side.switch import plain

    return {name: plain(tensor) for name, tensor in staging.tensors.items()}


def run_reference_rank(
    tell: Tell, setting: Setting, folder: str, layout: GenParallel, rank: int
) -> list[list[float]]:
    """Log-probabilities by one rank of an engine that is started from a checkpoint."""
    from refit.gen_side.bare import RunningRank

    dtype = "float32" if setting.case.precision == "fp32" else "bfloat16"
    tell("building the reference engine")
    running = RunningRank.launch(folder, layout, dtype, rank, setting.meeting, "auto")
    tell("logprobs")
    return running.logprobs(PROMPTS)

"""Weights of a running engine, read back by HF name at their full logical shape: only ranks and rows concerned move.

    reader = Reader(JobEngine(control, 0, num_workers), control)
    answer = reader.read("model.layers.0.self_attn.q_proj.weight", rows=slice(0, 8))

An engine passes asks on to its workers: `JobEngine` for one of a running job, `ServerEngine` for a vLLM server. Asks
and answers travel through a control store that the workers reach, in run ids of the reader's own.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from refit.gen_side.live.desk import RUN_ID as DESK
from refit.plan import Manifest, PlanError, Region, decode_rank_manifest
from refit.plan.naming import is_stacked
from refit.plan.read import HeldCell, ReadPlan, Rows, Wanted, plan_read, wanted
from refit.plan.region import split_rows
from refit.plan.sides import Side
from refit.service.http_engine import HttpEngine
from refit.transfer.digest import digest
from refit.transfer.errors import TransportError
from refit.transfer.memory import torch_dtype
from refit.transfer.precision.codecs import codec_of, dequantize
from refit.transfer.precision.scheme import scheme_of
from refit.transfer.rendezvous import ControlStore

CHUNK_BYTES = 16 << 20
"""Most bytes of one ask: bounds the store's memory, and how long generation waits for one answer."""
TRIES = 3
TIMEOUT_S = 60.0


class VersionMoved(TransportError):  # noqa: N818 - a finding; the read may be repeated
    """The engine serves another version than the one asked for, or changed it during the read."""


class Engine(Protocol):
    """How an ask reaches all workers of one engine. `num_workers` is TP x PP."""

    @property
    def name(self) -> str: ...

    @property
    def num_workers(self) -> int: ...

    def ask(self, info: Mapping[str, Any], timeout_s: float) -> None:
        """Returns when every worker has taken the ask, which is deleted then, and answered; TransportError if late."""
        ...


@dataclass(frozen=True, slots=True)
class JobEngine:
    """Engine number `place` among those that take part in a job's refits; `control` is the job's store."""

    control: ControlStore
    place: int
    num_workers: int

    @property
    def name(self) -> str:
        return f"engine {self.place}"

    def ask(self, info: Mapping[str, Any], timeout_s: float) -> None:
        desk = self.control.under(DESK)
        number = desk.count(f"asks/{self.place}", 1)
        desk.put(f"ask/{self.place}/{number}", dict(info))
        done: Any = desk.get(f"done/{self.place}/{number}", timeout_s)
        desk.drop(f"done/{self.place}/{number}")
        if done["error"]:
            raise TransportError(f"{self.name} could not be asked: {done['error']}")


@dataclass(frozen=True, slots=True)
class ServerEngine:
    """A vLLM server with the refit backend."""

    server: HttpEngine
    num_workers: int

    @classmethod
    def of(cls, server: HttpEngine) -> ServerEngine:
        return cls(server, server.num_workers())

    @property
    def name(self) -> str:
        return self.server.url

    def ask(self, info: Mapping[str, Any], timeout_s: float) -> None:  # noqa: ARG002 - the server has its own
        self.server.prepare({"action": "read", **info})


@dataclass(frozen=True, slots=True)
class ReadBack:
    """`tensor` as version `version` of the engine has it.

    `kinds`: parameter -> how it was had, see `reading.Readable`. `ranks` sent elements; `witnesses` hold some of
    them too and agree bit for bit. `moved_bytes` counts elements and messages, in both directions.
    """

    name: str
    tensor: Tensor
    version: int
    ranks: tuple[int, ...]
    witnesses: tuple[int, ...]
    kinds: Mapping[str, str]
    moved_bytes: int


class Reader:
    """Reads of one engine. `control` is any control store that its workers reach; whoever opened it closes it."""

    def __init__(self, engine: Engine, control: ControlStore, timeout_s: float = TIMEOUT_S) -> None:
        self.engine = engine
        self.control = control
        self._timeout_s = timeout_s

    @cached_property
    def side(self) -> Side:
        """Who holds what, as each worker's own trace of its loader says. Asked once."""
        ranks = range(self.engine.num_workers)
        answers = self.session(None).ask({"what": "describe", "last": True}, ranks)
        return Side.of(Manifest("gen", tuple(decode_rank_manifest(answers[r]["manifest"]) for r in ranks)))

    def session(self, version: int | None) -> Session:
        """Asks that must all meet one version: `version`, or the one that the first of them meets."""
        control = self.control.under(f"read-{secrets.token_hex(6)}")
        return Session(self.engine, control, self._timeout_s, version)

    def read(
        self,
        name: str,
        rows: slice | int | None = None,
        version: int | None = None,
        dequantize: bool = False,
    ) -> ReadBack:
        """Rows of an HF tensor, all of them by default. One expert goes by its HF name, all by `...experts.*...`.

        `version`: refuse any other. `dequantize`: what a quantized weight stands for, in float32.
        Raises PlanError for what is not there (padding of a vocabulary too), VersionMoved, RefitFailed with the reason
        of a worker that cannot give it, TransportError when one does not answer in time.
        """
        what = wanted(name, span(rows), self.side)
        for tried in range(1, TRIES + 1):
            session = self.session(version)
            try:
                if dequantize:
                    tensor = self._dequantized(name, what, session)
                else:
                    tensor = session.box(self.side, what.tensor, what.region, last=True)
            except VersionMoved:
                if version is not None or tried == TRIES:
                    raise
            else:
                shape = (*what.shape[:-1], tensor.shape[-1]) if what.shape else ()
                return session.result(name, tensor.reshape(shape))
        raise AssertionError("the last try returns or raises")

    def _dequantized(self, name: str, what: Wanted, session: Session) -> Tensor:
        """The rows decoded: whole blocks of rows are read, and what was not asked for is cut off."""
        form = self.scheme.get(what.tensor)
        if form is None:
            raise PlanError(f"{name!r} is not stored quantized; read it without dequantize")
        codec = codec_of(form).format
        step = max(part.cell[0] for part in codec.parts)
        stored = self.side.specs[what.tensor].shape
        dim = len(stored) - 2
        start, stop = what.region.starts[dim], what.region.stops[dim]
        low, high = start - start % step, min(stored[dim], -(-stop // step) * step)
        region = what.region.with_dim(dim, low, high)
        region = region.with_dim(dim + 1, 0, stored[-1] * codec.parts[0].cell[1])
        parts = [
            session.box(self.side, part.name(what.tensor), part.region(region), last=part is codec.parts[-1])
            for part in codec.parts
        ]
        return dequantize(form, parts, torch.float32).narrow(dim, start - low, stop - start)

    @cached_property
    def scheme(self) -> Mapping[str, str]:
        """Canonical name of each quantized weight -> its format, read off what stands beside it."""
        matrices = {
            name: (spec.shape[1:] if is_stacked(name) else spec.shape, spec.dtype)
            for name, spec in self.side.specs.items()
        }
        return scheme_of(matrices)


@dataclass(slots=True)
class Session:
    """Asks of one run id, all of one version. `control` is under that run id."""

    engine: Engine
    control: ControlStore
    timeout_s: float
    version: int | None
    num_asks: int = 0
    moved_bytes: int = 0
    ranks: set[int] = field(default_factory=set)
    witnesses: set[int] = field(default_factory=set)
    kinds: dict[str, str] = field(default_factory=dict)

    def ask(self, question: Mapping[str, Any], ranks: Sequence[int]) -> dict[int, Any]:
        """The answers of `ranks`; the store forgets them. Raises RefitFailed with a worker's reason, VersionMoved."""
        self.num_asks += 1
        self.control.put(f"ask/{self.num_asks}", dict(question))
        info = {
            "store": f"{self.control.address}:{self.control.port}",
            "run_id": self.control.run_id,
            "read": str(self.num_asks),
            "timeout_s": self.timeout_s,
        }
        self.engine.ask(info, self.timeout_s)
        answers: dict[int, Any] = {}
        for rank in ranks:
            key = f"answer/{self.num_asks}/{rank}"
            answers[rank] = self.control.get(key, self.timeout_s)
            self.control.drop(key)
        self.control.drop(f"ask/{self.num_asks}")
        self.moved_bytes += sum(len(json.dumps(message)) for message in (info, question, *answers.values()))
        for rank, answer in answers.items():
            self._check_version(rank, answer["version"])
            self.kinds |= answer.get("kinds", {})
        return answers

    def box(self, side: Side, tensor: str, region: Region, last: bool) -> Tensor:
        """A box of a canonical tensor, in pieces of CHUNK_BYTES. `last`: the workers may forget what they unpacked."""
        dtype = torch_dtype(side.specs[tensor].dtype)
        found = torch.empty(region.shape, dtype=dtype)
        pieces = split_rows(region, max(1, CHUNK_BYTES // dtype.itemsize)) if region.num_elements else ()
        for piece in pieces:
            self._fill(found, region, plan_read(side, tensor, piece), side, last and piece == pieces[-1])
        return found

    def box_of(self, side: Side, tensor: str, region: Region, rank: int) -> Tensor:
        """A box as `rank` holds it, which others may hold too."""
        found = torch.empty(region.shape, dtype=torch_dtype(side.specs[tensor].dtype))
        plan = ReadPlan(tensor, region, (HeldCell(region, (rank,)),), (rank,))
        self._fill(found, region, plan, side, last=False)
        return found

    def digests(self, boxes: Mapping[int, Sequence[tuple[str, str, Region]]]) -> dict[int, list[int | str]]:
        """{rank: a digest per box (canonical tensor, dtype to be cast to, region), or why there is none}, in order."""
        question = {
            "what": "digests",
            "boxes": {
                rank: [[tensor, dtype, box.starts, box.stops] for tensor, dtype, box in asked]
                for rank, asked in boxes.items()
            },
        }
        answers = self.ask(question, sorted(boxes))
        return {
            rank: [_digest_or_reason(each) for each in answer["digests"]] for rank, answer in answers.items()
        }

    def result(self, name: str, tensor: Tensor) -> ReadBack:
        assert self.version is not None, "a read has met a version"
        ranks, witnesses = tuple(sorted(self.ranks)), tuple(sorted(self.witnesses))
        return ReadBack(name, tensor, self.version, ranks, witnesses, self.kinds, self.moved_bytes)

    def _fill(self, found: Tensor, whole: Region, plan: ReadPlan, side: Side, last: bool) -> None:
        """Ask for the cells of `plan` and put them in their place in `found`, which holds the box `whole`."""
        give, witness = plan.given, plan.witnessed
        question = {
            "what": "rows",
            "tensor": plan.tensor,
            "give": _plain(give),
            "witness": _plain(witness),
            "last": last,
        }
        answers = self.ask(question, sorted({*give, *witness}))
        shape, digests = side.specs[plan.tensor].shape, dict[Region, str]()
        for rank, regions in give.items():
            number, num_bytes = self.num_asks, answers[rank]["num_bytes"]
            payload = self.control.take_bytes(f"bytes/{number}/{rank}", num_bytes)
            self.moved_bytes += num_bytes
            flat = (
                torch.frombuffer(payload, dtype=found.dtype) if payload else torch.empty(0, dtype=found.dtype)
            )
            for region, sent in zip(regions, answers[rank]["digests"]["give"], strict=True):
                box, flat = flat[: region.num_elements].view(region.shape), flat[region.num_elements :]
                if f"{digest(box, region, shape):016x}" != sent:
                    raise TransportError(
                        f"{plan.tensor}{region} changed on its way from {self._who(rank)}; read again"
                    )
                digests[region] = sent
                found[region.slices(whole)] = box
        self.ranks |= set(give)
        self._check_witnesses(plan, answers, digests)

    def _check_witnesses(
        self, plan: ReadPlan, answers: Mapping[int, Any], digests: Mapping[Region, str]
    ) -> None:
        for rank, regions in plan.witnessed.items():
            for region, value in zip(regions, answers[rank]["digests"]["witness"], strict=True):
                if value != digests[region]:
                    raise TransportError(
                        f"{plan.tensor}{region} differs between ranks of {self.engine.name}, {self._who(rank)} has "
                        f"digest {value}, another {digests[region]}: this engine holds no whole version, refit it"
                    )
            self.witnesses.add(rank)

    def _check_version(self, rank: int, version: int) -> None:
        if self.version is None:
            self.version = version
        if self.version != version:
            raise VersionMoved(
                f"{self._who(rank)} serves version {version}, version {self.version} was asked for; read without a "
                f"version, or read {version}"
            )

    def _who(self, rank: int) -> str:
        return f"rank {rank} of {self.engine.name}"


def reader_in_job(control: ControlStore, place: int, num_workers: int, timeout_s: float) -> Reader:
    """Of engine number `place` among those that take part in a job's refits; `control` is the job's store."""
    return Reader(JobEngine(control, place, num_workers), control, timeout_s)


def span(rows: slice | int | None) -> Rows:
    """Rows as (start, stop). Raises PlanError for steps and for rows counted from the end."""
    if rows is None:
        return (None, None)
    found = (rows, rows + 1) if isinstance(rows, int) else (rows.start, rows.stop)
    step = None if isinstance(rows, int) else rows.step
    if step not in (None, 1) or any(value is not None and value < 0 for value in found):
        raise PlanError(f"rows {rows} are not START:STOP, counted from 0 and without steps")
    return found


def _digest_or_reason(answer: Mapping[str, str]) -> int | str:
    return int(answer["digest"], 16) if "digest" in answer else answer["reason"]


def _plain(boxes: Mapping[int, Sequence[Region]]) -> dict[int, list[list[tuple[int, ...]]]]:
    return {rank: [[region.starts, region.stops] for region in regions] for rank, regions in boxes.items()}

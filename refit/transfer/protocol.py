"""Keys and messages of prepare and refit in the control store; both the ranks and the coordinator use these.

Prepare:  describe/<side>/<rank>   a RankManifest as its JSON text, from every rank
          prepare/inputs           Inputs, from the coordinator
          prepare/digest/<rank>    plan digest that joint rank `rank` computed
          prepare/go               {"ok": true}, from the coordinator once all digests agree
          ready/<rank>             {"ok": true}, once the groups of joint rank `rank` are open
Refit:    refit/<attempt>/report/<rank>        RefitReport, from every rank
          refit/<attempt>/suspects             {rank: tensors} that differ, from the coordinator before it discards
          refit/<attempt>/decision             {"commit": bool, "reason": str}, from the coordinator
          refit/<attempt>/slices/<rank>        what a suspected generator rank holds, before it drops that
          refit/<attempt>/finished/<gen_rank>  FinishReport, from every generator rank that committed
Audit:    audit/<audit>/<gen_rank>             digests of live memory, from every generator rank

The coordinator deletes the keys of an attempt and of an audit when it has read them, and those of a run id when another
has taken its place: what a store holds does not grow with the number of refits.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from refit.plan import Manifest, PlanOptions, decode_manifest, encode_manifest
from refit.transfer.errors import TransportError
from refit.transfer.report import Span

INPUTS = "prepare/inputs"
GO = "prepare/go"
OK = {"ok": True}
P2P, GOLDEN = "p2p", "golden"
AUTO, PROCESS_GROUP, TCP, NIXL, CUDA_IPC = "auto", "process_group", "tcp", "nixl", "cuda_ipc"
TRANSPORTS = (AUTO, PROCESS_GROUP, TCP, NIXL, CUDA_IPC)


def describe_key(side: str, rank: int) -> str:
    return f"describe/{side}/{rank}"


def digest_key(rank: int) -> str:
    return f"prepare/digest/{rank}"


def ready_key(rank: int) -> str:
    return f"ready/{rank}"


def attempt_keys(attempt: int) -> str:
    """What all keys of an attempt begin with."""
    return f"refit/{attempt}/"


def report_key(attempt: int, rank: int) -> str:
    return f"{attempt_keys(attempt)}report/{rank}"


def decision_key(attempt: int) -> str:
    return f"{attempt_keys(attempt)}decision"


def suspects_key(attempt: int) -> str:
    return f"{attempt_keys(attempt)}suspects"


def slices_key(attempt: int, rank: int) -> str:
    return f"{attempt_keys(attempt)}slices/{rank}"


def audit_keys(audit: str) -> str:
    """What all keys of an audit begin with; the generator rank follows."""
    return f"audit/{audit}/"


def finished_key(attempt: int, gen_rank: int) -> str:
    return f"{attempt_keys(attempt)}finished/{gen_rank}"


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that decides a plan and how it is run. `digest` is the coordinator's plan digest."""

    train: Manifest
    gen: Manifest
    options: PlanOptions
    backend: str
    bulk: str
    num_streams: int
    timeout_s: float
    digest: str
    transport: str = AUTO
    delta: bool = False

    def __post_init__(self) -> None:
        if self.transport not in TRANSPORTS:
            raise TransportError(f"transport is {self.transport!r}; it can be one of {', '.join(TRANSPORTS)}")
        if self.bulk not in (P2P, GOLDEN):
            raise TransportError(f"bulk is {self.bulk!r}; it can be {P2P!r} or {GOLDEN!r}")
        if self.delta and self.bulk != P2P:
            raise TransportError(f"delta needs bulk {P2P!r}, got {self.bulk!r}: only parcels have a base")
        if self.num_streams < 1:
            raise TransportError(
                f"num_streams is {self.num_streams}; at least 1 is needed (NRL_REFIT_NUM_STREAMS)"
            )
        if not self.timeout_s > 0:
            raise TransportError(
                f"timeout_s is {self.timeout_s}; every wait needs a finite, positive deadline"
            )

    def message(self) -> dict[str, object]:
        return {
            "train": encode_manifest(self.train),
            "gen": encode_manifest(self.gen),
            "options": {
                "bucket_bytes": self.options.bucket_bytes,
                "max_ops_per_round": self.options.max_ops_per_round,
                "whitelist": list(self.options.whitelist),
                "ranks_per_node": self.options.ranks_per_node,
                "nics_per_node": self.options.nics_per_node,
            },
            "backend": self.backend,
            "bulk": self.bulk,
            "num_streams": self.num_streams,
            "timeout_s": self.timeout_s,
            "digest": self.digest,
            "transport": self.transport,
            "delta": self.delta,
        }

    @classmethod
    def of_message(cls, message: object) -> "Inputs":
        fields = _fields(message, cls, INPUTS)
        options = _fields(fields["options"], PlanOptions, f"{INPUTS} options")
        options["whitelist"] = tuple(options["whitelist"])
        fields["options"] = PlanOptions(**options)
        fields["train"], fields["gen"] = decode_manifest(fields["train"]), decode_manifest(fields["gen"])
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class RefitReport:
    """What one joint rank did in one attempt. digests[tensor][dst_rank]; misc_digests[hf_name].

    `wire_bytes_sent` and `wire_bytes_received` are those of bulk that went over the wire: fewer than the payload with
    deltas. `started_s` is time.time() when the rank began; `spans` count from there, with "misc" as one more phase.
    """

    version: int
    started_s: float
    bytes_sent: int
    bytes_received: int
    wire_bytes_sent: int
    wire_bytes_received: int
    misc_bytes: int
    seconds: Mapping[str, float]
    digests: Mapping[str, Mapping[int, int]]
    misc_digests: Mapping[str, int]
    peak_extra_bytes: int
    spans: tuple[Span, ...]

    def message(self) -> dict[str, object]:
        return {
            "version": self.version,
            "started_s": self.started_s,
            "bytes_sent": self.bytes_sent,
            "bytes_received": self.bytes_received,
            "wire_bytes_sent": self.wire_bytes_sent,
            "wire_bytes_received": self.wire_bytes_received,
            "misc_bytes": self.misc_bytes,
            "seconds": dict(self.seconds),
            "digests": {
                tensor: {str(rank): f"{value:016x}" for rank, value in by_rank.items()}
                for tensor, by_rank in self.digests.items()
            },
            "misc_digests": {name: f"{value:016x}" for name, value in self.misc_digests.items()},
            "peak_extra_bytes": self.peak_extra_bytes,
            "spans": [
                [s.phase, s.stage, s.lane, round(s.start_s, 6), round(s.stop_s, 6)] for s in self.spans
            ],
        }

    @classmethod
    def of_message(cls, message: object) -> "RefitReport":
        fields = _fields(message, cls, "refit report")
        fields["spans"] = tuple(Span(*span) for span in fields["spans"])
        fields["digests"] = {
            tensor: {int(rank): int(value, 16) for rank, value in by_rank.items()}
            for tensor, by_rank in fields["digests"].items()
        }
        fields["misc_digests"] = {name: int(value, 16) for name, value in fields["misc_digests"].items()}
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class FinishReport:
    """What a commit cost one generator rank. `started_s` is time.time() when vLLM's processing began.

    `staged_bytes` is the memory that the new version took beside the one that served.
    """

    version: int
    started_s: float
    finalize_s: float
    staged_bytes: int

    def message(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def of_message(cls, message: object) -> "FinishReport":
        return cls(**_fields(message, cls, "finish report"))


def _fields(message: object, kind: type, words: str) -> dict[str, Any]:
    """The message as keyword arguments of `kind`; unknown and missing keys are refused by name."""
    wanted = set(kind.__dataclass_fields__)  # type: ignore[attr-defined]
    found = set(message) if isinstance(message, dict) else set()
    if found != wanted:
        raise TransportError(
            f"{words}: unknown keys {sorted(map(str, found - wanted))}, missing keys {sorted(wanted - found)}; "
            f"do all ranks run the same version of refit?"
        )
    return dict(cast(dict[str, Any], message))

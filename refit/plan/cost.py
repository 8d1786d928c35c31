"""What a plan costs on a fabric: bytes per link, a lower bound that no direct plan can beat, and predicted seconds.

Model of the fabric: every rank has a node; a node has `nics_per_node` network cards of `nic_bytes_per_s` in each
direction, shared evenly by its ranks. Trainers and generators are on different nodes. See docs/planner.md.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from refit.plan.errors import ConfigError
from refit.plan.options import PlanOptions
from refit.plan.plan import Plan
from refit.plan.schedule import StageTotals

MAX_LEVELS = 64


@dataclass(frozen=True, slots=True)
class Topology:
    """A fabric. Defaults: 8 ranks and 8 NICs of 400 Gb/s per node."""

    ranks_per_node: int = 8
    nics_per_node: int = 8
    nic_bytes_per_s: float = 50e9
    nvlink_bytes_per_s: float = 450e9
    latency_s: float = 20e-6
    op_s: float = 4e-6

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value < 0 or (value == 0 and item.name not in ("latency_s", "op_s")):
                raise ConfigError(f"topology {item.name} is {value}; it must be positive")

    @property
    def node_bytes_per_s(self) -> float:
        return self.nics_per_node * self.nic_bytes_per_s

    @property
    def rank_bytes_per_s(self) -> float:
        """What one rank can move at most: one NIC, or its share where ranks share NICs."""
        return min(self.nic_bytes_per_s, self.node_bytes_per_s)


_KEYS = {
    "ranks_per_node": ("ranks_per_node", 1.0),
    "nics_per_node": ("nics_per_node", 1.0),
    "nic_gbps": ("nic_bytes_per_s", 1e9 / 8),
    "nvlink_gbps": ("nvlink_bytes_per_s", 1e9 / 8),
    "latency_us": ("latency_s", 1e-6),
    "op_us": ("op_s", 1e-6),
}


def parse_topology(text: str) -> Topology:
    """`ranks_per_node=8,nic_gbps=400,...` as a Topology. Raises ConfigError naming the key."""
    values: dict[str, float] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals or key not in _KEYS:
            raise ConfigError(
                f"topology {text!r}: {part!r} is not KEY=VALUE with a key out of {', '.join(_KEYS)}"
            )
        name, unit = _KEYS[key]
        try:
            number = float(value)
        except ValueError:
            raise ConfigError(f"topology {text!r}: {key}={value!r} must be a number") from None
        if not 0 <= number < 1e12 or (unit == 1.0 and number != int(number)):
            raise ConfigError(f"topology {text!r}: {key}={value!r} is out of range")
        values[name] = int(number) if unit == 1.0 else number * unit
    return Topology(**values)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of one rank's or one node's network: bytes over it and the seconds they take at line rate."""

    name: str
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Cost:
    """sent and received are bytes per rank inside its side; busiest is the slowest link of the plan.

    bound_s is a lower bound over all plans that send each wanted byte directly from a trainer that holds it;
    bound_ratio is busiest.seconds / bound_s. predicted_s adds latency and per-operation cost.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    busiest: Link
    bound_s: float
    bound_link: str
    predicted_s: float

    @property
    def bound_ratio(self) -> float:
        return self.busiest.seconds / self.bound_s if self.bound_s else 1.0

    @property
    def send_max_over_mean(self) -> float:
        total = sum(self.sent)
        return max(self.sent) * len(self.sent) / total if total else 1.0

    @property
    def idle_senders(self) -> int:
        return sum(1 for num_bytes in self.sent if num_bytes == 0)


def cost_of(plan: Plan, topology: Topology, num_streams: int | None = None) -> Cost:
    """Cost of the bulk part. `num_streams` limits the stages in flight at once (None: all)."""
    sent, received = loads(plan.totals, plan.num_train, plan.num_gen)
    demands: dict[tuple[int, ...], int] = {}
    for flow in plan.flows:
        num_bytes = flow.bytes_per_receiver * len(flow.receivers)
        demands[flow.holders] = demands.get(flow.holders, 0) + num_bytes
    into = max(_links("gen", "into", received, topology), key=lambda link: link.seconds)
    bound_s, bound_link = lower_bound(sent, demands, into, topology)
    return Cost(
        sent,
        received,
        busiest_link(sent, received, topology),
        bound_s,
        bound_link,
        predicted_s(plan.totals, plan.options, topology, num_streams),
    )


def loads(
    totals: Iterable[StageTotals], num_train: int, num_gen: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes that each train rank sends and each gen rank receives, over all stages."""
    sent, received = [0] * num_train, [0] * num_gen
    for stage in totals:
        for rank, num_bytes in stage.sent.items():
            sent[rank] += num_bytes
        for rank, num_bytes in stage.received.items():
            received[rank] += num_bytes
    return tuple(sent), tuple(received)


def max_over_mean_in_stage(totals: Iterable[StageTotals]) -> float:
    """Most over mean of the bytes that the ranks of one stage send, in the least even stage.

    Between stages nothing can be evened out: nobody else has a stage's layers.
    """
    stages = [[one.sent.get(rank, 0) for rank in one.train_ranks] for one in totals]
    return max((max(sent) * len(sent) / sum(sent) for sent in stages if any(sent)), default=1.0)


def busiest_link(sent: Sequence[int], received: Sequence[int], topology: Topology) -> Link:
    """The slowest NIC direction of all ranks and nodes."""
    links = [*_links("train", "out of", sent, topology), *_links("gen", "into", received, topology)]
    return max(links, key=lambda link: link.seconds)


def _links(side: str, direction: str, loads: Sequence[int], topology: Topology) -> Iterable[Link]:
    for rank, num_bytes in enumerate(loads):
        yield Link(f"{direction} {side} rank {rank}", num_bytes, num_bytes / topology.rank_bytes_per_s)
    per_node = topology.ranks_per_node
    for node in range(0, len(loads), per_node):
        num_bytes = sum(loads[node : node + per_node])
        name = f"{direction} {side} node {node // per_node}"
        yield Link(name, num_bytes, num_bytes / topology.node_bytes_per_s)


def lower_bound(
    sent: Sequence[int], demands: Mapping[tuple[int, ...], int], into: Link, topology: Topology
) -> tuple[float, str]:
    """Largest unavoidable link time, and where. `demands[H]`: bytes that only the trainers of H can send.

    Into a generator rank or node: `into`. Out of the trainers: for any set S of ranks, the bytes that only ranks of
    S hold must leave S; its network is the sum of its nodes', at most one NIC per rank. S runs over the sets of ranks
    (and of whole nodes) that are as busy as some level, where a balanced plan is tight.
    """
    best, name = into.seconds, into.name
    for chosen in _candidate_sets(sent, demands, topology):
        unavoidable = sum(num_bytes for holders, num_bytes in demands.items() if chosen.issuperset(holders))
        seconds = unavoidable / capacity(chosen, topology)
        if seconds > best:
            best, name = seconds, f"out of {len(chosen)} train ranks that alone hold {unavoidable} bytes"
    return best, name


def _candidate_sets(
    sent: Sequence[int], demands: Mapping[tuple[int, ...], int], topology: Topology
) -> Iterable[frozenset[int]]:
    for level in _levels(sent):
        yield frozenset(rank for rank, num_bytes in enumerate(sent) if num_bytes >= level)
    per_node = topology.ranks_per_node
    nodes = [range(first, min(first + per_node, len(sent))) for first in range(0, len(sent), per_node)]
    busy_s = [sum(sent[rank] for rank in node) / capacity(node, topology) for node in nodes]
    for level in _levels(busy_s):
        busy = (node for node, seconds in zip(nodes, busy_s, strict=True) if seconds >= level)
        yield frozenset(rank for node in busy for rank in node)
    heaviest = sorted(demands, key=lambda holders: (-demands[holders] / len(holders), holders))
    yield from (frozenset(holders) for holders in heaviest[:MAX_LEVELS])


def _levels(values: Iterable[float]) -> Sequence[float]:
    """Distinct values above 0, largest first, thinned out to about MAX_LEVELS."""
    levels = sorted({value for value in values if value}, reverse=True)
    step = max(1, len(levels) // MAX_LEVELS)
    return [*levels[::step], *levels[-1:]]


def capacity(ranks: Iterable[int], topology: Topology) -> float:
    """Bytes per second in one direction of the NICs that these ranks of one side can use together."""
    per_node: dict[int, int] = {}
    for rank in ranks:
        node = rank // topology.ranks_per_node
        per_node[node] = per_node.get(node, 0) + 1
    return sum(
        min(count * topology.rank_bytes_per_s, topology.node_bytes_per_s) for count in per_node.values()
    )


def predicted_s(
    totals: Iterable[StageTotals], options: PlanOptions, topology: Topology, num_streams: int | None
) -> float:
    """Seconds of the bulk transfer: stages in groups of `num_streams`, each group as slow as its slowest link.

    A link's time is bytes / rate + rounds * latency + operations * op cost; rounds are bytes / bucket.
    """
    stages = sorted(totals, key=lambda stage: stage.stage)
    width = len(stages) if num_streams is None else max(1, num_streams)
    seconds = 0.0
    for first in range(0, len(stages), width):
        group = stages[first : first + width]
        slowest = 0.0
        received: dict[int, int] = {}
        for stage in group:
            slowest = max(slowest, _slowest_s(stage.sent, stage.num_gen, options, topology))
            for rank, num_bytes in stage.received.items():
                received[rank] = received.get(rank, 0) + num_bytes
        num_trainers = sum(len(stage.train_ranks) for stage in group)
        slowest = max(slowest, _slowest_s(received, num_trainers, options, topology))
        seconds += slowest
    return seconds


def _slowest_s(loads: Mapping[int, int], num_peers: int, options: PlanOptions, topology: Topology) -> float:
    if not loads:
        return 0.0
    heaviest = max(loads.values())
    node_loads: dict[int, int] = {}
    for rank, num_bytes in loads.items():
        node = rank // topology.ranks_per_node
        node_loads[node] = node_loads.get(node, 0) + num_bytes
    wire_s = max(heaviest / topology.rank_bytes_per_s, max(node_loads.values()) / topology.node_bytes_per_s)
    num_rounds = -(-heaviest // options.bucket_bytes)
    ops = num_rounds * min(num_peers, options.peers_per_round)
    return wire_s + num_rounds * topology.latency_s + ops * topology.op_s

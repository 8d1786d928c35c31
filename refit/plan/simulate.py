"""A discrete-event simulation of the bulk part of a refit on a fabric.

Every rank has one sending and one receiving link. The bytes of each (stage, trainer, generator) pair travel
as chunks; a trainer sends its chunks one after the other, its peers taking turns; a generator's link serves
chunks as they come. A chunk costs bytes / rate on both links, latency between them, and the per-operation
cost on the sender. A generator works on at most `num_streams` stages at once: the chunk of a further stage
waits until one is complete. With a fan-out only the first hop goes that way; when a node has all of a stage,
its ranks exchange the rest of it over NVLink, one stage after the other.
"""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from refit.plan.cost import Topology
from refit.plan.errors import ConfigError
from refit.plan.fanout import FanOut
from refit.plan.plan import Plan

MAX_CHUNKS = 60_000


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong. Ranks are joint ranks. slow: factor on the rank's link rate; fail_at: second of its death."""

    slow: Mapping[int, float] = field(default_factory=dict)
    fail_at: Mapping[int, float] = field(default_factory=dict)
    deadline_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Span:
    """One rank busy with one stage, from its first to its last byte."""

    rank: int
    stage: int
    start_s: float
    stop_s: float
    num_bytes: int
    hop: int = 1


@dataclass(frozen=True, slots=True)
class Timeline:
    """Result. `failure` is empty if all arrived; then `seconds` is when the last byte was there, else when the
    round was given up. `straggler` is the joint rank that was busy last."""

    seconds: float
    failure: str
    straggler: int
    num_chunks: int
    spans: tuple[Span, ...]
    utilization: float


@dataclass(slots=True)
class _Chunk:
    stage: int
    gen_rank: int
    num_bytes: int
    num_ops: int


def simulate(
    plan: Plan,
    topology: Topology,
    num_streams: int | None = None,
    faults: Faults | None = None,
    fan: FanOut | None = None,
) -> Timeline:
    """Run the plan's bulk bytes over the fabric, in the two hops of `fan` if it is given. Deterministic."""
    faults = Faults() if faults is None else faults
    last = plan.num_train + plan.num_gen - 1
    for rank in (*faults.slow, *faults.fail_at):
        if not 0 <= rank <= last:
            raise ConfigError(f"fault on rank {rank}, which is not in this plan; joint ranks are 0..{last}")
    return _Simulation(plan, topology, num_streams or len(plan.stages), faults, fan).run()


class _Simulation:
    def __init__(
        self, plan: Plan, topology: Topology, num_streams: int, faults: Faults, fan: FanOut | None
    ) -> None:
        self.plan, self.topology, self.num_streams, self.faults = plan, topology, num_streams, faults
        self.fan = fan
        self.position = {stage: number for number, stage in enumerate(plan.stages)}
        self.queues = _queues(plan, dict(_pairs(plan) if fan is None else sorted(fan.pairs().items())))
        self.open_chunks: dict[tuple[int, int], int] = {}
        for queue in self.queues.values():
            for chunk in queue:
                key = (chunk.gen_rank, self.position[chunk.stage])
                self.open_chunks[key] = self.open_chunks.get(key, 0) + 1
        self.link_free: dict[int, float] = {}
        self.waiting: dict[tuple[int, int], list[tuple[int, float]]] = {}
        self.spans: dict[tuple[int, int], Span] = {}
        self.relays: list[Span] = []
        self.lost: tuple[int, int, float] | None = None

    def run(self) -> Timeline:
        num_chunks = sum(map(len, self.queues.values()))
        ready = [(0.0, rank) for rank in sorted(self.queues) if self.queues[rank]]
        heapq.heapify(ready)
        while ready:
            now, sender = heapq.heappop(ready)
            queue = self.queues[sender]
            gate = self._gate(queue[-1])
            if gate is not None:
                self.waiting.setdefault(gate, []).append((sender, now))
            else:
                chunk = queue.pop()
                free, opened = self._send(sender, chunk, now)
                if queue and free is not None:
                    heapq.heappush(ready, (free, sender))
                for other, since in opened:
                    heapq.heappush(ready, (max(since, self._done_at(chunk)), other))
        if self.fan is not None and self.lost is None:
            self._second_hop(self.fan)
        return self._timeline(num_chunks)

    def _second_hop(self, fan: FanOut) -> None:
        """Each node exchanges a stage when all its ranks have their part of it and are done with the stage before."""
        per_node = self.topology.ranks_per_node
        nodes: dict[tuple[int, int], list[int]] = {}
        for stage, rank in sorted(fan.relayed_in.keys() | fan.relayed_out.keys()):
            nodes.setdefault((stage, rank // per_node), []).append(rank)
        free: dict[int, float] = {}
        for (stage, node), ranks in nodes.items():
            there = [self.spans.get((self.plan.num_train + rank, stage)) for rank in ranks]
            ready = max([free.get(node, 0.0), *(span.stop_s for span in there if span is not None)])
            for rank in ranks:
                key, joint = (stage, rank), self.plan.num_train + rank
                num_bytes = max(fan.relayed_in.get(key, 0), fan.relayed_out.get(key, 0))
                if num_bytes:
                    rate = self.topology.nvlink_bytes_per_s * self.faults.slow.get(joint, 1.0)
                    stop = ready + self.topology.latency_s + num_bytes / rate
                    self.relays.append(Span(joint, stage, ready, stop, num_bytes, hop=2))
                    free[node] = max(free.get(node, 0.0), stop)

    def _gate(self, chunk: _Chunk) -> tuple[int, int] | None:
        """The (generator, stage position) that must be complete before this chunk may start; None if it may."""
        earlier = self.position[chunk.stage] - self.num_streams
        for position in range(earlier, -1, -1):
            if self.open_chunks.get((chunk.gen_rank, position), 0):
                return chunk.gen_rank, position
        return None

    def _done_at(self, chunk: _Chunk) -> float:
        return self.link_free.get(self.plan.num_train + chunk.gen_rank, 0.0)

    def _send(self, sender: int, chunk: _Chunk, now: float) -> tuple[float | None, list[tuple[int, float]]]:
        """Move one chunk. Returns when the sender is free again (None: never) and the senders it woke up."""
        receiver = self.plan.num_train + chunk.gen_rank
        fabric = self.topology
        sent_at = now + chunk.num_ops * fabric.op_s + chunk.num_bytes / self._rate(sender)
        start = max(now + fabric.latency_s, self.link_free.get(receiver, 0.0))
        arrived = max(sent_at + fabric.latency_s, start + chunk.num_bytes / self._rate(receiver))
        for rank, at in ((sender, sent_at), (receiver, arrived)):
            died = self.faults.fail_at.get(rank)
            if died is not None and at > died:
                if self.lost is None or died < self.lost[2]:
                    self.lost = (rank, chunk.stage, died)
                return None, []
        self.link_free[receiver] = start + chunk.num_bytes / self._rate(receiver)
        self._busy(sender, chunk, now, sent_at)
        self._busy(receiver, chunk, start, arrived)
        key = (chunk.gen_rank, self.position[chunk.stage])
        self.open_chunks[key] -= 1
        opened = self.waiting.pop(key, []) if self.open_chunks[key] == 0 else []
        return max(sent_at, start), opened

    def _rate(self, rank: int) -> float:
        return self.topology.rank_bytes_per_s * self.faults.slow.get(rank, 1.0)

    def _busy(self, rank: int, chunk: _Chunk, start: float, stop: float) -> None:
        key = (rank, chunk.stage)
        span = self.spans.get(key)
        if span is None:
            self.spans[key] = Span(rank, chunk.stage, start, stop, chunk.num_bytes)
        else:
            self.spans[key] = Span(
                rank,
                chunk.stage,
                min(span.start_s, start),
                max(span.stop_s, stop),
                span.num_bytes + chunk.num_bytes,
            )

    def _timeline(self, num_chunks: int) -> Timeline:
        spans = (*(self.spans[key] for key in sorted(self.spans)), *self.relays)
        seconds = max((span.stop_s for span in spans), default=0.0)
        straggler = max(spans, key=lambda span: (span.stop_s, -span.rank)).rank if spans else 0
        failure = ""
        if self.lost is not None:
            rank, stage, died = self.lost
            seconds, straggler = died + self.faults.deadline_s, rank
            failure = (
                f"rank {rank} died at {died:.3f} s in stage {stage}; its peers give up at {seconds:.3f} s"
                f" (deadline {self.faults.deadline_s:g} s), nothing is committed, the old version serves on"
            )
        received = sum(span.num_bytes for span in spans if span.rank >= self.plan.num_train and span.hop == 1)
        capacity = seconds * self.topology.rank_bytes_per_s * self.plan.num_gen
        return Timeline(
            seconds, failure, straggler, num_chunks, spans, received / capacity if capacity else 0.0
        )


def _queues(plan: Plan, pairs: Mapping[tuple[int, int], int]) -> dict[int, list[_Chunk]]:
    """Chunks of each trainer, last one first. Peers take turns, starting with a different one on each trainer."""
    total = sum(pairs.values())
    size = max(1, plan.options.bucket_bytes // plan.options.peers_per_round, -(-total // MAX_CHUNKS))
    by_sender: dict[int, list[tuple[int, int, _Chunk]]] = {rank: [] for rank in range(plan.num_train)}
    stage_of = [rank.stage for rank in plan.train.manifest.ranks]
    for (sender, receiver), num_bytes in pairs.items():
        turn = (receiver - sender) % plan.num_gen
        num_chunks = -(-num_bytes // size)
        for number in range(num_chunks):
            part = num_bytes * (number + 1) // num_chunks - num_bytes * number // num_chunks
            by_sender[sender].append((number, turn, _Chunk(stage_of[sender], receiver, part, 1)))
    queues: dict[int, list[_Chunk]] = {}
    for sender, chunks in by_sender.items():
        chunks.sort(key=lambda item: item[:2], reverse=True)
        queues[sender] = [chunk for _, _, chunk in chunks]
    return queues


def _pairs(plan: Plan) -> Iterator[tuple[tuple[int, int], int]]:
    """Bytes of every (train rank, gen rank) pair."""
    found: dict[tuple[int, int], int] = {}
    for flow in plan.flows:
        line = len(flow.tensors) * flow.num_rows
        for position, holder in enumerate(flow.holders):
            low, high = flow.cuts[position], flow.cuts[position + 1]
            for number in range(low // line, -(-high // line)):
                rows = min(high, (number + 1) * line) - max(low, number * line)
                key = (holder, flow.receivers[number])
                found[key] = found.get(key, 0) + rows * flow.row_bytes
    yield from sorted(found.items())

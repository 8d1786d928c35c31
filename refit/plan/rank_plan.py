"""One rank's share of a plan: rounds of buckets of segments. Values only; `schedule` makes them."""

from dataclasses import dataclass

from refit.plan.region import Region


@dataclass(frozen=True, slots=True)
class Segment:
    """One strided box of one tensor inside a bucket. param, offset, strides are this rank's own memory, in
    elements.

    `start_byte` (16-byte aligned, from the bucket's start), `tensor`, `region` and `wire_dtype` are the same
    on both ends. In the bucket the box lies contiguous in row-major order.
    """

    tensor: str
    region: Region
    param: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    wire_dtype: str
    start_byte: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """What goes to, or comes from, one peer (joint rank) in one round. num_bytes is a multiple of 16."""

    peer: int
    num_bytes: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """Buckets that are posted together. Indexes are the same on all ranks of the stage and rise; gaps are
    allowed.

    Both ends of a bucket have it in the round of the same index, so ranks that run their rounds in order
    never wait in a circle.
    """

    index: int
    sends: tuple[Bucket, ...]
    receives: tuple[Bucket, ...]

    @property
    def send_bytes(self) -> int:
        return sum(bucket.num_bytes for bucket in self.sends)

    @property
    def receive_bytes(self) -> int:
        return sum(bucket.num_bytes for bucket in self.receives)


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One rank's part of one trainer pipeline stage. group_ranks are joint ranks: its trainers and all
    generators."""

    stage: int
    group_ranks: tuple[int, ...]
    rounds: tuple[Round, ...]


@dataclass(frozen=True, slots=True)
class RankPlan:
    """All that one joint rank sends and receives. A trainer has its own stage only, a generator has all
    stages."""

    rank: int
    stages: tuple[StagePlan, ...]

    @property
    def bytes_sent(self) -> int:
        return sum(round_.send_bytes for stage in self.stages for round_ in stage.rounds)

    @property
    def bytes_received(self) -> int:
        return sum(round_.receive_bytes for stage in self.stages for round_ in stage.rounds)

    @property
    def peak_send_bytes(self) -> int:
        """Largest send buffer that any single round needs."""
        return max((round_.send_bytes for stage in self.stages for round_ in stage.rounds), default=0)

    @property
    def peak_receive_bytes(self) -> int:
        """Largest receive buffer that any single round needs."""
        return max((round_.receive_bytes for stage in self.stages for round_ in stage.rounds), default=0)
